"""The connector's way to KV blocks at the stage (vllm_plugin/remote_layers.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from vllm.v1.kv_cache_interface import KVCacheConfig

from mcp_vllm.split.engine.support import SplitUnsupported
from mcp_vllm.split.link import Link
from mcp_vllm.split.wire import MAX_KV_BYTES, KvBlocks
from mcp_vllm.vllm_plugin.layout import layer_specs
from mcp_vllm.vllm_plugin.remote_layers import Pages, RemoteLayers


class StagePages:
    """`RemotePages`, for the executor's thread: between steps, or before their activations.

    Args:
        link: to the stage that has the layers now. Raises StageLost: there is none.
    """

    def __init__(self, link: Callable[[], Link], page_bytes: int) -> None:
        self._link = link
        self._page_bytes = page_bytes

    def read(self, layers: Sequence[str], blocks: Sequence[int]) -> Pages:
        pages = np.empty((len(layers), len(blocks), self._page_bytes), np.uint8)
        for part in self._parts(layers, blocks):
            target = pages[:, part]
            wanted = KvBlocks(list(layers), list(blocks[part]))
            received = self._link().read_kv(wanted, target.size)
            target[:] = np.frombuffer(received, np.uint8).reshape(target.shape)
        return pages

    def write(self, layers: Sequence[str], blocks: Sequence[int], pages: Pages) -> None:
        for part in self._parts(layers, blocks):
            given = KvBlocks(list(layers), list(blocks[part]))
            self._link().write_kv(given, memoryview(np.ascontiguousarray(pages[:, part])).cast("B"))

    def _parts(self, layers: Sequence[str], blocks: Sequence[int]) -> Iterator[slice]:
        """As many blocks as fit into a message."""
        most = MAX_KV_BYTES // (len(layers) * self._page_bytes)
        for start in range(0, len(blocks), most):
            yield slice(start, start + most)


def remote_layers(
    here: KVCacheConfig, there: KVCacheConfig, link: Callable[[], Link]
) -> RemoteLayers:
    """What a host chunk needs to have of the layers `there`. Raises SplitUnsupported."""
    groups = []
    for ours, theirs in zip(here.kv_cache_groups, there.kv_cache_groups, strict=True):
        if theirs.layer_names and not ours.layer_names:
            raise SplitUnsupported(
                f"with a KV connector one of the layers like {theirs.layer_names[0]} must stay "
                "local: choose other layers"
            )
        groups.append(tuple(theirs.layer_names))
    sizes = {
        spec.page_size_bytes
        for config in (here, there)
        for spec in layer_specs(config.kv_cache_groups).values()
    }
    if len(sizes) != 1:
        raise SplitUnsupported("a KV connector, with layers whose KV pages differ in size")
    (page_bytes,) = sizes
    if page_bytes * max(map(len, groups), default=0) > MAX_KV_BYTES:
        raise SplitUnsupported("a KV connector, with so large KV pages of so many remote layers")
    return RemoteLayers(tuple(groups), page_bytes, StagePages(link, page_bytes))
