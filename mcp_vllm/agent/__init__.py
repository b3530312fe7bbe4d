"""The context agent."""

import os

# Chunks are coded side by side in threads of our own: a matrix product that started more would take
# the engines' cores. numpy reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
