"""How hypothesis runs here: the same examples each time, as slow as the machine is."""

from hypothesis import settings

settings.register_profile("codec", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("codec")
