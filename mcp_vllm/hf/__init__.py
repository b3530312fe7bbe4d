"""For transformers: caches (`past_key_values`) as files and deltas, so that a chat resumes where it
stopped, and models whose middle layers a stage runs.

torch and transformers are imported when a function is called, not before. docs/deltas.md has the
guarantees and the supported releases; docs/hf-split.md is about stages.
"""

from mcp_vllm.hf.cache_file import load_cache, save_cache
from mcp_vllm.hf.errors import (
    CacheError,
    DamagedCacheError,
    LibraryError,
    OtherModelError,
    UnsplittableError,
    UnsupportedCacheError,
)
from mcp_vllm.hf.split import split_model
from mcp_vllm.hf.transfer import CachedChat, export_cache, import_cache, snapshot

__all__ = [
    "CacheError",
    "CachedChat",
    "DamagedCacheError",
    "LibraryError",
    "OtherModelError",
    "UnsplittableError",
    "UnsupportedCacheError",
    "export_cache",
    "import_cache",
    "load_cache",
    "save_cache",
    "snapshot",
    "split_model",
]
