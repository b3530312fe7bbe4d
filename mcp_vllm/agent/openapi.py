"""The OpenAPI document of the session API, served at `/v1/openapi.json`; docs/api.md is made from
it: python -m mcp_vllm.agent.openapi FILE (`make docs`)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mcp_vllm import __version__
from mcp_vllm.agent.peer_report import PeersReport
from mcp_vllm.session import api
from mcp_vllm.session.api import ONE
from mcp_vllm.session.cache_api import CacheView

JSON = "application/json"


@dataclass(frozen=True)
class Operation:
    """One row of the API. `answer` None: no body; a string: a stream of that media type."""

    method: str
    path: str
    summary: str
    answer: type[msgspec.Struct] | str | None
    body: type[msgspec.Struct] | str | None = None
    query: tuple[str, ...] = ()


OPERATIONS = (
    Operation(
        "GET", "/v1/sessions", f"Sessions by name, a page of {api.MAX_PAGE} at most.",
        api.SessionList, query=("limit", "after"),
    ),
    Operation("GET", ONE, "One session.", api.SessionSummary),
    Operation("DELETE", ONE, "Forget it, and the chunks that no other session has.", None),
    Operation(
        "POST", f"{ONE}/copy", "Copy to a peer; what is missing there travels.", api.Transfer,
        api.TransferRequest,
    ),
    Operation(
        "POST", f"{ONE}/move", "Copy to a peer, verify, release here.", api.Transfer,
        api.TransferRequest,
    ),
    Operation("POST", f"{ONE}/prefetch", "Fetch it from whichever peer has it.", api.Transfer),
    Operation(
        "GET", f"{ONE}/placements", "Where it is cheapest to go on with, for gateways.",
        api.Placements,
    ),
    Operation(
        "POST", "/v1/placements", "The same for a prompt, by the hashes of its blocks.",
        api.Placements, api.PlacementRequest,
    ),
    Operation(
        "POST", f"{ONE}/fork", "The same context under another id.", api.SessionSummary,
        api.ForkRequest,
    ),
    Operation(
        "POST", f"{ONE}/pin", "Keep it in memory for a time.", api.SessionSummary, api.PinRequest
    ),
    Operation("POST", f"{ONE}/unpin", "End a pin.", api.SessionSummary),
    Operation("POST", f"{ONE}/park", "Write it to the parking folder.", api.SessionSummary),
    Operation("POST", f"{ONE}/wake", "Bring it back from there.", api.SessionSummary),
    Operation(
        "GET", f"{ONE}/export", "One checksummed file; `Range: bytes=N-` with `If-Match` resumes.",
        api.ARCHIVE_TYPE,
    ),
    Operation(
        "POST", "/v1/sessions/import", "Take a session over from such a file.", api.SessionSummary,
        api.ARCHIVE_TYPE, ("tenant", "session_id", "upload", "offset"),
    ),
    Operation(
        "GET", "/v1/sessions/import",
        "Where an import that was named by `upload` goes on, with `offset`, after it broke off.",
        api.UploadState, query=("upload",),
    ),
    Operation(
        "POST", "/v1/drain", "Move every session to the peers; a `DrainStep` a line.",
        "application/x-ndjson",
    ),
    Operation("GET", api.SESSION_CACHE, "Why its blocks are kept, or are not.", CacheView),
    Operation("GET", api.BLOCK_CACHE, "The same of one block, by its key.", CacheView),
    Operation("GET", "/v1/peers", "The peers as this agent sees them.", PeersReport),
)  # fmt: skip


def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    structs = {each for operation in OPERATIONS for each in (operation.answer, operation.body)}
    kinds = sorted(
        {each for each in structs if isinstance(each, type)} | {api.DrainStep, api.Failure},
        key=lambda kind: kind.__name__,
    )
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "mcp_vllm context agent", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _described(operation: Operation) -> dict[str, Any]:
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    parameters = [_parameter(name, "path", required=True) for name in names]
    parameters += [_parameter(name, "query", required=False) for name in operation.query]
    good = {"description": "done"} | _content(operation.answer)
    described: dict[str, Any] = {
        "summary": operation.summary,
        "parameters": parameters,
        "responses": {
            "200" if operation.answer else "204": good,
            "default": {"description": "why not"} | _content(api.Failure),
        },
    }
    if operation.body is not None:
        described["requestBody"] = {"required": True} | _content(operation.body)
    return described


def _parameter(name: str, place: str, *, required: bool) -> dict[str, Any]:
    return {"name": name, "in": place, "required": required, "schema": {"type": "string"}}


def _content(kind: type[msgspec.Struct] | str | None) -> dict[str, Any]:
    if kind is None:
        return {}
    if isinstance(kind, str):
        return {"content": {kind: {"schema": {"type": "string", "format": "binary"}}}}
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"content": {JSON: {"schema": reference}}}


_INTRODUCTION = """\
# Session API

<!-- Generated by `make docs` from mcp_vllm/agent/openapi.py: do not edit. -->

The context agent serves it at `agent.listen`; the OpenAPI document is at `/v1/openapi.json`. The
same from a shell: `mcp-vllm sessions --help`; from Python: `mcp_vllm.MCPClient` and
`AsyncMCPClient`. An answer that says no has the body `{"error": "..."}`: 400 a malformed request,
401 no valid token or certificate, 403 not with this one, 404 no such session or peer, 409 not in
this state, 412 changed since, 502 the peer failed, 507 no room. What each request needs where the
agent asks who you are: [security.md](security.md#who-may-do-what).
"""


def page() -> str:
    """docs/api.md."""
    lines = [_INTRODUCTION, "| Request | Body | Answer | |", "|---|---|---|---|"]
    for operation in OPERATIONS:
        query = f"?{'&'.join(f'{name}=' for name in operation.query)}" if operation.query else ""
        cells = (
            f"`{operation.method} {operation.path}{query}`",
            _name(operation.body),
            _name(operation.answer),
            operation.summary,
        )
        lines.append(f"| {' | '.join(cells)} |")
    schemas = document()["components"]["schemas"]
    for name, schema in schemas.items():
        lines += ["", f"## {name}", "", schema.get("description", "").strip(), ""]
        lines += ["| Field | Type |", "|---|---|"]
        lines += [
            f"| `{field}` | {_type(value)} |" for field, value in schema["properties"].items()
        ]
    return "\n".join(lines) + "\n"


def _name(kind: type[msgspec.Struct] | str | None) -> str:
    if kind is None:
        return ""
    return f"`{kind}`" if isinstance(kind, str) else f"[{kind.__name__}](#{kind.__name__.lower()})"


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    return str(schema.get("type", "any"))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
