"""The policies to beat: LRU, LFU, ARC, S3-FIFO and W-TinyLFU, over blocks of equal size.

Each follows its paper: ARC (Megiddo and Modha, FAST '03), S3-FIFO (Yang et al., SOSP '23),
W-TinyLFU (Einziger et al., ACM TOS 2017). All see a request's blocks leaf first, so that a block
leaves before its parent. Used by the benchmark only.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence

from mcp_vllm.cache_bench.frequency_sketch import FrequencySketch


class Policy(ABC):
    """A cache of `capacity` blocks, told of whole requests."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    @abstractmethod
    def __contains__(self, block: int) -> bool: ...

    @abstractmethod
    def access(self, block: int) -> None:
        """Use one block: admit it, or mark it as used."""

    def request(self, blocks: Sequence[int]) -> int:
        """Serve a request, root first; how many leading blocks were there before it."""
        hits = 0
        for block in blocks:
            if block not in self:
                break
            hits += 1
        for block in reversed(blocks):
            self.access(block)
        return hits


class Lru(Policy):
    """Least recently used."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._order

    def access(self, block: int) -> None:
        if block in self._order:
            self._order.move_to_end(block)
            return
        if len(self._order) >= self.capacity:
            self._order.popitem(last=False)
        self._order[block] = None


class Lfu(Policy):
    """Least often used since it came in, the least recently used of equals."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._uses: dict[int, int] = {}
        self._heap: list[tuple[int, int, int]] = []
        self._entry: dict[int, tuple[int, int, int]] = {}
        self._clock = 0

    def __contains__(self, block: int) -> bool:
        return block in self._uses

    def access(self, block: int) -> None:
        if block not in self._uses and len(self._uses) >= self.capacity:
            self._evict()
        self._clock += 1
        self._uses[block] = self._uses.get(block, 0) + 1
        entry = (self._uses[block], self._clock, block)
        self._entry[block] = entry
        heapq.heappush(self._heap, entry)

    def _evict(self) -> None:
        while True:
            entry = heapq.heappop(self._heap)
            if self._entry.get(entry[2]) == entry:
                del self._entry[entry[2]], self._uses[entry[2]]
                return


