"""Reads a configuration file or inline JSON into a mapping; knows nothing of the keys in it."""

import json
from collections.abc import Hashable, Mapping
from pathlib import Path

import yaml

from mcp_vllm.config.errors import ConfigError

INLINE_JSON = "inline JSON"


def read_source(
    source: str | Path | Mapping[str, object] | None,
) -> tuple[str, Mapping[str, object]]:
    """The source's name for messages, and its top-level mapping (empty when there is none).

    Raises ConfigError when it cannot be read, is neither YAML nor JSON, is not a mapping, or holds
    a key twice.
    """
    if source is None:
        return "defaults", {}
    if isinstance(source, Mapping):
        return "given mapping", source
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return INLINE_JSON, _mapping(INLINE_JSON, _parse_json(INLINE_JSON, source))
    label = str(source)
    text = _read(label)
    parse = _parse_json if label.endswith(".json") else _parse_yaml
    return label, _mapping(label, parse(label, text))


def _read(label: str) -> str:
    try:
        return Path(label).read_text(encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError([f"{label}: cannot be read: {reason}"]) from None
    except (UnicodeDecodeError, ValueError) as error:
        raise ConfigError([f"{label}: is not a UTF-8 text file: {error}"]) from None


def _mapping(label: str, parsed: object) -> Mapping[str, object]:
    if parsed is None:  # an empty file, or one with comments only
        return {}
    if not isinstance(parsed, Mapping):
        raise ConfigError([f"{label}: must hold keys and values, not {type(parsed).__name__}"])
    return parsed


def _parse_json(label: str, text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_unique_pairs)
    except ValueError as error:
        raise ConfigError([f"{label}: is not JSON: {error}"]) from None


def _unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys: dict[str, object] = {}
    for key, value in pairs:
        if key in keys:
            raise ValueError(f'key "{key}" is given twice')
        keys[key] = value
    return keys


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error instead of the last one winning."""

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'key "{key.value}" is given twice', key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(label: str, text: str) -> object:
    try:
        return _StrictLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{label}, line {mark.line + 1}" if mark else label
        raise ConfigError([f"{where}: is not YAML: {error.problem}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{label}: is not YAML: {' '.join(str(error).split())}"]) from None
