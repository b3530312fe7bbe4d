"""Merges flags, environment, file and defaults into one validated configuration.

Works on any pydantic schema, so the schema may import it. Remembers where each key came from: the
faults name their source, and `mcp-vllm config check` shows it.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mcp_vllm.config.errors import ConfigError
from mcp_vllm.config.keys import ENV_PREFIX, NOT_SETTINGS, keys_of, section_of
from mcp_vllm.config.nearest import did_you_mean
from mcp_vllm.config.source import read_source

C = TypeVar("C", bound=BaseModel)


@dataclass(frozen=True)
class Setting:
    """A value somebody gave for a key, and where: a file, a variable, a flag."""

    value: object
    source: str


@dataclass(frozen=True)
class Loaded(Generic[C]):
    """A configuration, and the source of each dotted key that somebody has set."""

    config: C
    sources: Mapping[str, str]


def peer_flags(peers: Sequence[str]) -> dict[str, Setting]:
    """The settings that `--mcp-peer` stands for; none when the flag was not used."""
    return {"peers": Setting(list(peers), "--mcp-peer")} if peers else {}


def load(
    schema: type[C],
    source: str | Path | Mapping[str, object] | None,
    *,
    flags: Mapping[str, Setting],
    environ: Mapping[str, str],
) -> Loaded[C]:
    """Merge the layers (flags before environment before `source`) and validate them.

    Raises ConfigError with every fault that was found, unknown keys before bad values.
    """
    faults: list[str] = []
    label, tree = read_source(source)
    settings = {
        **_from_tree(schema, tree, label, faults),
        **_from_environ(schema, environ, faults),
        **flags,
    }
    if faults:
        raise ConfigError(faults)
    try:
        config = schema.model_validate(_nested(settings))
    except ValidationError as error:
        raise ConfigError([_fault(each, settings) for each in error.errors()]) from None
    return Loaded(config, {dotted: setting.source for dotted, setting in settings.items()})


def _from_tree(
    schema: type[BaseModel], tree: Mapping[str, object], label: str, faults: list[str]
) -> dict[str, Setting]:
    """The keys that a file sets; what the schema does not know goes to `faults`."""
    settings: dict[str, Setting] = {}
    for dotted, value, field in _flattened(schema, tree):
        if field is None:
            faults.append(f'{label}: unknown key "{dotted}" {_nearest(schema, dotted)}')
        elif section_of(field) is None:
            settings[dotted] = Setting(value, label)
        elif value is not None:  # a section whose every line is commented out reads as None
            faults.append(f"{label}: {dotted}: must hold keys of its own, not {value!r}")
    return settings


def _flattened(
    schema: type[BaseModel], tree: Mapping[str, object], prefix: str = ""
) -> Iterator[tuple[str, object, FieldInfo | None]]:
    """Dotted name, value and field (None: unknown) of all in `tree`, sections walked into."""
    for name, value in tree.items():
        field = schema.model_fields.get(name)
        section = section_of(field) if field else None
        if section is not None and isinstance(value, Mapping):
            yield from _flattened(section, value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, field


def _nearest(schema: type[BaseModel], dotted: str) -> str:
    """What an unknown key may have meant: another key of its section first, then any key."""
    section = dotted.rpartition(".")[0]
    keys = [key.dotted for key in keys_of(schema)]
    names = [*schema.model_fields] if not section else []
    names += [key for key in keys if key.rpartition(".")[0] == section and key not in names]
    return did_you_mean(dotted, names, [key for key in keys if key not in names])


def _from_environ(
    schema: type[BaseModel], environ: Mapping[str, str], faults: list[str]
) -> dict[str, Setting]:
    """The keys that MCP_VLLM_* variables set; an empty variable counts as not set."""
    known = {key.env_name: key for key in keys_of(schema)}
    settings: dict[str, Setting] = {}
    for name, text in environ.items():
        if not name.startswith(ENV_PREFIX) or name in NOT_SETTINGS:
            continue
        key = known.get(name)
        if key is None:
            faults.append(f"environment: unknown variable {name} {did_you_mean(name, known)}")
        elif text:
            value = [part.strip() for part in text.split(",")] if key.is_list else text
            settings[key.dotted] = Setting(value, f"environment {name}")
    return settings


def _nested(settings: Mapping[str, Setting]) -> dict[str, object]:
    """Dotted keys as the nested mapping that the schema validates."""
    root: dict[str, object] = {}
    for dotted, setting in settings.items():
        *path, leaf = dotted.split(".")
        node = root
        for name in path:
            child = node.setdefault(name, {})
            assert isinstance(child, dict)
            node = child
        node[leaf] = setting.value
    return root


_PLAIN_WORDS = {
    "tuple_type": "must be a list",
    "path_type": "must be a path",
    "extra_forbidden": "unknown key",
}


def _fault(error: ErrorDetails, settings: Mapping[str, Setting]) -> str:
    """One validation error as one line: source, dotted key, what is wrong, the value given."""
    names = list(itertools.takewhile(lambda part: isinstance(part, str), error["loc"]))
    # A fault between keys has no field of its own; its validator puts the key in the context.
    dotted = ".".join(map(str, names)) or str(error.get("ctx", {}).get("key", ""))
    inside = error["loc"][len(names) :]  # of an item of a list
    place = dotted + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in inside)
    message = _PLAIN_WORDS.get(error["type"], error["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should be", "must be")
    line = f"{place}: {message}"
    if names and error["type"] != "value_error":  # those messages hold the value already
        line += f" (got {error['input']!r})"
    return f"{settings[dotted].source}: {line}" if dotted in settings else line
