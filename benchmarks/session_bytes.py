"""Bytes on the wire of a chat of ten turns: our deltas against the whole raw cache each turn.

    python benchmarks/session_bytes.py [--model FOLDER] [--codec lossless] [--json FILE]

A manual of about 2,000 tokens, then ten questions, answered greedily by the model itself
(transformers, Gemma-3-270m unless told otherwise). After each turn the cache goes to a peer that
has the turns before. With a lossless codec the peer's cache is compared bit by bit after each turn,
and at the end both answer one more question, with the same tokens or exit code 1. `balanced` and
`small` need the model's calibration (mcp-vllm codec calibrate).

*Full, raw* is what resending keys and values as they lie in memory would take; sliding-window
layers hold their window only. *Delta, raw* is ours without compression: what naming the tokens
that the peer has saves alone.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

sys.path.insert(0, str(Path(__file__).parent))

from setting import describe, one_line

from mcp_vllm import hf
from mcp_vllm.codec import codec_names, get_codec, lossless_names, needs_calibration
from mcp_vllm.codec.calibration import Calibration
from mcp_vllm.demo.document import QUESTIONS, research_ship_manual
from mcp_vllm.demo.weights import ensure_gemma
from mcp_vllm.quality.location import find_calibration

MORE_QUESTIONS = (
    "What is the name of the ship's cat?",
    "What is the name of the cook?",
    "How much lubricating oil does one change take?",
    "What colour is the helmet of the winch driver?",
    "When is the emergency generator tested?",
    "How many bottles of gas are in the room beside the funnel?",
)
LAST_QUESTION = "What is the home port of the ship?"
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Turn:
    """One turn: tokens of the chat so far, bytes of the ways to send it, and times of ours."""

    num_tokens: int
    new_tokens: int
    full_raw_bytes: int
    delta_raw_bytes: int
    wire_bytes: int
    export_ms: float
    import_ms: float


class Chat:
    """The tokens [1, token] of a chat and the cache of all but the last of them."""

    def __init__(self, model, tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.cache = DynamicCache(config=model.config)
        self.token_ids = torch.tensor([[tokenizer.bos_token_id]])

    def read(self, text: str) -> None:
        tokens = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        self.token_ids = torch.cat([self.token_ids, tokens], dim=1)

    def ask(self, question: str) -> str:
        self.read(f"\n\nQuestion: {question}\nAnswer:")
        num_known = self.token_ids.shape[1]
        self.token_ids = self.model.generate(
            self.token_ids,
            past_key_values=self.cache,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            stop_strings=["\n"],
            tokenizer=self.tokenizer,
            pad_token_id=0,
        )
        return self.tokenizer.decode(self.token_ids[0, num_known:]).strip()


def raw_bytes(cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def is_same(ours, theirs) -> bool:
    """Bit for bit."""
    return all(
        torch.equal(a.view(torch.int16), b.view(torch.int16))
        for mine, other in zip(ours.layers, theirs.layers, strict=True)
        for a, b in ((mine.keys, other.keys), (mine.values, other.values))
    )


def run_chat(
    chat: Chat, codec: str, calibration: Calibration | None
) -> tuple[list[Turn], hf.CachedChat]:
    """The turns, and the chat as the peer has it at the end."""
    turns: list[Turn] = []
    base = peer = None
    num_before = 0
    for question in (*QUESTIONS, *MORE_QUESTIONS):
        answer = chat.ask(question)
        print(f"  {question} {answer}")
        given = {"token_ids": chat.token_ids, "base": base, "held": peer}
        started_s = time.perf_counter()
        export = hf.export_cache(
            chat.cache, chat.model, codec=codec, calibration=calibration, **given
        )
        exported_s = time.perf_counter()
        peer = hf.import_cache(
            export, chat.model, base=peer, accept=[codec], calibration=calibration
        )
        imported_s = time.perf_counter()
        if codec in lossless_names() and not is_same(chat.cache, peer.cache):
            raise SystemExit("the peer's cache differs")
        uncompressed = hf.export_cache(chat.cache, chat.model, codec="raw", **given)
        base = hf.snapshot(chat.cache, chat.token_ids)
        num_tokens = chat.token_ids.shape[1]
        turns.append(
            Turn(
                num_tokens=num_tokens,
                new_tokens=num_tokens - num_before,
                full_raw_bytes=raw_bytes(chat.cache),
                delta_raw_bytes=len(uncompressed),
                wire_bytes=len(export),
                export_ms=1e3 * (exported_s - started_s),
                import_ms=1e3 * (imported_s - exported_s),
            )
        )
        num_before = num_tokens
    return turns, peer


def show(turns: list[Turn], codec: str) -> None:
    table = Table(title=f"Bytes on the wire, codec {codec}")
    for column in (
        "turn",
        "tokens",
        "new",
        "full, raw",
        "delta, raw",
        "ours",
        "full / ours",
        "export ms",
        "import ms",
    ):
        table.add_column(column, justify="right")
    for number, turn in enumerate(turns, 1):
        table.add_row(
            str(number),
            f"{turn.num_tokens:,}",
            str(turn.new_tokens),
            f"{turn.full_raw_bytes:,}",
            f"{turn.delta_raw_bytes:,}",
            f"{turn.wire_bytes:,}",
            f"{turn.full_raw_bytes / turn.wire_bytes:.1f}",
            f"{turn.export_ms:.0f}",
            f"{turn.import_ms:.0f}",
        )
    console = Console(width=110)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder in Hugging Face form")
    parser.add_argument("--codec", choices=codec_names(), default="lossless")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    arguments = parser.parse_args()
    folder = arguments.model or ensure_gemma()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = Chat(model, tokenizer)
    chat.read(research_ship_manual())
    calibration = find_calibration(folder) if needs_calibration(arguments.codec) else None
    get_codec(arguments.codec, calibration=calibration)
    turns, peer = run_chat(chat, arguments.codec, calibration)
    show(turns, arguments.codec)
    full = sum(turn.full_raw_bytes for turn in turns)
    wire = sum(turn.wire_bytes for turn in turns)
    print(f"ten turns: {full:,} bytes raw, {wire:,} with our deltas: {full / wire:.2f} times less")

    other = Chat(model, tokenizer)
    other.cache, other.token_ids = peer
    ours, theirs = chat.ask(LAST_QUESTION), other.ask(LAST_QUESTION)
    same = torch.equal(chat.token_ids, other.token_ids)
    print(
        f"next answer here: {ours!r}, at the peer: {theirs!r}, {'same' if same else 'other'} tokens"
    )
    print(one_line())
    if arguments.json:
        figures = {
            "setting": describe(),
            "codec": arguments.codec,
            "turns": [asdict(turn) for turn in turns],
            "full_raw_bytes": full,
            "wire_bytes": wire,
            "ratio": full / wire,
            "same_tokens": same,
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.codec in lossless_names() and not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
