"""What the demo talks about: a document of about 2,000 tokens and the questions of four turns.

The text was written for this package. Its facts are invented, so an answer that is right was read
from the context and not from the model's memory.
"""

from importlib.resources import files

QUESTIONS = (
    "Who is the captain of the Halcyon?",
    "What is the home port of the ship?",
    "On which day of the week is the emergency generator tested?",
    "What is the name of the ship's cat?",
)


def research_ship_manual() -> str:
    """The maintenance manual of a research ship, about 2,000 tokens with Gemma's tokenizer."""
    return files("mcp_vllm.demo").joinpath("research_ship.md").read_text(encoding="utf-8")
