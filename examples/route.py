"""A gateway that sends each turn of a chat where its context is.

    python examples/route.py [--model PATH]

Starts two hosts on this machine (an agent and a `vllm serve` engine each). The gateway, a function
of ten lines here, asks one agent before each turn and takes the engine with the first token
soonest: `mcp_vllm.routing.rank`. The first turn is nobody's and goes to A. The second goes to A,
too, which has the context. For the third, A is said to have a queue of a minute, so it goes to B,
and B fetches what is cheaper to load than to compute.
"""

import argparse
import sys
from collections.abc import Mapping

from rich.console import Console

from mcp_vllm import MCPClient
from mcp_vllm.client import ApiError
from mcp_vllm.demo.ask import ask
from mcp_vllm.demo.document import QUESTIONS, research_ship_manual
from mcp_vllm.demo.pair import SHARED_CORES, running_hosts
from mcp_vllm.demo.weights import ensure_gemma
from mcp_vllm.routing import Ranked, rank

SESSION = "route-example"
MAX_TOKENS = 24
A_MINUTE = 60.0


def best_engine(asked: str, agents: Mapping[str, str], waiting_s: Mapping[str, float]) -> Ranked:
    """What a gateway does for each request: one question to one agent."""
    with MCPClient(f"http://{asked}") as client:
        try:
            placements = client.placements(SESSION)
        except ApiError as error:
            if error.status != 404:
                raise
            placements = []  # a new session
    return rank(placements, agents, asked=asked, waiting_s=waiting_s)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: Gemma-3-270m, fetched and converted")
    args = parser.parse_args()
    console = Console()
    with running_hosts(args.model or ensure_gemma(), "build/route-logs", SHARED_CORES) as (a, b):
        agents = {host.engine_url: host.peer_address for host in (a, b)}
        names = {a.engine_url: "A", b.engine_url: "B"}
        hosts = {host.engine_url: host for host in (a, b)}
        messages: list[dict[str, str]] = []
        taken: list[str] = []
        for turn, question in enumerate(QUESTIONS[:3]):
            manual = f"{research_ship_manual()}\n\n" if turn == 0 else ""
            messages += [{"role": "user", "content": manual + question}]
            waiting_s = {a.engine_url: A_MINUTE} if turn == 2 else {}
            best = best_engine(a.peer_address, agents, waiting_s)
            name = names[best.engine]
            answer = ask(best.engine, messages, MAX_TOKENS, transfer_params={"session_id": SESSION})
            taken.append(name)
            hosts[best.engine].wait_until_stored(SESSION, turns=taken.count(name))
            console.print(
                f"turn {turn + 1} on {name}: it had {best.held_tokens} tokens, and "
                f"{best.cost_s:.2f} s were foreseen; {answer.imported_tokens} of "
                f"{answer.prompt_tokens} prompt tokens imported, first token after "
                f"{answer.ttft_ms:.0f} ms"
            )
            messages += [{"role": "assistant", "content": answer.text}]
    if taken != ["A", "A", "B"]:
        sys.exit(f"the turns went to {taken}")


if __name__ == "__main__":
    main()
