"""SmartCache for the agent's chunks: the one policy of its memory and its disk.

Beside the cache: what chunks are called, how many may be held, whose quota counts, what each saves,
and the file in which what was learned waits for the next agent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from mcp_vllm.errors import McpError
from mcp_vllm.store.policy import Admission
from mcp_vllm.store.smart_cache import SmartCache
from mcp_vllm.store.smart_cache.policy import MAX_TENANTS

if TYPE_CHECKING:
    from mcp_vllm.store.ram import ChunkKey

logger = logging.getLogger(__name__)

# A large store is laid out for chunks of that many bytes on average, a small one for any; of
# smaller ones it holds fewer bytes.
MEAN_CHUNK_BYTES, LEAST_CHUNK_BYTES = 16 << 10, 256
SMALL_BLOCKS, MAX_BLOCKS = 1 << 16, 1 << 22
# SmartCache counts a block's bytes in 32 bits.
MAX_CHUNK_BYTES = (1 << 31) - 1
_SEED = struct.Struct("<Q")

SavedMs = Callable[["ChunkKey"], float]
QuotaOf = Callable[[str], int]


def no_quota(tenant: str) -> int:
    """Every tenant may have all."""
    return 0


def _equal_worth(name: ChunkKey) -> float:
    return 1.0


class PolicyFile(NamedTuple):
    """Where what was learned waits for the next agent, and what it may take there."""

    path: Path
    max_bytes: int


class ChunkPolicy(SmartCache["ChunkKey"]):
    """See the module's docstring. Owned by whoever owns the store's bytes.

    Args:
        quota_of: bytes that a tenant may hold; 0: no quota.
        named: tenants with quotas of their own: theirs hold however many others there are.
        saved_ms_of: prefill time that a chunk saves when it hits.
        file: what `keep` writes and this reads; one that is damaged is not used, with a warning.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        quota_of: QuotaOf = no_quota,
        named: Iterable[str] = (),
        saved_ms_of: SavedMs = _equal_worth,
        file: PolicyFile | None = None,
        max_ghosts: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Names come from outside: nobody may choose ones that collide.
        self._seed = secrets.randbits(64)
        few = min(budget_bytes // LEAST_CHUNK_BYTES + 1, SMALL_BLOCKS)
        num_blocks = min(max(budget_bytes // MEAN_CHUNK_BYTES, few), MAX_BLOCKS)
        super().__init__(
            budget_bytes,
            num_blocks,
            max_ghosts=max_ghosts,
            clock=clock,
            fingerprint=self._fingerprint_of,
        )
        self._quota_of, self._saved_ms_of, self._file = quota_of, saved_ms_of, file
        self._quotas: set[str] = set()
        # "" is the row of those that come when all others are taken.
        for tenant in ("", *named):
            self._learn_quota(tenant)
        if file is not None:
            self._read(file)

    def admit(self, name: ChunkKey, size_bytes: int) -> Admission[ChunkKey]:
        """Offer one chunk: it is kept if it is worth more than what had to leave for it."""
        self._learn_quota(name.tenant)
        self.begin_to_age(name)
        saved_ms = self._saved_ms_of(name)
        return self.offer([name], [size_bytes], [saved_ms], tenant=name.tenant)

    def begin_to_age(self, name: ChunkKey) -> None:
        """Of a chunk that no request was known to use, count its coming as a use: else it would
        stay as young as on its first day."""
        slot = self._slot(name)
        if slot < 0 or not self._state.records["uses"][slot]:
            self.access([name])

    def hold(self, name: ChunkKey, size_bytes: int) -> None:
        """Hold a chunk for which there is room, in the budget and in its tenant's quota."""
        self.insert(name, size_bytes, saved_ms=self._saved_ms_of(name), tenant=name.tenant)

    def evict_over_quota(self, name: ChunkKey, size_bytes: int) -> list[ChunkKey] | None:
        """What has to leave so that its tenant may hold so much more; None: it may not."""
        self._learn_quota(name.tenant)
        return self.evict_of(name.tenant, size_bytes, protected=[name])

    def keep(self) -> None:
        """Write what was learned to the file, if there is one: the next agent goes on with it."""
        if self._file is None:
            return
        path, max_bytes = self._file
        fresh = path.with_suffix(".new")
        try:
            content = _SEED.pack(self._seed) + self.save(max_bytes - _SEED.size)
            fresh.write_bytes(content)
            os.replace(fresh, path)
        except (OSError, McpError) as error:
            logger.warning("%s is not written, the next agent learns anew: %s", path, error)
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)

    def _read(self, file: PolicyFile) -> None:
        path, max_bytes = file
        try:
            if path.stat().st_size > max_bytes:
                raise McpError("it is too large")
            content = path.read_bytes()
            self.restore(content[_SEED.size :])
            (self._seed,) = _SEED.unpack_from(content)
        except FileNotFoundError:
            return
        except (OSError, McpError) as error:
            logger.warning("%s is not used, what was learned is lost: %s", path, error)

    def _learn_quota(self, tenant: str) -> None:
        if tenant in self._quotas or len(self._quotas) >= MAX_TENANTS:
            return
        self._quotas.add(tenant)
        if quota_bytes := self._quota_of(tenant):
            self.set_quota(tenant, quota_bytes)

    def _fingerprint_of(self, name: ChunkKey) -> int:
        # A namespace has one length, and a tenant's name holds no zero byte.
        packed = b"\0".join((name.tenant.encode(), name.namespace, name.key))
        return xxhash.xxh3_64_intdigest(packed, self._seed)
