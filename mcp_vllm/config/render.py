"""Configuration as text for people: values the way they are written in a file, and a whole file."""

import json

from pydantic import BaseModel, ByteSize

from mcp_vllm.config.keys import keys_of, value_of
from mcp_vllm.config.loader import C, Loaded

_UNITS = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def as_text(value: object) -> str:
    """A value as YAML that reads back as the same value; whole sizes with their unit."""
    if isinstance(value, ByteSize):
        return next(
            (f"{value // n}{unit}" for unit, n in _UNITS if value and value % n == 0),
            str(int(value)),
        )
    return json.dumps(value, default=_plain, ensure_ascii=False)


def _plain(value: object) -> object:
    """What JSON has no form for: an item of a list of sections, or something like a path."""
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else str(value)


def render(loaded: Loaded[C]) -> str:
    """Every key as a YAML file, with the source of those that were set in a comment."""
    lines: list[tuple[str, str]] = []
    opened: list[str] = []
    for key in keys_of(type(loaded.config)):
        *sections, name = key.dotted.split(".")
        for depth, section in enumerate(sections):
            if opened[: depth + 1] != sections[: depth + 1]:
                lines.append((f"{'  ' * depth}{section}:", ""))
                opened = sections[: depth + 1]
        opened = sections
        text = f"{'  ' * len(sections)}{name}: {as_text(value_of(loaded.config, key.dotted))}"
        lines.append((text, loaded.sources.get(key.dotted, "")))
    width = max(len(text) for text, source in lines if source) if loaded.sources else 0
    return "\n".join(f"{text:<{width}}  # {source}" if source else text for text, source in lines)
