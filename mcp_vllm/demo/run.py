"""The demo's story: a chat on engine A goes on at engine B, before and after B is restarted."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from mcp_vllm.demo.ask import Answer, ask
from mcp_vllm.demo.document import QUESTIONS, research_ship_manual
from mcp_vllm.demo.engines import quick_dtype_args
from mcp_vllm.demo.pair import SHARED_CORES, START_DEADLINE_S, Host, Pair
from mcp_vllm.demo.quiet import wait_until_quiet

SESSION = {"session_id": "demo-chat"}
# Loads nothing that the engine does not hold itself.
NO_IMPORT = {"max_load_tokens": 0}
WARM_UP_TOKENS = 4
# A person reads an answer before the next turn; the engines come to rest meanwhile.
READING_DEADLINE_S = 10.0
# Where an answer of the small base model ends and it begins to make up the next question.
ANSWER_ENDS = ("\nQuestion:", "\n\n")

console = Console(stderr=True)


@dataclass(frozen=True)
class TurnRow:
    """One line of the table and of demo.json."""

    turn: int
    engine: str
    prompt_tokens: int
    imported_tokens: int
    ttft_ms: float
    raw_bytes: int
    wire_bytes: int


@dataclass
class DemoResult:
    """What the demo found; `tokens_identical` compares A's own turn 4 with both imports.

    `fault`, when not empty, says what the demo failed to show.
    """

    model: str
    turns: list[TurnRow] = field(default_factory=list)
    ttft_ms: dict[str, float] = field(default_factory=dict)
    tokens_identical: bool = False
    answer: str = ""
    fault: str = ""

    def to_dict(self) -> dict[str, object]:
        """The content of demo.json."""
        values = asdict(self)
        del values["answer"], values["fault"]
        return values

    def add(self, turn: int, engine: str, answer: Answer) -> None:
        self.turns.append(
            TurnRow(
                turn,
                engine,
                answer.prompt_tokens,
                answer.imported_tokens,
                round(answer.ttft_ms, 1),
                answer.raw_bytes,
                answer.wire_bytes,
            )
        )


def run_demo(model: str | None, output: Path, max_tokens: int) -> DemoResult:
    """Run the story; logs go to `output`/logs.

    Raises:
        EngineFailed: a server did not start; the message holds its last log lines.
    """
    path: str | Path = model or _gemma()
    started_s = time.monotonic()
    with Pair(output / "logs", SHARED_CORES) as pair:
        with console.status("starting engines A and B (half a minute on two idle cores)"):
            pair.start_engines(path, quick_dtype_args())
        console.print(f"engines A and B are ready after {time.monotonic() - started_s:.0f} s")
        return _Story(pair, path, max_tokens).run()


def _gemma() -> Path:
    from mcp_vllm.demo.weights import ensure_gemma

    return ensure_gemma(progress=sys.stderr.isatty())


class _Story:
    def __init__(self, pair: Pair, model: str | Path, max_tokens: int) -> None:
        self._pair = pair
        self._model = model
        self._max_tokens = max_tokens
        self._result = DemoResult(model=Path(model).name)
        self._messages: list[dict[str, str]] = []

    def run(self) -> DemoResult:
        a, b = self._pair["A"], self._pair["B"]
        for host in (a, b):
            self._warm_up(host)
        for turn in (1, 2, 3):
            self._user_says(turn)
            answer = self._ask(a, SESSION, stop=ANSWER_ENDS)
            self._result.add(turn, "A", answer)
            self._messages.append({"role": "assistant", "content": answer.text})
        self._user_says(4)
        moved = self._ask(b, SESSION)
        self._result.add(4, "B", moved)
        reference = self._ask(a, NO_IMPORT)
        cold = self._ask(b, NO_IMPORT, salt=True)
        self._result.add(4, "B, import off", cold)
        restarted = self._restart_and_ask(b)
        self._result.add(4, "B, restarted", restarted)
        self._conclude(reference, moved, cold, restarted)
        return self._result

    def _conclude(self, reference: Answer, moved: Answer, cold: Answer, restarted: Answer) -> None:
        self._result.answer = moved.text.split(ANSWER_ENDS[0])[0]
        self._result.ttft_ms = {
            "recompute": round(cold.ttft_ms, 1),
            "import": round(moved.ttft_ms, 1),
            "restart": round(restarted.ttft_ms, 1),
        }
        identical = reference.token_ids == moved.token_ids == restarted.token_ids
        self._result.tokens_identical = identical
        if not identical:
            self._result.fault = "B's tokens differ from those that A gives"
        for what, answer in (("the move to B", moved), ("the restart of B", restarted)):
            if not answer.imported_tokens:
                self._result.fault = f"nothing was imported after {what}"

    def _user_says(self, turn: int) -> None:
        text = QUESTIONS[turn - 1]
        if turn == 1:
            text = f"{research_ship_manual()}\n\n{text}"
        self._messages.append({"role": "user", "content": text})

    def _ask(
        self,
        host: Host,
        transfer_params: Mapping[str, object],
        *,
        salt: bool = False,
        stop: Sequence[str] = (),
    ) -> Answer:
        assert host.engine is not None
        console.print(f"turn {len(self._messages) // 2 + 1} at engine {host.name} ...")
        wait_until_quiet(self._pair.servers, READING_DEADLINE_S)
        return ask(
            host.engine.base_url,
            self._messages,
            self._max_tokens,
            transfer_params=transfer_params,
            cache_salt=uuid.uuid4().hex if salt else None,
            stop=stop,
        )

    def _warm_up(self, host: Host) -> None:
        """An engine's first long prompt takes several times as long as the next ones."""
        assert host.engine is not None
        warm_up: Sequence[dict[str, str]] = [
            {"role": "user", "content": research_ship_manual()[::-1]}
        ]
        salt = uuid.uuid4().hex
        ask(
            host.engine.base_url,
            warm_up,
            WARM_UP_TOKENS,
            transfer_params=NO_IMPORT,
            cache_salt=salt,
        )

    def _restart_and_ask(self, host: Host) -> Answer:
        assert host.engine is not None
        host.engine.stop()
        with console.status("restarting engine B; its agent stays"):
            engine = host.start_engine(self._model, quick_dtype_args())
            engine.wait_ready(START_DEADLINE_S)
        self._warm_up(host)
        return self._ask(host, SESSION)
