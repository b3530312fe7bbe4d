"""A transformers model whose middle layers run at a stage: the tokens of the whole model.

    python examples/hf_split.py                  # starts a stage of layers 4 to 13, and uses it
    python examples/hf_split.py --kill           # two stages; the first dies in mid-sentence
    python examples/hf_split.py --stage HOST:PORT --layers 4:14   # a stage that runs already

The model is Gemma-3-270m unless `--model FOLDER` names another. Both models are greedy and compute
in float32, the stage with vLLM's kernels; the exit code says whether their tokens are the same.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

from mcp_vllm import MCPClient, hf
from mcp_vllm.demo.document import QUESTIONS, research_ship_manual
from mcp_vllm.demo.engines import HOST, Server, default_environment, free_port
from mcp_vllm.demo.weights import ensure_gemma

START_S = 300.0
ANSWER_TOKENS = 48


class Stage:
    """`mcp-vllm stage` as a child process."""

    def __init__(self, model: Path, layers: str, folder: Path) -> None:
        port, http = free_port(), free_port()
        self.address = f"{HOST}:{port}"
        command = [
            sys.executable, "-m", "mcp_vllm.cli.main", "stage", str(model), "--layers", layers,
            "--listen", self.address, "--http", f"{HOST}:{http}", "--kv-bytes", "256MiB",
            "--", "--dtype", "float32", "--max-model-len", "4096",
        ]  # fmt: skip
        log = folder / f"stage-{port}.log"
        self.server = Server("stage", command, http, log, default_environment(), "/healthz")


class AtToken(StoppingCriteria):
    """Does something once, when the text has so many tokens, and never stops it."""

    def __init__(self, length: int, action) -> None:
        self.length, self.action = length, action

    def __call__(self, input_ids, scores, **_) -> torch.Tensor:
        if input_ids.shape[1] == self.length:
            self.action()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: Gemma-3-270m")
    parser.add_argument("--layers", default="4:14", metavar="FIRST:END")
    parser.add_argument("--stage", metavar="HOST:PORT", help="default: start one")
    parser.add_argument("--kill", action="store_true", help="kill -9 of the first of two stages")
    args = parser.parse_args()
    folder = args.model or ensure_gemma()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = f"{research_ship_manual()[:3000]}\n\nQuestion: {QUESTIONS[0]}\nAnswer:"
    prompt = tokenizer(text, return_tensors="pt")
    with stages(args, folder) as running:
        addresses = args.stage or ",".join(each.address for each in running)
        reference, _ = answer(load(folder), prompt)
        with MCPClient(addresses) as client:
            model = hf.split_model(load(folder), args.layers, client)
            print(f"layers {args.layers} run at {addresses}; here are {parameters(model):,} of "
                  f"{parameters(load(folder)):,} parameters")  # fmt: skip
            criteria = []
            if args.kill:
                length = prompt.input_ids.shape[1] + ANSWER_TOKENS // 2
                criteria = [AtToken(length, running[0].server.kill)]
            tokens, seconds = answer(model, prompt, stopping_criteria=criteria)
    print(f"answer in {seconds:.1f} s: {tokenizer.decode(tokens, skip_special_tokens=True)!r}")
    same = tokens == reference
    print(f"the whole model's tokens: {'the same' if same else 'OTHERS'}")
    return 0 if same else 1


@contextlib.contextmanager
def stages(args: argparse.Namespace, folder: Path) -> Iterator[list[Stage]]:
    """The stages that have to be started, ready."""
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = []
        for _ in range(0 if args.stage else 2 if args.kill else 1):
            running.append(Stage(folder, args.layers, logs))
            stack.callback(running[-1].server.stop)
        for each in running:
            each.server.wait_ready(START_S)
        yield running


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def parameters(model) -> int:
    return sum(each.numel() for each in model.parameters())


def answer(model, prompt, **settings) -> tuple[list[int], float]:
    """Tokens of a greedy answer, and the seconds it took."""
    started = time.perf_counter()
    output = model.generate(**prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False, **settings)
    return output[0, prompt.input_ids.shape[1] :].tolist(), time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
