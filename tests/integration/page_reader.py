"""A worker extension for tests (`--worker-extension-cls`): digests of the KV cache's pages."""

import hashlib


class PageReader:
    """Methods that the engine's development endpoint `/collective_rpc` can call in the worker."""

    def page_digests(self) -> list[str]:
        """One digest for each page that is not all zeros, over all KV cache tensors."""
        digests = []
        seen = set()
        for tensor in self.model_runner.kv_caches:
            if tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            pages = tensor.view(-1).view(tensor.shape[0], -1)
            for page in pages[pages.any(dim=1)]:
                page_bytes = page.contiguous().view(dtype=_BYTE).numpy().tobytes()
                digests.append(hashlib.sha256(page_bytes).hexdigest())
        return digests


def _byte_dtype():
    import torch

    return torch.uint8


_BYTE = _byte_dtype()
