"""A chat of a transformers model that stops in one process and goes on in another.

    python examples/hf_resume.py                     # both of these, and compare their answers
    python examples/hf_resume.py --save chat.mcp     # two turns, save, then a third turn
    python examples/hf_resume.py --resume chat.mcp   # the third turn, in a process that starts here

The model is Gemma-3-270m unless `--model FOLDER` names another. Nothing is computed twice: the
resumed process reads the document and the first turns from the file. Answers are greedy, so their
tokens must be the same; the exit code says whether they are.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from mcp_vllm import hf
from mcp_vllm.demo.document import QUESTIONS, research_ship_manual
from mcp_vllm.demo.weights import ensure_gemma


class Chat:
    """A model with the tokens [1, token] of a chat and the cache of all but the last of them."""

    def __init__(self, model_folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_folder)
        self.model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
        self.cache = DynamicCache(config=self.model.config)
        self.token_ids = torch.tensor([[self.tokenizer.bos_token_id]])

    def read(self, text: str) -> None:
        """Append a text to the chat."""
        tokens = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        self.token_ids = torch.cat([self.token_ids, tokens], dim=1)

    def ask(self, question: str) -> list[int]:
        """Append a question and the model's answer; the answer's tokens."""
        self.read(f"\n\nQuestion: {question}\nAnswer:")
        num_known = self.token_ids.shape[1]
        self.token_ids = self.model.generate(
            self.token_ids,
            past_key_values=self.cache,
            max_new_tokens=16,
            do_sample=False,
            stop_strings=["\n"],
            tokenizer=self.tokenizer,
            pad_token_id=0,
        )
        return self.token_ids[0, num_known:].tolist()

    def raw_bytes(self) -> int:
        """What the keys and values take in memory."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    def show(self, question: str, answer: list[int]) -> None:
        print(f"  {question} {self.tokenizer.decode(answer).strip()}")


def save(model_folder: Path, path: Path, document: str) -> list[int]:
    """Two turns, the file, and the answer of a third turn."""
    chat = Chat(model_folder)
    chat.read(document)
    base = None
    for question in QUESTIONS[:2]:
        chat.show(question, chat.ask(question))
        delta = hf.export_cache(chat.cache, chat.model, token_ids=chat.token_ids, base=base)
        base = hf.snapshot(chat.cache, chat.token_ids)
        print(
            f"    {chat.token_ids.shape[1]} tokens, {chat.raw_bytes():,} bytes raw, "
            f"{len(delta):,} bytes to a peer that has the turns before"
        )
    size = hf.save_cache(path, chat.cache, chat.model, token_ids=chat.token_ids)
    print(f"  saved: {chat.raw_bytes():,} bytes raw, {size:,} bytes on disk")
    return third_turn(chat)


def resume(model_folder: Path, path: Path) -> list[int]:
    """The answer of the third turn of a saved chat."""
    chat = Chat(model_folder)
    chat.cache, chat.token_ids = hf.load_cache(path, chat.model)
    print(f"  loaded: {chat.token_ids.shape[1]} tokens, {chat.raw_bytes():,} bytes raw")
    return third_turn(chat)


def third_turn(chat: Chat) -> list[int]:
    answer = chat.ask(QUESTIONS[2])
    chat.show(QUESTIONS[2], answer)
    return answer


def run_both(arguments: argparse.Namespace) -> bool:
    """Save in one process, resume in another; whether their answers are the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "chat.mcp")
        answers = [in_new_process(step, path, arguments) for step in ("--save", "--resume")]
    same = answers[0] == answers[1]
    print(f"third answer: {'identical' if same else 'DIFFERENT'} tokens, {len(answers[0])} of them")
    return same


def in_new_process(step: str, path: str, arguments: argparse.Namespace) -> list[int]:
    print(f"{step[2:]}, in a process of its own:", flush=True)
    command = [sys.executable, __file__, step, path, "--model", str(arguments.model)]
    if arguments.document:
        command += ["--document", str(arguments.document)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    *lines, answer = run.stdout.splitlines()
    print("\n".join(lines))
    return json.loads(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    step = parser.add_mutually_exclusive_group()
    step.add_argument("--save", type=Path, metavar="FILE", help="two turns, save, a third turn")
    step.add_argument("--resume", type=Path, metavar="FILE", help="the third turn of a saved chat")
    parser.add_argument("--model", type=Path, help="a folder in Hugging Face form")
    parser.add_argument("--document", type=Path, help="what to talk about, instead of a manual")
    arguments = parser.parse_args()
    arguments.model = arguments.model or ensure_gemma()
    document = arguments.document.read_text() if arguments.document else research_ship_manual()
    if arguments.save:
        print(json.dumps(save(arguments.model, arguments.save, document)))
    elif arguments.resume:
        print(json.dumps(resume(arguments.model, arguments.resume)))
    elif not run_both(arguments):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
