"""Bytes on the wire of a chat that changes its engine at every turn, against resending it whole.

    python benchmarks/session_moves.py [--model PATH] [--codec lossless] [--turns 10] [--json F]

Two hosts on this machine (an agent and a `vllm serve` engine each). A manual of about 2,000 tokens
and ten questions; odd turns at A, even ones at B, so each turn needs what the other host computed
since. Counted are the frames that cross between the agents. Beside them: what the context's chunks
take raw, and as byte planes with zstd, if they were sent whole at each turn. At the end both hosts
answer one more question; with a codec without loss their tokens must be the same.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from session_bytes import LAST_QUESTION, MORE_QUESTIONS
from setting import describe, one_line

from mcp_vllm import MCPClient
from mcp_vllm.codec import decode_frame_into, encode_frame, get_codec, lossless_names, read_header
from mcp_vllm.demo.ask import ask, counters
from mcp_vllm.demo.document import QUESTIONS, research_ship_manual
from mcp_vllm.demo.pair import SHARED_CORES, Host, running_hosts
from mcp_vllm.demo.quiet import wait_until_quiet
from mcp_vllm.demo.weights import ensure_gemma
from mcp_vllm.session.archive import ArchiveReader

SESSION = "moves"
ANSWER_TOKENS = 24
QUIET_DEADLINE_S = 30.0
SENT_CHUNKS = "mcp_agent_sent_chunks_total"


@dataclass(frozen=True)
class Turn:
    """One turn; bytes that crossed for it, and what the whole context would have taken."""

    engine: str
    prompt_tokens: int
    imported_tokens: int
    new_raw_bytes: int
    wire_bytes: int
    whole_raw_bytes: int
    whole_zstd_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: Gemma-3-270m")
    parser.add_argument("--codec", default="lossless")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    is_lossless = args.codec in lossless_names()
    codec = {"wire": args.codec, "lossy": [] if is_lossless else [args.codec]}
    console = Console()
    settings = {**SHARED_CORES, "codec": codec}
    model = args.model or ensure_gemma()
    with running_hosts(model, "build/session-moves-logs", settings) as hosts:
        turns, messages = play(hosts, args.turns)
        sent = sum(counters(host.agent_url)[SENT_CHUNKS] for host in hosts)
        answers = [final_tokens(host, messages) for host in hosts]
        with MCPClient(hosts[0].agent_url) as client:
            held = client.session(SESSION).held_chunks
    report(console, turns, args.codec)
    console.print(f"chunks sent: {sent:.0f}; of the session at the end: {held}")
    identical = answers[0] == answers[1]
    console.print(f"both hosts answer the last question alike: {identical}")
    console.print(one_line())
    if args.json:
        figures = {"setting": describe(), "turns": [asdict(turn) for turn in turns]}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    if is_lossless and not identical:
        sys.exit("the tokens differ")


def play(hosts: list[Host], num_turns: int) -> tuple[list[Turn], list[dict[str, str]]]:
    """The turns, and the messages of the chat so far."""
    questions = [*QUESTIONS, *MORE_QUESTIONS][:num_turns]
    messages: list[dict[str, str]] = []
    turns = []
    for number, question in enumerate(questions):
        here, there = hosts[number % 2], hosts[(number + 1) % 2]
        whole_raw, whole_zstd = whole_sizes(there) if number else (0, 0)
        text = question if number else f"{research_ship_manual()}\n\n{question}"
        messages.append({"role": "user", "content": text})
        wait_until_quiet([server for host in hosts for server in host.servers], QUIET_DEADLINE_S)
        answer = ask(
            here.engine_url, messages, ANSWER_TOKENS, transfer_params={"session_id": SESSION}
        )
        messages.append({"role": "assistant", "content": answer.text})
        here.wait_until_stored(SESSION, turns=number // 2 + 1)
        turns.append(
            Turn(
                here.name,
                answer.prompt_tokens,
                answer.imported_tokens,
                answer.raw_bytes if answer.wire_bytes else 0,
                answer.wire_bytes,
                whole_raw,
                whole_zstd,
            )
        )
    return turns, messages


def whole_sizes(host: Host) -> tuple[int, int]:
    """Bytes of the session's chunks at the host: raw, and each as a `zstd` frame."""
    zstd = get_codec("zstd")
    raw_bytes = zstd_bytes = 0
    for frame in exported_frames(host):
        header = read_header(frame, max_raw_size=1 << 30)
        raw = memoryview(bytearray(header.raw_size))
        if not header.lossless:
            raw_bytes += header.raw_size
            continue
        decode_frame_into(frame, raw, key=header.key)
        raw_bytes += header.raw_size
        zstd_bytes += len(encode_frame(header.key, raw, header.layout, zstd))
    return raw_bytes, zstd_bytes


def exported_frames(host: Host) -> Iterator[bytes]:
    with tempfile.TemporaryDirectory() as folder, MCPClient(host.agent_url) as client:
        path = Path(folder) / "session"
        client.export(SESSION, path)
        for archived in ArchiveReader().feed(path.read_bytes()):
            yield archived.frame


def final_tokens(host: Host, messages: list[dict[str, str]]) -> tuple[int, ...]:
    asked = [*messages, {"role": "user", "content": LAST_QUESTION}]
    return ask(host.engine_url, asked, ANSWER_TOKENS).token_ids


def report(console: Console, turns: list[Turn], codec: str) -> None:
    table = Table(title=f"A chat that changes its engine at every turn, codec {codec}; KiB")
    table.add_column("turn")
    names = ("engine", "tokens", "imported", "new, raw", "on the wire", "whole, raw", "whole, zstd")
    for name in names:
        table.add_column(name, justify="right")
    for number, turn in enumerate(turns, start=1):
        sizes = (
            turn.new_raw_bytes,
            turn.wire_bytes,
            turn.whole_raw_bytes,
            turn.whole_zstd_bytes,
        )
        table.add_row(
            str(number),
            turn.engine,
            str(turn.prompt_tokens),
            str(turn.imported_tokens),
            *(f"{size / 1024:,.0f}" for size in sizes),
        )
    console.print(table)
    wire = sum(turn.wire_bytes for turn in turns)
    for name, whole in (
        ("raw", sum(turn.whole_raw_bytes for turn in turns)),
        ("zstd", sum(turn.whole_zstd_bytes for turn in turns)),
    ):
        # Of frames that have lost something there is no telling what zstd would have made.
        if name == "raw" or codec in lossless_names():
            console.print(f"the whole context each turn, {name}: {whole / wire:.1f} times as much")


if __name__ == "__main__":
    main()