class Arc(Policy):
    """Adaptive replacement cache."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._once: OrderedDict[int, None] = OrderedDict()
        self._often: OrderedDict[int, None] = OrderedDict()
        self._once_ghosts: OrderedDict[int, None] = OrderedDict()
        self._often_ghosts: OrderedDict[int, None] = OrderedDict()
        self._target = 0.0

    def __contains__(self, block: int) -> bool:
        return block in self._once or block in self._often

    def access(self, block: int) -> None:
        if block in self._once:
            del self._once[block]
            self._often[block] = None
        elif block in self._often:
            self._often.move_to_end(block)
        elif block in self._once_ghosts:
            step = max(1.0, len(self._often_ghosts) / len(self._once_ghosts))
            self._target = min(self._target + step, self.capacity)
            self._replace(in_often_ghosts=False)
            del self._once_ghosts[block]
            self._often[block] = None
        elif block in self._often_ghosts:
            step = max(1.0, len(self._once_ghosts) / len(self._often_ghosts))
            self._target = max(self._target - step, 0.0)
            self._replace(in_often_ghosts=True)
            del self._often_ghosts[block]
            self._often[block] = None
        else:
            self._make_room()
            self._once[block] = None

    def _make_room(self) -> None:
        once = len(self._once) + len(self._once_ghosts)
        total = once + len(self._often) + len(self._often_ghosts)
        if once == self.capacity:
            if len(self._once) < self.capacity:
                self._once_ghosts.popitem(last=False)
                self._replace(in_often_ghosts=False)
            else:
                self._once.popitem(last=False)
        elif total >= self.capacity:
            if total == 2 * self.capacity:
                self._often_ghosts.popitem(last=False)
            self._replace(in_often_ghosts=False)

    def _replace(self, in_often_ghosts: bool) -> None:
        if len(self._once) + len(self._often) < self.capacity:
            return
        once = len(self._once)
        over = once > self._target or (in_often_ghosts and once == int(self._target))
        if once and (over or not self._often):
            self._once_ghosts[self._once.popitem(last=False)[0]] = None
        else:
            self._often_ghosts[self._often.popitem(last=False)[0]] = None


class S3Fifo(Policy):
    """Three FIFO queues: a small one for newcomers, a main one, ghosts."""

    SMALL_SHARE = 0.1
    MAX_USES = 3

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._small_capacity = max(1, round(capacity * self.SMALL_SHARE))
        self._small: OrderedDict[int, int] = OrderedDict()
        self._main: OrderedDict[int, int] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._small or block in self._main

    def access(self, block: int) -> None:
        for queue in (self._small, self._main):
            if block in queue:
                queue[block] = min(queue[block] + 1, self.MAX_USES)
                return
        while len(self._small) + len(self._main) >= self.capacity:
            self._evict()
        if block in self._ghosts:
            del self._ghosts[block]
            self._main[block] = 0
        else:
            self._small[block] = 0

    def _evict(self) -> None:
        if len(self._small) >= self._small_capacity or not self._main:
            self._evict_from_small()
        else:
            self._evict_from_main()

    def _evict_from_small(self) -> None:
        while self._small:
            block, uses = self._small.popitem(last=False)
            if uses <= 1:
                self._ghosts[block] = None
                if len(self._ghosts) > self.capacity - self._small_capacity:
                    self._ghosts.popitem(last=False)
                return
            self._main[block] = 0
        self._evict_from_main()

    def _evict_from_main(self) -> None:
        while True:
            block, uses = self._main.popitem(last=False)
            if not uses:
                return
            self._main[block] = uses - 1


class WTinyLfu(Policy):
    """A small LRU window before a segmented LRU that a frequency sketch guards."""

    WINDOW_SHARE = 0.01
    PROTECTED_SHARE = 0.8

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._window_capacity = max(1, round(capacity * self.WINDOW_SHARE))
        self._main_capacity = capacity - self._window_capacity
        self._protected_capacity = int(self._main_capacity * self.PROTECTED_SHARE)
        self._window: OrderedDict[int, None] = OrderedDict()
        self._probation: OrderedDict[int, None] = OrderedDict()
        self._protected: OrderedDict[int, None] = OrderedDict()
        self._sketch = FrequencySketch(capacity)

    def __contains__(self, block: int) -> bool:
        return block in self._window or block in self._probation or block in self._protected

    def access(self, block: int) -> None:
        self._sketch.add(block)
        if block in self._window:
            self._window.move_to_end(block)
        elif block in self._protected:
            self._protected.move_to_end(block)
        elif block in self._probation:
            self._promote(block)
        else:
            self._window[block] = None
            if len(self._window) > self._window_capacity:
                self._admit(self._window.popitem(last=False)[0])

    def _promote(self, block: int) -> None:
        del self._probation[block]
        self._protected[block] = None
        if len(self._protected) > self._protected_capacity:
            self._probation[self._protected.popitem(last=False)[0]] = None

    def _admit(self, candidate: int) -> None:
        if len(self._probation) + len(self._protected) < self._main_capacity:
            self._probation[candidate] = None
            return
        if not self._main_capacity:
            return
        guarded = self._probation or self._protected
        victim = next(iter(guarded))
        if self._sketch.estimate(candidate) > self._sketch.estimate(victim):
            del guarded[victim]
            self._probation[candidate] = None


CLASSICS: dict[str, type[Policy]] = {
    "LRU": Lru,
    "LFU": Lfu,
    "ARC": Arc,
    "S3-FIFO": S3Fifo,
    "W-TinyLFU": WTinyLfu,
}
