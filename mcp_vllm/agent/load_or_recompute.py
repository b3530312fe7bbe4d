"""Load or recompute: which prefix of a context is worth loading, and when to give a load up.

Pure. The time of a load is the sum of its sources' (our store, then one peer after the other);
that of computing is the engine's `PrefillCost`. What is loaded must be a prefix that every KV cache
group can use: all chunks of full attention, of a sliding window those that cover its end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

from mcp_vllm.link.prefill import PrefillCost

Choice = Literal["load", "partial", "recompute"]

# Once computing was quicker, a load must promise that much less time before it is taken again.
RETURN_GAIN = 0.15
# A load that was begun goes on until it looks so much slower than computing what is left.
GIVE_UP_LOSS = 0.1
# How much longer than computing a request may take because a load was tried: this share of
# computing, and of the lookup's deadline. The rest of both is for noticing it.
SLACK_SHARE, LOOKUP_SHARE = 0.08, 0.5
# Beside the slack, before a transfer that brings nothing counts as stalled; and the share of the
# slack after which what a load itself has shown of its speed counts.
STALL_S = 0.02
PATIENCE = 0.8
# Lengths of prefix that are weighed against each other.
MAX_CUTS = 8
NO_LIMIT = 1 << 60


class Source(Protocol):
    """From where chunks are loaded."""

    def seconds(self, raw_bytes: int, num_chunks: int) -> float:
        """To load chunks of that size together."""
        ...


S = TypeVar("S", bound=Source)


class Run(NamedTuple):
    """Neighbours in a chain, from position `start` to before `stop`."""

    start: int
    stop: int


@dataclass
class ChainGroup(Generic[S]):
    """One KV cache group's chain of a context.

    Attributes:
        tokens: of the context in a chunk.
        window_chunks: how many of them are needed before the end; 0: all from the beginning.
        chunk_bytes: raw size of a chunk.
        sources: where the chunk at each position would come from; None where nobody has it.
        runs: neighbours from one source, without those that nobody has.
    """

    tokens: int
    window_chunks: int
    chunk_bytes: int
    sources: InitVar[Iterable[S | None]]
    runs: list[tuple[Run, S]] = field(default_factory=list)
    _held: list[Run] = field(default_factory=list)

    def __post_init__(self, sources: Iterable[S | None]) -> None:
        stop = 0
        for source, run in itertools.groupby(sources):
            start, stop = stop, stop + sum(1 for _ in run)
            if source is None:
                continue
            self.runs.append((Run(start, stop), source))
            if self._held and self._held[-1].stop == start:
                start = self._held.pop().start
            self._held.append(Run(start, stop))

    def needed(self, end: int) -> Run:
        """The positions that a context of `end` tokens needs."""
        stop = -(-end // self.tokens)
        return Run(max(0, stop - self.window_chunks) if self.window_chunks else 0, stop)

    def last_end(self, limit: int) -> int:
        """The longest context up to `limit` tokens for which everything needed is there, or 0."""
        for held in reversed(self._held):
            end = min(limit, held.stop * self.tokens)
            if end > held.start * self.tokens and self.needed(end).start >= held.start:
                return end
        return 0

    def last_change(self, limit: int) -> int:
        """Where, in a context of `limit` tokens, the run from the last source begins."""
        starts = [run.start * self.tokens for run, _ in self.runs]
        return max((start for start in starts if start < limit), default=0)


@dataclass(frozen=True)
class Decision:
    """What to do with a context of which `reach_tokens` could be loaded.

    Attributes:
        end_tokens: load the prefix up to here; 0: nothing.
        load_s, recompute_s: predicted, to have the context up to its reach: by loading the prefix
            and computing the rest, and by computing all.
    """

    reach_tokens: int
    end_tokens: int
    load_s: float
    recompute_s: float

    @property
    def choice(self) -> Choice:
        if self.end_tokens == 0:
            return "recompute"
        return "load" if self.end_tokens == self.reach_tokens else "partial"


def decide(
    groups: Sequence[ChainGroup[S]], prefill: PrefillCost, *, returning: bool = False
) -> Decision | None:
    """Which prefix to load; None when none can be.

    Args:
        returning: computing was quicker last time, see `RETURN_GAIN`.
    """
    ends = list(_usable_ends(groups))
    if not ends:
        return None
    reach = ends[0]
    recompute_s = prefill.seconds(0, reach)

    def total_s(end: int) -> float:
        return load_seconds(shares(groups, end)) + prefill.seconds(end, reach)

    best = min(ends, key=total_s)
    load_s = total_s(best)
    bound_s = (1 - RETURN_GAIN) * recompute_s if returning else recompute_s
    return Decision(reach, best if load_s <= bound_s else 0, load_s, recompute_s)


def shares(groups: Sequence[ChainGroup[S]], end: int) -> dict[S, tuple[int, int]]:
    """What a context of `end` tokens takes from each source: (raw bytes, chunks)."""
    found: dict[S, tuple[int, int]] = {}
    for group in groups:
        needed = group.needed(end)
        for run, source in group.runs:
            count = min(run.stop, needed.stop) - max(run.start, needed.start)
            if count > 0:
                raw_bytes, chunks = found.get(source, (0, 0))
                found[source] = (raw_bytes + count * group.chunk_bytes, chunks + count)
    return found


def load_seconds(taken: Mapping[S, tuple[int, int]]) -> float:
    return sum(source.seconds(size, chunks) for source, (size, chunks) in taken.items() if chunks)


def _usable_ends(groups: Sequence[ChainGroup[S]]) -> Iterator[int]:
    """The longest prefix that can be used, then the shorter ones up to which one source less is
    needed; each once, at most `MAX_CUTS`."""
    whole = [group for group in groups if not group.window_chunks]
    limit, last = NO_LIMIT, None
    for _ in range(MAX_CUTS):
        end = _usable_end(groups, limit, max(group.tokens for group in whole or groups))
        if end == 0:
            return
        if end != last:
            yield end
        last = end
        limit = max((group.last_change(min(limit, end)) for group in whole), default=0)


def _usable_end(groups: Sequence[ChainGroup[S]], limit: int, step: int) -> int:
    """The last multiple of `step` up to `limit` at which every group has what it needs, or 0."""
    end = limit
    while end > 0:
        before = end
        for group in groups:
            end = group.last_end(end)
        end -= end % step
        if end == before:
            break
    return end


@dataclass(frozen=True)
class Progress:
    """How a load that is under way stands. All in seconds.

    Attributes:
        elapsed_s: since its start.
        idle_s: since anything came.
        remaining_s: until it will be complete, as it looks now.
        rest_s: to compute what has not become usable so far.
        all_s: to compute everything that it was to bring.
        is_sure: `remaining_s` rests on what was measured before this load; what its first packets
            say is believed only when most of the slack is gone.
    """

    elapsed_s: float
    idle_s: float
    remaining_s: float
    rest_s: float
    all_s: float
    is_sure: bool


def slack_s(all_s: float, lookup_s: float) -> float:
    """How much longer than computing a request may take because a load was tried."""
    return SLACK_SHARE * all_s + LOOKUP_SHARE * lookup_s


def should_give_up(progress: Progress, slack: float) -> bool:
    """Whether computing the rest is the better way from here on.

    Three reasons: the load looks slower than computing what is left; to wait longer would exceed
    the slack, and the end is not in sight; nothing comes any more.
    """
    p = progress
    settled = p.is_sure or p.elapsed_s > PATIENCE * slack
    slower = p.remaining_s > (1 + GIVE_UP_LOSS) * p.rest_s
    late = p.elapsed_s + p.rest_s > p.all_s + slack
    in_sight = p.elapsed_s + (1 + GIVE_UP_LOSS) * p.remaining_s <= p.all_s + slack
    stalled = p.idle_s > slack + STALL_S
    return (settled and slower) or (late and not in_sight) or stalled
