"""`python -m mcp_vllm.vllm_plugin.probe [ALGORITHM]`: one line of JSON about this process's vLLM.

Run by `mcp-vllm doctor`, twice: `block_hash` differs where two engines would not find each other's
blocks.
"""

from __future__ import annotations

import json
import sys


def main() -> int:
    from vllm.config import CacheConfig
    from vllm.platforms import current_platform

    from mcp_vllm.vllm_plugin.fingerprint import hash_probe

    algorithm = sys.argv[1] if len(sys.argv) > 1 else str(CacheConfig.prefix_caching_hash_algo)
    answer = {
        "platform": current_platform._enum.name.lower(),
        "algorithm": algorithm,
        "block_hash": hash_probe(algorithm),
    }
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
