"""Run a model with its middle layers at a stage, lose the stage in mid-answer, and go on.

    python examples/hybrid_local_cloud.py [--model PATH] [--layers 4:14]

Starts a stage and a `vllm serve` engine that uses it, both on this machine, and asks for a long
answer. After the first words the stage is killed: the engine loads the layers itself, and the
answer goes on. The same question once more is answered from local layers, with the same words.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from mcp_vllm.demo.ask import client_of
from mcp_vllm.demo.engines import Engine, Server, default_environment, free_port
from mcp_vllm.demo.weights import ensure_gemma

LOGS = Path("build/hybrid-logs")
MODEL_LEN = 1024
QUESTION = "List the things that a ship's cook must think of before a long voyage."


def answer(base_url: str) -> Iterator[str]:
    """The pieces of the engine's greedy answer to QUESTION, as they come."""
    client = client_of(base_url)
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=120,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: Gemma-3-270m, fetched and converted")
    parser.add_argument("--layers", default="4:14", help="FIRST:END of the layers at the stage")
    args = parser.parse_args()
    console = Console()
    model = str(args.model or ensure_gemma())
    address, http = f"127.0.0.1:{free_port()}", free_port()
    command = [
        sys.executable, "-m", "mcp_vllm.cli.main", "stage", model, "--layers", args.layers,
        "--listen", address, "--http", f"127.0.0.1:{http}", "--kv-bytes", "256MiB",
        "--", "--max-model-len", str(MODEL_LEN),
    ]  # fmt: skip
    split = json.dumps({"layers": args.layers, "stages": [address]})
    options = ["--mcp-split", split, "--enforce-eager", "--max-model-len", str(MODEL_LEN)]
    with (
        Server(
            "stage", command, http, LOGS / "stage.log", default_environment(), "/healthz"
        ) as stage,
        Engine.start(model, free_port(), options, log_path=LOGS / "engine.log") as engine,
    ):
        with console.status("starting a stage and an engine"):
            engine.wait_ready(600)
        console.print(f"layers {args.layers} run at {address}\n")
        words: list[str] = []
        for word in answer(engine.base_url):
            words.append(word)
            console.print(word, end="", highlight=False)
            if len(words) == 20:
                stage.kill()
                console.print("[the stage is killed]", end="", style="bold red", markup=False)
        again = "".join(answer(engine.base_url))
        console.print("\n\nthe same question again, from local layers: ", end="")
        console.print("the same words" if again == "".join(words) else f"other words: {again}")


if __name__ == "__main__":
    main()
