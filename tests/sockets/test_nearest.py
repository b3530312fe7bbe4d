"""Who brings what of a load: decided here, and seen on real agents."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from simulated import SimulatedEngine, address, key, keys, metric, running_agent, settings, until

from mcp_vllm.agent.link_meter import LinkMeter
from mcp_vllm.agent.nearest import Errand, nearest_first, next_errand


@dataclass(eq=False)
class Holder:
    """What counts of a peer."""

    name: str
    latency_s: float | None = None
    bytes_s: float | None = None
    is_down: bool = False
    plan: SimpleNamespace = field(init=False)

    def __post_init__(self) -> None:
        meter = LinkMeter()
        if self.latency_s is not None:
            meter.note_latency(self.latency_s)
        if self.bytes_s is not None:
            meter.note_payload(int(self.bytes_s), 1.0)
        self.plan = SimpleNamespace(meter=meter)


NEAR, FAR = Holder("z near", 0.0002), Holder("a far", 0.050)
SLIM = Holder("slim", 0.0001, 1e6)


def ordered(*holders: Holder, raw_bytes: int) -> list[Holder]:
    chunks = {b"k": list(holders)}
    nearest_first(chunks, raw_bytes)
    return chunks[b"k"]


def test_the_round_trip_decides_for_a_little_and_the_bandwidth_for_much() -> None:
    assert ordered(FAR, SLIM, NEAR, raw_bytes=10) == [SLIM, NEAR, FAR]
    assert ordered(FAR, SLIM, NEAR, raw_bytes=10 << 20) == [NEAR, FAR, SLIM]


def test_equals_are_taken_in_one_order_for_all_chunks() -> None:
    one, two = Holder("1"), Holder("2")
    chunks = {b"x": [two, one], b"y": [one, two]}
    nearest_first(chunks, 1 << 20)
    assert list(chunks.values()) == [[one, two], [one, two]]


def test_the_front_comes_from_the_nearest_that_has_it_and_the_rest_from_the_next() -> None:
    holders = {0: [NEAR, FAR], 1: [NEAR, FAR], 2: [FAR], 3: [FAR], 4: []}
    first = next_errand(range(5), holders.__getitem__, ())
    assert first == Errand(NEAR, [0, 1])
    second = next_errand([2, 3, 4], holders.__getitem__, [NEAR])
    assert second == Errand(FAR, [2, 3])
    assert next_errand([4], holders.__getitem__, [NEAR, FAR]) is None


def test_who_alone_has_the_front_goes_first_and_leaves_the_rest_to_the_nearer() -> None:
    holders = {0: [FAR], 1: [NEAR, FAR], 2: [NEAR, FAR]}
    assert next_errand(range(3), holders.__getitem__, ()) == Errand(FAR, [0])
    assert next_errand([1, 2], holders.__getitem__, [FAR]) == Errand(NEAR, [1, 2])


def test_what_the_nearest_failed_to_bring_goes_to_the_next_and_who_is_down_is_passed_over() -> None:
    gone = Holder("gone", 0.00001, is_down=True)
    holders = {index: [gone, NEAR, FAR] for index in range(4)}
    assert next_errand(range(4), holders.__getitem__, ()) == Errand(NEAR, [0, 1, 2, 3])
    assert next_errand([1, 3], holders.__getitem__, [NEAR]) == Errand(FAR, [1, 3])


async def test_a_chain_is_brought_by_two_agents_and_its_end_is_left_to_be_computed(
    tmp_path: Path,
) -> None:
    held = {"near": [0, 1], "far": [0, 1, 2, 3]}
    async with contextlib.AsyncExitStack() as stack:
        agents = {}
        for name, numbers in held.items():
            path = tmp_path / name
            agents[name] = await stack.enter_async_context(running_agent(settings(), path))
            engine = stack.enter_context(SimulatedEngine(path))
            await engine.connected()
            for number in numbers:
                engine.fill(number, number)
            await engine.store(keys(*numbers), numbers)
        ours = settings(*map(address, agents.values()))
        here = await stack.enter_async_context(running_agent(ours, tmp_path / "here"))
        asker = stack.enter_context(SimulatedEngine(tmp_path / "here"))
        await asker.connected()
        by_name = {peer.name: peer for peer in here._peers}
        for name, numbers in held.items():
            peer = by_name[address(agents[name])]
            await until(lambda p=peer, n=numbers: p.directory.num_chunks == len(n), "what it has")
            peer.plan.meter.note_latency(0.9 if name == "far" else 0.001)
        asker.prepare("r")
        wanted = keys(*range(5))
        assert await asker.lookup("r", wanted) == [1, 1, 1, 1, 0]
        done = await asker.load("r", wanted, [10, 11, 12, 13, 14])
        assert done.failed == {4}
        assert done.sources == (address(agents["near"]), address(agents["far"]))
        sent = "mcp_agent_sent_chunks_total"
        assert [metric(each, sent) for each in agents.values()] == [2, 2]
        for number in range(4):
            asker.fill(20, number)
            assert asker.payload(10 + number) == asker.payload(20)
        assert key(4) not in {name.key for name in here._context.store}
