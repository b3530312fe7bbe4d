"""What the demo talks about: a document of about 2,000 tokens and the questions of four turns.

The text was written for this package. Its facts are invented, so an answer that is right was read
from the context and not from the model's memory.
"""

from importlib.resources import files

# Asked one after another; Gemma-3-270m (the base model, 4 bits) answers these rightly.
QUESTIONS = (
    "What is the name of the captain?",
    "What are the two main engines called?",
    "What is the name of the work boat?",
    "What is the call sign of the Halcyon?",
)


def research_ship_manual() -> str:
    """The maintenance manual of a research ship, about 2,000 tokens with Gemma's tokenizer."""
    return files("mcp_vllm.demo").joinpath("research_ship.md").read_text(encoding="utf-8")
