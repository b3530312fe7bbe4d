"""Prompts of about 2,000 tokens that share nothing with each other from their first block on."""

from mcp_vllm.demo.document import research_ship_manual

MANUAL_CHARS = len(research_ship_manual())


def prompts(count: int, num_chars: int) -> list[str]:
    """`count` prompts of `num_chars` characters each, different from the first word on."""
    manual = research_ship_manual()
    rotated = []
    for index in range(count):
        start = index * MANUAL_CHARS // count
        text = (manual[start:] + manual[:start]) * (num_chars // MANUAL_CHARS + 1)
        rotated.append(f"Copy {index + 1}. {text}"[:num_chars])
    return rotated
