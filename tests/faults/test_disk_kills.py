"""Kill -9 at random points under write load: only whole frames, no leak, never over the budget."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import select
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from disk_frames import folder_bytes, frame_of, name_of
from disk_writer import (
    ACK,
    BUDGET_BYTES,
    DISCARDED,
    READY,
    SEGMENT_BYTES,
    STORED,
    write_until_killed,
)

from mcp_vllm.store.disk import DiskStore

KILLS = 100
CHUNKS_A_RUN = 1 << 20
PATIENCE_S = 60.0


@dataclass
class Said:
    """What the killed process said had been done."""

    last_stored: int | None = None
    discarded: set[int] = field(default_factory=set)
    steps: int = 0

    def take(self, body: bytes) -> None:
        for at in range(0, len(body) - ACK.size + 1, ACK.size):
            kind, number = ACK.unpack_from(body, at)
            self.steps += kind != READY
            if kind == STORED:
                self.last_stored = number
            elif kind == DISCARDED:
                self.discarded.add(number)


def pieces(fd: int) -> Iterator[bytes]:
    """What comes through the pipe until its other end is gone; whole acknowledgements."""
    pending = b""
    while True:
        ready, _, _ = select.select([fd], [], [], PATIENCE_S)
        assert ready, f"the writer said nothing for {PATIENCE_S} s"
        piece = os.read(fd, 1 << 16)
        if not piece:
            return
        pending += piece
        whole = len(pending) - len(pending) % ACK.size
        yield pending[:whole]
        pending = pending[whole:]


def run_and_kill(folder: Path, run: int, choose: random.Random) -> Said:
    """One process: ended by itself inside a change to a file, or by us after some steps."""
    spawning = multiprocessing.get_context("fork")
    read_fd, write_fd = os.pipe()
    inside = choose.randrange(1, 400) if run % 2 else 0
    steps = choose.randrange(1, 150)
    writer = spawning.Process(
        target=write_until_killed, args=(str(folder), run, run * CHUNKS_A_RUN, inside, write_fd)
    )
    said = Said()
    try:
        writer.start()
        os.close(write_fd)
        for piece in pieces(read_fd):
            said.take(piece)
            if not inside and said.steps >= steps:
                writer.kill()
        writer.join()
    finally:
        with contextlib.suppress(ValueError):
            writer.kill()
        os.close(read_fd)
    assert writer.exitcode == -9, writer.exitcode
    return said


def check(folder: Path, said: Said, discarded: set[int]) -> int:
    """Open what the killed process left; returns how many chunks it holds."""
    assert folder_bytes(folder) <= BUDGET_BYTES
    store = DiskStore(folder, BUDGET_BYTES, segment_bytes=SEGMENT_BYTES)
    store.check_integrity()
    held = {int.from_bytes(name.key, "big") for name in store}
    frames = store.read(filter(None, map(store.find, store)))
    assert len(frames) == len(held)
    for name, frame in frames.items():
        assert frame is not None, "a frame that is not whole was kept"
        assert frame == frame_of(int.from_bytes(name.key, "big"), len(frame))
    assert not held & discarded
    if said.last_stored is not None:
        assert store.find(name_of(said.last_stored)) is not None
    store.compact()
    size = store.size()
    assert size.file_bytes - size.live_bytes <= SEGMENT_BYTES
    assert folder_bytes(folder) == size.file_bytes
    store.close()
    return len(held)


def test_nothing_is_wrong_or_lost_or_leaked_after_a_hundred_kills(tmp_path: Path) -> None:
    choose = random.Random(5)
    discarded: set[int] = set()
    steps = held = 0
    for run in range(KILLS):
        said = run_and_kill(tmp_path, run, choose)
        discarded |= said.discarded
        held = check(tmp_path, said, discarded)
        steps += said.steps
    assert steps > KILLS
    assert held > 50
    assert discarded
