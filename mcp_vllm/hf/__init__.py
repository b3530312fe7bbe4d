"""Hugging Face caches (`past_key_values`) as files and deltas: a chat resumes where it stopped.

torch and transformers are imported when a function is called, not before. docs/deltas.md has the
guarantees and the supported releases.
"""

from mcp_vllm.hf.cache_file import load_cache, save_cache
from mcp_vllm.hf.errors import (
    CacheError,
    DamagedCacheError,
    LibraryError,
    OtherModelError,
    UnsupportedCacheError,
)
from mcp_vllm.hf.transfer import CachedChat, export_cache, import_cache, snapshot

__all__ = [
    "CacheError",
    "CachedChat",
    "DamagedCacheError",
    "LibraryError",
    "OtherModelError",
    "UnsupportedCacheError",
    "export_cache",
    "import_cache",
    "load_cache",
    "save_cache",
    "snapshot",
]
