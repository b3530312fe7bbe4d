"""Which tenant and session a request names in its `kv_transfer_params`. Refuses no request."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mcp_vllm.session.manifest import DEFAULT_TENANT, SessionKey, SessionNameError, checked_name

logger = logging.getLogger(__name__)

# What a tenant is called whose name cannot be one: nothing is stored for it or found by it that
# belongs to anybody else.
UNNAMED_TENANT = "(unnamed)"


def tenant_of(params: Mapping[str, Any] | None) -> str:
    """Whose blocks the request may use, and whose its own are; with or without a session."""
    tenant = (params or {}).get("tenant")
    if tenant is None:
        return DEFAULT_TENANT
    try:
        return checked_name("tenant", tenant)
    except SessionNameError:
        return UNNAMED_TENANT


def session_of(request_id: str, params: Mapping[str, Any] | None) -> SessionKey:
    """The session that the request names; an empty id means none."""
    tenant, session_id = tenant_of(params), (params or {}).get("session_id")
    if tenant == UNNAMED_TENANT:
        logger.warning("request %s: session ignored: its tenant is no name", request_id)
        return SessionKey(tenant, "")
    if session_id is None:
        return SessionKey(tenant, "")
    try:
        return SessionKey(tenant, checked_name("session_id", session_id))
    except SessionNameError as error:
        logger.warning("request %s: session ignored: %s", request_id, error)
        return SessionKey(tenant, "")
