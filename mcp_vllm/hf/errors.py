"""What goes wrong between us and a transformers process, beside a delta's errors."""

from mcp_vllm.errors import McpError


class CacheError(McpError):
    """Root of this package's errors."""


class LibraryError(CacheError):
    """torch or transformers is missing, or of a release outside the supported range."""


class UnsupportedCacheError(CacheError):
    """The cache is of a kind, or in a state, that cannot be exported; the message names it."""


class UnsplittableError(CacheError):
    """The model's layers cannot be split, or not like that; the message says why."""


class DamagedCacheError(CacheError):
    """The bytes are no cache export, or contradict themselves, or are of another version."""


class OtherModelError(CacheError):
    """The export belongs to another model; the message names the first field that differs."""
