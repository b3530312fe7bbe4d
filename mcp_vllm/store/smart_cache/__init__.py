"""SmartCache: the eviction and admission policy of every place that keeps blocks."""

from mcp_vllm.store.policy import Admission
from mcp_vllm.store.smart_cache.kernels import load_kernels
from mcp_vllm.store.smart_cache.policy import SmartCache, fingerprint
from mcp_vllm.store.smart_cache.results import Explanation, TurnEnd

__all__ = ["Admission", "Explanation", "SmartCache", "TurnEnd", "fingerprint", "load_kernels"]
