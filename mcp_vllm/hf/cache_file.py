"""A chat in a file: written whole or not at all, read only by the model that it belongs to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from mcp_vllm.hf.transfer import CachedChat, export_cache, import_cache
from mcp_vllm.session.delta import DEFAULT_MAX_BYTES

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedConfig, PreTrainedModel


def save_cache(
    path: str | os.PathLike[str],
    cache: Cache,
    model: PreTrainedModel | PreTrainedConfig,
    *,
    token_ids: torch.Tensor | None = None,
    codec: str = "lossless",
) -> int:
    """Write the chat to ``path`` and return the file's size in bytes.

    A file that was there is replaced at once when the new one is on disk; a crash leaves the old
    one. Readable by its owner only, since the text can be read out of a cache. Raises what
    `export_cache` does, and OSError.
    """
    data = export_cache(cache, model, token_ids=token_ids, codec=codec)
    _replace_file(Path(path), data)
    return len(data)


def load_cache(
    path: str | os.PathLike[str],
    model: PreTrainedModel | PreTrainedConfig,
    *,
    device: torch.device | str | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    accept: Collection[str] = (),
) -> CachedChat:
    """The chat that `save_cache` wrote. Raises what `import_cache` does, and OSError."""
    data = Path(path).read_bytes()
    return import_cache(data, model, device=device, max_bytes=max_bytes, accept=accept)


def _replace_file(path: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
