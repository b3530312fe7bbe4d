"""Move a chat from one host to another before its next turn.

    python examples/session_move.py [--model PATH]

Starts two hosts on this machine (an agent and a `vllm serve` engine each), holds a turn on A, moves
the session to B with `MCPClient.move`, and asks the next turn there: B has the context already when
the request arrives, so nothing travels while the user waits.
"""

import argparse
import sys

from rich.console import Console

from mcp_vllm import MCPClient
from mcp_vllm.demo.ask import ask
from mcp_vllm.demo.document import QUESTIONS, research_ship_manual
from mcp_vllm.demo.pair import SHARED_CORES, running_hosts
from mcp_vllm.demo.weights import ensure_gemma

SESSION = "move-example"
MAX_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: Gemma-3-270m, fetched and converted")
    args = parser.parse_args()
    console = Console()
    with running_hosts(args.model or ensure_gemma(), "build/session-move-logs", SHARED_CORES) as (
        a,
        b,
    ):
        messages = [{"role": "user", "content": f"{research_ship_manual()}\n\n{QUESTIONS[0]}"}]
        first = ask(a.engine_url, messages, MAX_TOKENS, transfer_params={"session_id": SESSION})
        a.wait_until_stored(SESSION)
        with MCPClient(a.agent_url) as client:
            moved = client.move(SESSION, to=b.peer_address)
        console.print(
            f"moved {moved.num_sent} chunks, {moved.raw_bytes / 2**20:.1f} MiB as "
            f"{moved.wire_bytes / 2**20:.1f} MiB on the wire"
        )
        messages += [
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": QUESTIONS[1]},
        ]
        second = ask(b.engine_url, messages, MAX_TOKENS, transfer_params={"session_id": SESSION})
        console.print(
            f"next turn on B: {second.imported_tokens} of {second.prompt_tokens} prompt tokens "
            f"were there, first token after {second.ttft_ms:.0f} ms, "
            f"{second.wire_bytes} bytes fetched while the user waited"
        )
        if not second.imported_tokens or second.wire_bytes:
            sys.exit("the session was not used at B as it should have been")


if __name__ == "__main__":
    main()
