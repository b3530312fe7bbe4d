"""Chunks that a tenant's request used and another tenant's request had stored.

An engine computes and stores a chunk once, whichever tenant came first: its own caches know no
tenants, only `cache_salt`. The second tenant's request had the content from there, so when it ends
the chunk becomes that tenant's, too; or its session would have holes, and show that somebody else
has the same content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.reader import Reader
from mcp_vllm.codec import CodecError
from mcp_vllm.codec.loss import is_acceptable
from mcp_vllm.security.seals import is_sealed
from mcp_vllm.store.ram import Chunk, ChunkKey


def use(
    context: AgentContext,
    reader: Reader,
    namespace: bytes,
    chains: Sequence[Sequence[bytes]],
    output_tokens: int,
    since_s: float,
) -> list[ChunkKey]:
    """A request that came at `since_s` has ended with these chains: they were used just now, and
    are its tenant's own.

    Returns those of others that have to be sealed anew first: for `seal_anew`.
    """
    sealed = []
    for chain in chains:
        names = []
        for key in chain:
            name = context.readable(reader, namespace, key)
            other = None if name is not None else _of_another(context, reader, namespace, key)
            chunk = context.store.get(other) if other is not None else None
            if other is not None and chunk is not None:
                if chunk.frame is not None and is_sealed(chunk.frame):
                    sealed.append(other)
                else:
                    name = _adopt(context, reader, other, chunk)
            names.append(name or reader.own(namespace, key))
        context.tiers.touch(names, num_output_tokens=output_tokens, since_s=since_s)
    return sealed


async def seal_anew(context: AgentContext, reader: Reader, names: Sequence[ChunkKey]) -> None:
    """Make other tenants' sealed chunks the reader's own, as far as they open here."""
    tenant = reader.tenants[0]
    for name in names:
        chunk = context.store.get(name)
        if chunk is None or chunk.frame is None:
            continue
        try:
            frame = await context.in_pool(
                context.seals.reseal, chunk.frame, name.namespace, name.tenant, tenant, chunk.loss
            )
        except CodecError:
            continue
        _adopt(context, reader, name, replace(chunk, frame=frame))


def _of_another(
    context: AgentContext, reader: Reader, namespace: bytes, key: bytes
) -> ChunkKey | None:
    for holder in context.store.tenants.holders(namespace, key):
        name = ChunkKey(namespace, key, holder)
        chunk = context.store.get(name)
        if chunk is not None and is_acceptable(chunk.loss, reader.lossy):
            return name
    return None


def _adopt(context: AgentContext, reader: Reader, name: ChunkKey, chunk: Chunk) -> ChunkKey | None:
    own = reader.own(name.namespace, name.key)
    return own if context.store.put(own, replace(chunk)) else None
