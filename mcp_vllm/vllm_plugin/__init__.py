"""The part of mcp_vllm that vLLM loads: entry point `register` of the group `vllm.general_plugins`.

vLLM calls it in every process, sometimes more than once. It registers the connector's name and adds
our flags; nothing of ours is imported before a request for connector `mcp`.
"""

from __future__ import annotations

import logging

from mcp_vllm.vllm_plugin.compat import SUPPORTED_TEXT, is_supported, vllm_version

logger = logging.getLogger(__name__)

CONNECTOR = "mcp"


def register() -> None:
    """Make `--kv-connector mcp` known to this process's vLLM. Idempotent.

    With a vLLM outside the supported range it only says so.
    """
    version = vllm_version()
    if version is None or not is_supported(version):
        logger.error(
            "mcp_vllm supports vLLM %s and found %s: the connector is not available",
            SUPPORTED_TEXT,
            version or "none",
        )
        return
    _log_like_vllm()
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from mcp_vllm.vllm_plugin import flags

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            CONNECTOR, "mcp_vllm.vllm_plugin.connector", "MCPConnector"
        )
    flags.install()


def _log_like_vllm() -> None:
    """Send our records where vLLM sends its own: it configures only its own logger."""
    ours, theirs = logging.getLogger("mcp_vllm"), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers = theirs.handlers
        ours.setLevel(theirs.level)
        ours.propagate = False
