"""Fork a chat: two continuations of one context, whose blocks are held once.

    python examples/session_fork.py [--model PATH]

Starts one host (an agent and a `vllm serve` engine), holds a turn, forks the session with
`MCPClient.fork`, and asks a different question in each of the two.
"""

import argparse
import sys

from rich.console import Console

from mcp_vllm import MCPClient
from mcp_vllm.demo.ask import ask
from mcp_vllm.demo.document import QUESTIONS, research_ship_manual
from mcp_vllm.demo.pair import SHARED_CORES, running_hosts
from mcp_vllm.demo.weights import ensure_gemma

MAX_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: Gemma-3-270m, fetched and converted")
    args = parser.parse_args()
    console = Console()
    model = args.model or ensure_gemma()
    with running_hosts(model, "build/session-fork-logs", SHARED_CORES, ("A",)) as (host,):
        messages = [{"role": "user", "content": f"{research_ship_manual()}\n\n{QUESTIONS[0]}"}]
        first = ask(host.engine_url, messages, MAX_TOKENS, transfer_params={"session_id": "trunk"})
        host.wait_until_stored("trunk")
        messages.append({"role": "assistant", "content": first.text})
        with MCPClient(host.agent_url) as client:
            before = client.session("trunk")
            client.fork("trunk", "branch")
            for session_id, question in (("trunk", QUESTIONS[1]), ("branch", QUESTIONS[2])):
                asked = [*messages, {"role": "user", "content": question}]
                answer = ask(
                    host.engine_url, asked, MAX_TOKENS, transfer_params={"session_id": session_id}
                )
                host.wait_until_stored(session_id, turns=2)
                console.print(f"{session_id}: {question!r} -> {answer.text.strip()[:60]!r}")
            sessions = {each.session_id: each for each in client.sessions()}
        for each in sessions.values():
            console.print(f"{each.session_id}: {each.turns} turns, {each.held_chunks} chunks")
        if len(sessions) != 2 or any(each.turns != 2 for each in sessions.values()):
            sys.exit("a fork was lost")
        console.print(f"both began with the same {before.held_chunks} chunks, held once")


if __name__ == "__main__":
    main()
