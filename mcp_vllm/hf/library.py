"""torch and transformers, imported when they are first needed.

The private attributes of cache layers that layers.py reads have changed over the releases, so one
outside the range that was tested is refused rather than guessed at.
"""

import importlib
from typing import Any

from mcp_vllm.hf.errors import LibraryError

OLDEST = (5, 16)
PAST_NEWEST = (6, 0)


def torch() -> Any:
    """The torch module; LibraryError if it is not installed."""
    return _imported("torch")


def cache_utils() -> Any:
    """`transformers.cache_utils` of a supported release; LibraryError otherwise."""
    version = _imported("transformers").__version__
    if not OLDEST <= tuple(int(part) for part in version.split(".")[:2]) < PAST_NEWEST:
        raise LibraryError(
            f"transformers {version} is outside the supported range, "
            f"{_shown(OLDEST)} up to but not {_shown(PAST_NEWEST)}; install one of these"
        )
    return _imported("transformers.cache_utils")


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LibraryError(f"this needs {module.partition('.')[0]}; install it") from error


def _shown(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
