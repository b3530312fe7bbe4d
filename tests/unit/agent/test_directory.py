"""The directory's two ends without a socket: whatever happens between them, the reader ends with
the sender's own state, or knows that it has none."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_vllm.agent import announcer as announcer_module
from mcp_vllm.agent import directory_wire
from mcp_vllm.agent.announcer import Announcer
from mcp_vllm.agent.chunk_set import CHANGE_WEIGHT, hash_keys
from mcp_vllm.agent.directory_view import DirectoryGap, DirectoryTooLarge, DirectoryView
from mcp_vllm.agent.directory_wire import (
    MAX_HASHES,
    About,
    Beat,
    Changes,
    Entries,
    Follow,
    Message,
    SessionNews,
    SessionState,
    Slice,
    Start,
    Whole,
    session_hash,
)
from mcp_vllm.agent.wire import WIRE_VERSION, WireError
from mcp_vllm.codec import ChunkLayout
from mcp_vllm.codec.loss import EXACT, LOSSES, rank
from mcp_vllm.errors import McpError
from mcp_vllm.security.seals import Seals
from mcp_vllm.session.manifest import SessionKey, SessionRegistry
from mcp_vllm.store.ram import Chunk, ChunkKey, RamStore
from mcp_vllm.store.tiers import Tiers

NAMESPACES = (b"a" * 16, b"b" * 16)
PLENTY = 1_000_000
# Keys of tenants.
SEALED = {"acme": "k1", "globex": "k2"}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_wire, "BEAT_S", 0)
    monkeypatch.setattr(announcer_module, "BATCH_S", 0)


def agent(
    agent_id: str = "one",
    store: RamStore | None = None,
    sessions: SessionRegistry | None = None,
) -> SimpleNamespace:
    """What an announcer needs of its context, and the store that its tiers are made of."""
    store = RamStore(1 << 26) if store is None else store
    return SimpleNamespace(
        agent_id=agent_id,
        store=store,
        sessions=SessionRegistry(1000) if sessions is None else sessions,
        tiers=Tiers(store),
        seals=Seals(),
        fingerprints={},
        prefills={},
        config=SimpleNamespace(codec=SimpleNamespace(name="zstd")),
        sealed_by=lambda name, chunk: SEALED.get(name.tenant, ""),
        codecs=SimpleNamespace(sending_speeds=lambda namespace: {}),
    )


def chunk(loss: str = EXACT) -> Chunk:
    return Chunk(ChunkLayout("u8"), 8, raw=np.zeros(8, dtype=np.uint8), loss=loss)


def name(number: int, namespace: bytes = NAMESPACES[0]) -> ChunkKey:
    return ChunkKey(namespace, number.to_bytes(8, "big"))


def truth(store: RamStore, namespace: bytes) -> dict[int, int]:
    names = [each for each in store if each.namespace == namespace]
    hashes = hash_keys([each.key for each in names]).tolist()
    ranks = [rank(store.get(each).loss) for each in names]
    return dict(zip(hashes, ranks, strict=True))


def session(number: int) -> SessionKey:
    return SessionKey("acme", f"chat {number}")


def take_turn(sessions: SessionRegistry, number: int) -> None:
    sessions.record_turn(session(number), NAMESPACES[0], [[b"k"]], 16 * number, now_s=0.0)


def told_of(view: DirectoryView) -> dict[int, SessionState]:
    """Session -> what the view says of it."""
    states = {number: view.session(session_hash(session(number))) for number in range(31)}
    return {number: state for number, state in states.items() if state is not None}


def true_of(sessions: SessionRegistry) -> dict[int, SessionState]:
    manifests = {number: sessions.get(session(number)) for number in range(31)}
    return {n: SessionState(m.turns, m.num_tokens) for n, m in manifests.items() if m is not None}


def read(packed: bytes) -> Message:
    size = directory_wire.body_size(packed[:4])
    assert size == len(packed) - 4
    return directory_wire.unpack(packed[4:])


class Reader:
    """What a link does with a view, one message at a time; `sender` may be replaced."""

    def __init__(self, sender: Announcer, max_entries: int = PLENTY) -> None:
        self.view = DirectoryView(lambda: max_entries)
        self.sender = sender
        self.stream: AsyncIterator[bytes] | None = None
        self.taken: list[Message] = []

    async def step(self, lose: bool = False) -> Message:
        if self.stream is None:
            self.stream = self.sender.stream(self.view.follow())
        try:
            message = read(await anext(self.stream))
            self.taken.append(message)
            if not lose:
                self.view.apply(message)
        except McpError:
            await self.cut()
            raise
        return message

    async def cut(self) -> None:
        if self.stream is not None:
            await self.stream.aclose()
        self.stream = None

    async def settle(self) -> None:
        """Read until nothing is new; gaps are made up for."""
        for _ in range(500):
            try:
                message = await self.step()
            except McpError:
                continue
            pending = self.sender._pending or self.sender._pending_sessions
            if message == Beat(self.sender.seq) and not pending:
                return
        raise AssertionError("it never settles")


NUMBERS = st.integers(0, 30)
STEP = st.one_of(
    st.tuples(st.just("put"), NUMBERS, st.sampled_from(LOSSES)),
    st.tuples(st.just("discard"), NUMBERS, st.just("")),
    st.tuples(st.sampled_from(["turn", "forget"]), NUMBERS, st.just("")),
    st.tuples(st.just("flush"), st.just(0), st.just("")),
    st.tuples(st.sampled_from(["read", "lose"]), st.integers(1, 4), st.just("")),
    st.tuples(st.sampled_from(["cut", "restart", "restart empty"]), st.just(0), st.just("")),
)


async def walk(steps, log_bytes: int) -> None:
    store = RamStore(1 << 26)
    sessions = SessionRegistry(1000)
    sender = Announcer(agent(store=store, sessions=sessions), log_bytes)
    sender.start()
    reader = Reader(sender)
    for position, (what, number, loss) in enumerate(steps):
        match what:
            case "put":
                store.put(name(number, NAMESPACES[number % 2]), chunk(loss))
            case "discard":
                store.discard(name(number, NAMESPACES[number % 2]))
            case "turn":
                take_turn(sessions, number)
            case "forget":
                sessions.remove(session(number))
            case "flush":
                await asyncio.sleep(0)
            case "read" | "lose":
                for _ in range(number):
                    try:
                        await reader.step(lose=what == "lose")
                    except McpError:
                        assert not reader.view.is_whole, "it is believed after a fault"
            case "cut":
                await reader.cut()
            case _:
                await reader.cut()
                sender.close()
                store = store if what == "restart" else RamStore(1 << 26)
                sessions = sessions if what == "restart" else SessionRegistry(1000)
                sender = Announcer(agent(f"life {position}", store, sessions), log_bytes)
                sender.start()
                reader.sender = sender
    await reader.settle()
    assert reader.view.is_whole
    assert reader.view.agent_id == sender._context.agent_id
    for namespace in NAMESPACES:
        assert reader.view.ranks(namespace) == truth(store, namespace)
    assert told_of(reader.view) == true_of(sessions)
    await reader.cut()
    assert not sender.num_followers
    sender.close()


@settings(deadline=None, max_examples=150)
@given(st.lists(STEP, max_size=60), st.sampled_from([40, 300, 1 << 20]))
def test_any_interleaving_ends_with_the_peers_own_state(steps, log_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory_wire, "BEAT_S", 0)
        patch.setattr(announcer_module, "BATCH_S", 0)
        asyncio.run(walk(steps, log_bytes))


async def test_half_a_snapshot_is_not_completed_by_another_or_without_its_other_half() -> None:
    await walk([("read", 1, ""), ("restart", 0, ""), ("lose", 1, "")], 40)
    await walk([("put", 0, ""), ("read", 1, ""), ("lose", 1, "")], 40)


async def synced(store: RamStore | None = None, **how: int) -> tuple[Announcer, Reader]:
    sender = Announcer(agent(store=store), **how)
    sender.start()
    reader = Reader(sender)
    await reader.settle()
    return sender, reader


async def test_who_was_away_for_a_moment_is_told_the_changes_only() -> None:
    sender, reader = await synced()
    await reader.cut()
    sender._context.store.put(name(1), chunk())
    reader.taken.clear()
    await reader.settle()
    assert reader.taken[0] == Start("one", 0, True)
    assert not [each for each in reader.taken if isinstance(each, Slice | Whole)]
    assert reader.view.ranks(NAMESPACES[0]) == truth(sender._context.store, NAMESPACES[0])


async def test_who_is_too_far_behind_gets_a_snapshot_and_the_log_stays_small() -> None:
    sender, reader = await synced(log_bytes=500)
    for number in range(300):
        sender._context.store.put(name(number), chunk())
        sender._flush()
        assert sender._held_bytes <= 500
    reader.taken.clear()
    await reader.settle()
    # What it says of itself comes before its chunks: they are found the moment that they are whole.
    assert [type(each) for each in reader.taken][:4] == [Start, About, Slice, Whole]
    assert reader.view.ranks(NAMESPACES[0]) == truth(sender._context.store, NAMESPACES[0])


async def test_a_commit_of_many_chunks_is_one_message_and_a_great_many_are_several() -> None:
    sender, reader = await synced()
    for number in range(50):
        sender._context.store.put(name(number), chunk())
    await reader.settle()
    assert sender.seq == 1
    for number in range(50, 50 + 2 * MAX_HASHES + 1):
        sender._context.store.put(name(number), chunk())
    await reader.settle()
    assert sender.seq == 4
    assert len(reader.view.ranks(NAMESPACES[0])) == 51 + 2 * MAX_HASHES


async def test_a_large_store_is_told_in_slices_of_bounded_size() -> None:
    store, one = RamStore(1 << 26), chunk()
    for number in range(3 * MAX_HASHES + 5):
        store.put(name(number), one)
    _, reader = await synced(store)
    slices = [each for each in reader.taken if isinstance(each, Slice)]
    assert len(slices) == 4
    assert reader.view.num_chunks == 3 * MAX_HASHES + 5


async def test_what_has_lost_detail_is_found_by_those_who_accept_it_only() -> None:
    store = RamStore(1 << 26)
    for number, loss in enumerate(LOSSES):
        store.put(name(number), chunk(loss))
    _, reader = await synced(store)
    hashes = hash_keys([name(number).key for number in range(5)])

    def found(*lossy: str) -> list[int]:
        return reader.view.find(NAMESPACES[0], hashes, lossy).astype(int).tolist()

    assert found() == [1, 0, 0, 0, 0]
    assert found("balanced") == [1, 0, 1, 0, 0]
    assert found(*LOSSES[1:]) == [1, 1, 1, 1, 0]
    store.put(name(3), chunk())
    await reader.settle()
    assert found() == [1, 0, 0, 1, 0]
    assert not reader.view.find(NAMESPACES[1], hashes, ()).any()


async def test_tenants_chunks_are_found_by_their_own_hash_and_by_who_has_the_key() -> None:
    store, key = RamStore(1 << 26), b"the same key"
    for tenant in ("acme", "plain"):
        store.put(ChunkKey(NAMESPACES[0], key, tenant), chunk("balanced"))
    _, reader = await synced(store)

    def found(tenant: str, *opens: str, lossy: tuple[str, ...] = ("balanced",)) -> bool:
        hashes = hash_keys([key], tenant)
        return bool(reader.view.find(NAMESPACES[0], hashes, lossy, opens)[0])

    assert found("plain")
    assert not found("plain", "k1"), "with a key, what is not sealed is not accepted"
    assert found("acme", "k0", "k1")
    assert not found("acme", "k1", lossy=())
    assert not found("acme")
    assert not found("acme", "k2")
    assert not found("globex", "k2")
    assert not found("default")
    store.put(ChunkKey(NAMESPACES[0], key, "globex"), chunk())
    store.discard(ChunkKey(NAMESPACES[0], key, "acme"))
    await reader.settle()
    assert found("globex", "k2")
    assert not found("acme", "k1")


async def test_every_follower_is_told_and_none_stays_after_the_end() -> None:
    sender, first = await synced()
    second = Reader(sender)
    await second.settle()
    sender._context.store.put(name(1), chunk())
    await first.settle()
    await second.settle()
    assert first.view.ranks(NAMESPACES[0]) == second.view.ranks(NAMESPACES[0]) != {}
    sender.close()
    async with aclosing(first.stream) as rest:
        assert len([each async for each in rest]) <= 1
    await second.cut()
    assert not sender.num_followers


# ---- senders that break the protocol --------------------------------------------------------

N = NAMESPACES[0]
TOLD = [Start("x", 5, False), Slice([Entries(N, [bytes(8)])]), Whole(5, 1)]
BAD = {
    "changes before the start": ([Changes(1, [])], WireError),
    "a beat before the start": ([Beat(0)], WireError),
    "a slice before the start": ([Slice([])], WireError),
    "an end of nothing": ([Whole(0, 0)], WireError),
    "an end of another snapshot": ([*TOLD[:2], Whole(6, 1)], WireError),
    "sessions left out": ([*TOLD[:2], Whole(5, 1, 1)], DirectoryGap),
    "a slice left out": ([*TOLD[:2], Whole(5, 2)], DirectoryGap),
    "changes in the snapshot": ([*TOLD[:2], Changes(6, [])], WireError),
    "a slice after the snapshot": ([*TOLD, Slice([])], WireError),
    "a change left out": ([*TOLD, Changes(7, [])], DirectoryGap),
    "a change twice": ([*TOLD, Changes(6, []), Changes(6, [])], DirectoryGap),
    "a beat that knows more": ([*TOLD, Beat(6)], DirectoryGap),
    "going on with another life": ([*TOLD, Start("y", 5, True)], WireError),
    "going on elsewhere": ([*TOLD, Start("x", 6, True)], DirectoryGap),
    "going on with nothing": ([Start("x", 0, True)], WireError),
    "more namespaces than there are": (
        [*TOLD, *(Changes(6 + n, [Entries(b"%d" % n, [bytes(8)])]) for n in range(256))],
        DirectoryTooLarge,
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_breaks_the_protocol_is_refused_and_all_is_forgotten(what: str) -> None:
    messages, error = BAD[what]
    view = DirectoryView(lambda: PLENTY)
    for message in messages[:-1]:
        view.apply(message)
    with pytest.raises(error):
        view.apply(messages[-1])
    assert not view.is_whole
    assert view.follow() == Follow(WIRE_VERSION)
    assert not view.find(N, np.zeros(1, dtype=np.uint64), ()).any()


def test_namespaces_whose_chunks_are_gone_make_room_for_others() -> None:
    view = DirectoryView(lambda: PLENTY)
    for message in TOLD:
        view.apply(message)
    for n in range(1000):
        of_one = b"%d" % n
        view.apply(Changes(6 + 2 * n, [Entries(of_one, [bytes(8)])]))
        view.apply(Changes(7 + 2 * n, [Entries(of_one, [], bytes(8))]))
    assert view.is_whole


@pytest.mark.parametrize("in_changes", [True, False])
def test_a_flood_is_cut_off_at_the_peers_share(in_changes: bool) -> None:
    view = DirectoryView(lambda: 100_000)
    view.apply(Start("x", 0, False))
    if in_changes:
        view.apply(Whole(0, 0))

    def flood() -> None:
        for n in range(200):
            hashes = np.arange(MAX_HASHES, dtype=np.uint64) + np.uint64(n * MAX_HASHES)
            entries = [Entries(b"%d" % n, [directory_wire.to_wire(hashes)])]
            view.apply(Changes(n + 1, entries) if in_changes else Slice(entries))
            assert view.weight <= 100_000

    with pytest.raises(DirectoryTooLarge):
        flood()
    assert view.weight == 0


def test_changes_that_are_not_merged_count_at_their_price() -> None:
    view = DirectoryView(lambda: 100 * CHANGE_WEIGHT)
    view.apply(Start("x", 0, False))
    with pytest.raises(DirectoryTooLarge):
        view.apply(Slice([Entries(b"%d" % n, [bytes(range(n, n + 8))]) for n in range(101)]))


@pytest.mark.parametrize(
    "message",
    [
        Changes(1, [Entries(N, [b"123"])]),
        Changes(1, [Entries(N, [], b"123456789")]),
        Changes(1, [Entries(N, [bytes(8)] * 249)]),
        Slice([Entries(N, [bytes(8 * MAX_HASHES), bytes(8)])]),
        Slice([Entries(bytes(65), [])]),
        Slice([], SessionNews(bytes(15))),
        Slice([], SessionNews(b"", bytes(9))),
        Changes(1, [], SessionNews(bytes(16 * 4096), bytes(8))),
        About("", {n.to_bytes(2, "big"): {} for n in range(257)}, []),
        About("", {}, [], tuple(map(str, range(63)))),
    ],
)
def test_a_message_beyond_the_bounds_is_refused(message: Message) -> None:
    with pytest.raises(WireError):
        read(directory_wire.pack(message))


@given(st.binary(max_size=300))
def test_bytes_that_are_no_message_are_refused_and_nothing_else(body: bytes) -> None:
    with pytest.raises(WireError):
        directory_wire.unpack(b"\x92\xa6change" + body)


def test_a_length_that_no_message_has_is_refused() -> None:
    with pytest.raises(WireError):
        directory_wire.body_size(b"\xff\xff\xff\xff")


def test_what_proved_not_to_be_there_is_not_offered_again() -> None:
    view = DirectoryView(lambda: PLENTY)
    hashes = hash_keys([b"1", b"2"])
    view.apply(Start("x", 0, False))
    view.apply(Slice([Entries(N, [directory_wire.to_wire(hashes)])]))
    view.apply(Whole(0, 2))
    view.drop(N, hashes[:1])
    assert view.find(N, hashes, ()).tolist() == [False, True]
    view.drop(b"unknown", hashes)
    view.apply(Changes(1, [Entries(N, [directory_wire.to_wire(hashes[:1])])]))
    assert view.find(N, hashes, ()).all()
