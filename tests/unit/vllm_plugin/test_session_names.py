import pytest

from mcp_vllm.session.manifest import DEFAULT_TENANT, SessionKey
from mcp_vllm.vllm_plugin.session import UNNAMED_TENANT, session_of, tenant_of


@pytest.mark.parametrize(
    ("params", "key"),
    [
        (None, SessionKey(DEFAULT_TENANT, "")),
        ({}, SessionKey(DEFAULT_TENANT, "")),
        ({"session_id": "s"}, SessionKey(DEFAULT_TENANT, "s")),
        ({"session_id": "s", "tenant": "acme"}, SessionKey("acme", "s")),
        ({"tenant": "acme"}, SessionKey("acme", "")),
        ({"tenant": "acme", "session_id": "\0"}, SessionKey("acme", "")),
    ],
)
def test_a_request_names_its_tenant_with_or_without_a_session(params, key) -> None:
    assert session_of("r", params) == key
    assert tenant_of(params) == key.tenant


@pytest.mark.parametrize("tenant", ["", "\0", 7, ["default"], "x" * 257])
def test_a_tenant_that_is_no_name_is_not_the_default_one(tenant: object) -> None:
    params = {"tenant": tenant, "session_id": "s"}
    assert tenant_of(params) == UNNAMED_TENANT != DEFAULT_TENANT
    assert session_of("r", params) == SessionKey(UNNAMED_TENANT, "")
