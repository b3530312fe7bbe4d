"""Drain a host before it is shut down: its chats go on elsewhere without a new prefill.

    python examples/drain.py [--model PATH]

Starts two hosts on this machine, holds three chats on A, drains A's agent with `MCPClient.drain`,
stops host A, and goes on with the chats on B.
"""

import argparse
import sys

from rich.console import Console

from mcp_vllm import MCPClient
from mcp_vllm.demo.ask import ask
from mcp_vllm.demo.document import QUESTIONS, research_ship_manual
from mcp_vllm.demo.pair import SHARED_CORES, running_hosts
from mcp_vllm.demo.weights import ensure_gemma

CHATS = 3
MAX_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: Gemma-3-270m, fetched and converted")
    args = parser.parse_args()
    console = Console()
    with running_hosts(args.model or ensure_gemma(), "build/drain-logs", SHARED_CORES) as (a, b):
        chats = {}
        for number in range(CHATS):
            text = f"Ship {number + 1}. {research_ship_manual()[:4000]}\n\n{QUESTIONS[0]}"
            messages = [{"role": "user", "content": text}]
            session = {"session_id": f"chat-{number + 1}"}
            answer = ask(a.engine_url, messages, MAX_TOKENS, transfer_params=session)
            a.wait_until_stored(session["session_id"])
            messages.append({"role": "assistant", "content": answer.text})
            chats[session["session_id"]] = messages
        with MCPClient(a.agent_url) as client:
            for step in client.drain():
                console.print(f"{step.done} of {step.total}: {step.session_id} -> {step.to}")
        a.stop()
        console.print("host A is stopped")
        for session_id, messages in chats.items():
            asked = [*messages, {"role": "user", "content": QUESTIONS[1]}]
            params = {"session_id": session_id}
            answer = ask(b.engine_url, asked, MAX_TOKENS, transfer_params=params)
            console.print(
                f"{session_id} on B: {answer.imported_tokens} of {answer.prompt_tokens} prompt "
                f"tokens were there, first token after {answer.ttft_ms:.0f} ms"
            )
            if not answer.imported_tokens:
                sys.exit("a chat's context was lost")


if __name__ == "__main__":
    main()
