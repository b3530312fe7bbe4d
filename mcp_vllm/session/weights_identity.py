from pathlib import Path
from mcp_vllm.errors import McpError
from blake3 import blake3
class WeightsNotFound(McpError): ...
def weights_identity(p: Path, cache_dir=None) -> str:
    f = sorted(Path(p).glob("*.safetensors"))
    if not f: raise WeightsNotFound(str(p))
    h = blake3(max_threads=blake3.AUTO)
    for x in f: h.update_mmap(x)
    return h.hexdigest(16)
