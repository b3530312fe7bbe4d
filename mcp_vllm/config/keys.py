"""The schema seen as a flat list of dotted keys.

The loader, the generated documentation and `mcp-vllm config` all walk the schema through here, so
that a key is known everywhere or nowhere.
"""

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ENV_PREFIX = "MCP_VLLM_"
# Variables with our prefix that are no settings: where caches go, our log level, a parent's
# configuration on its way to the agent, and the token of the command line's user.
NOT_SETTINGS = frozenset(
    {"MCP_VLLM_CACHE", "MCP_VLLM_LOG_LEVEL", "MCP_VLLM_CONFIG_JSON", "MCP_VLLM_TOKEN"}
)


@dataclass(frozen=True)
class Key:
    """One setting: its dotted name (`agent.listen`) and the schema's field behind it."""

    dotted: str
    field: FieldInfo

    @property
    def env_name(self) -> str:
        """The environment variable that sets it: `agent.listen` is MCP_VLLM_AGENT__LISTEN."""
        return ENV_PREFIX + self.dotted.replace(".", "__").upper()

    @property
    def is_list(self) -> bool:
        """Whether the key holds several values (a comma separates them in the environment)."""
        return typing.get_origin(self.field.annotation) is tuple


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The nested model that `field` holds, or may hold; None when it holds a plain value."""
    kind = field.annotation
    is_optional = typing.get_origin(kind) in (types.UnionType, typing.Union)
    kinds = typing.get_args(kind) if is_optional else (kind,)
    nested = (each for each in kinds if isinstance(each, type) and issubclass(each, BaseModel))
    return next(nested, None)


def keys_of(schema: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every setting of `schema`, in the order in which the schema declares them."""
    for name, field in schema.model_fields.items():
        section = section_of(field)
        if section is None:
            yield Key(prefix + name, field)
        else:
            yield from keys_of(section, f"{prefix}{name}.")


def value_of(config: BaseModel, dotted: str) -> object:
    """The value that `config` holds under a dotted key."""
    value: object = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value
