"""Lets a request through to its handler, or not: who asks, what they may do, and the audit of it.

The answer of a refusal says as little as it can; its reason goes to the log and to the audit.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass

import msgspec
from aiohttp import web

from mcp_vllm.agent.access_rules import Rule, rule_for
from mcp_vllm.agent.security import AgentSecurity
from mcp_vllm.errors import McpError
from mcp_vllm.security.principal import ANYBODY, BLOCKS_READ, SCOPES, Principal
from mcp_vllm.security.tokens import TokenError
from mcp_vllm.session.api import Failure
from mcp_vllm.session.manifest import SessionKey

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# A reason is logged again after so long; the audit has every refusal.
LOG_AGAIN_S = 60.0


class Refused(McpError):
    """`reason` is for us, the message for the client; `who` as far as it is known."""

    def __init__(self, status: int, message: str, reason: str, who: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.who = who


@dataclass
class _Asked:
    """What is known of the request under way: who asks, and for which session."""

    principal: Principal
    session: SessionKey | None = None


# aiohttp handles the requests of a connection one after the other, in a context of its own.
_asked: ContextVar[_Asked] = ContextVar("asked")


def present_principal() -> Principal:
    """Who asks, in a handler."""
    return _asked.get().principal


def visible(key: SessionKey) -> SessionKey:
    """`key`, or the key of a session that does not exist where this one is another tenant's.

    So the answer is made by the same code as for an id that nobody has, whatever the operation.
    """
    tenant = present_principal().tenant
    if tenant is None or key.tenant == tenant:
        return key
    return SessionKey(tenant, uuid.uuid4().hex)


def note_session(key: SessionKey) -> None:
    """Let the audit name a session that is not in the request's path."""
    _asked.get().session = key


class Access:
    """The outermost middleware of the agent's HTTP server."""

    def __init__(self, security: AgentSecurity) -> None:
        self._security = security
        self._logged_s: dict[str, float] = {}

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        rule = _rule(request)
        try:
            principal = self._admitted(request, rule)
        except Refused as refused:
            return self._refuse(request, refused)
        _asked.set(_Asked(principal))
        if not rule.event:
            return await handler(request)
        return await self._audited(request, handler, rule, principal)

    def refuse_tls(self, address: str, reason: str) -> None:
        """A handshake failed: nothing was asked yet."""
        if self._is_due(reason):
            logger.warning("a connection of %s was refused (%s)", address, reason)
        self._security.audit.record("refused", address=address, reason=reason)

    def _admitted(self, request: web.Request, rule: Rule) -> Principal:
        """Who asks, if they may. Raises Refused."""
        if rule.scope is None or not self._security.is_required:
            return ANYBODY
        principal = self._identified(request)
        if rule.scope not in principal.scopes and not _is_unknown(request):
            raise Refused(403, f"this needs the scope {rule.scope}", "scope", principal.name)
        if rule.all_tenants and principal.tenant is not None:
            raise Refused(403, "this is not for one tenant", "tenant", principal.name)
        return principal

    def _identified(self, request: web.Request) -> Principal:
        """By token where one is given, else by certificate. Raises Refused."""
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind:
            if kind.lower() != "bearer" or self._security.tokens is None:
                raise Refused(401, _WHO, "credentials that are not accepted here")
            try:
                return self._security.tokens.verify(token.strip())
            except TokenError as error:
                raise Refused(401, _WHO, error.reason) from None
        certificate = request.get_extra_info("peercert")
        if not certificate:
            raise Refused(401, _WHO, "no credentials")
        scopes = SCOPES if self._security.tokens is None else (BLOCKS_READ,)
        return Principal(f"certificate:{_common_name(certificate)}", frozenset(scopes))

    def _refuse(self, request: web.Request, refused: Refused) -> web.Response:
        self._log(request, refused)
        self._security.audit.record(
            "refused",
            who=refused.who or None,
            address=request.remote,
            operation=f"{request.method} {request.rel_url.raw_path}",
            status=refused.status,
            reason=refused.reason,
        )
        headers = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else None
        body = msgspec.json.encode(Failure(str(refused)))
        return web.Response(
            status=refused.status, body=body, content_type="application/json", headers=headers
        )

    def _log(self, request: web.Request, refused: Refused) -> None:
        if self._is_due(refused.reason):
            logger.warning(
                "a request of %s was refused (%s): %s %s",
                request.remote,
                refused.reason,
                ascii(request.method)[:20],
                ascii(request.rel_url.raw_path)[:200],
            )

    def _is_due(self, reason: str) -> bool:
        """Whether a refusal for this reason goes to the log. Reasons are few: all of them ours."""
        now_s = time.monotonic()
        due = now_s - self._logged_s.get(reason, -LOG_AGAIN_S) >= LOG_AGAIN_S
        if due:
            self._logged_s[reason] = now_s
        return due

    async def _audited(
        self, request: web.Request, handler: Handler, rule: Rule, principal: Principal
    ) -> web.StreamResponse:
        response: web.StreamResponse | None = None
        status: int | None = None
        try:
            response = await handler(request)
            status = response.status
            return response
        except web.HTTPException as answer:
            status = answer.status
            raise
        finally:
            key = _named_session(request, principal)
            self._security.audit.record(
                rule.event,
                who=principal.name,
                address=request.remote,
                operation=f"{request.method} {_route(request)}",
                tenant=key[0],
                session=key[1],
                status=status,
                bytes=_num_bytes(request, response),
                result="ok" if status is not None and status < 400 else "failed",
            )


_WHO = "a valid token or certificate is needed"


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else ""


def _rule(request: web.Request) -> Rule:
    return rule_for(request.method, _route(request))


def _is_unknown(request: web.Request) -> bool:
    """No such route: for those who may ask at all the answer is 404 or 405."""
    return request.match_info.http_exception is not None


def _named_session(request: web.Request, principal: Principal) -> tuple[str | None, str | None]:
    noted = _asked.get().session
    if noted is not None:
        return noted.tenant, noted.session_id
    names = request.match_info
    return names.get("tenant", principal.tenant), names.get("session_id")


def _num_bytes(request: web.Request, response: web.StreamResponse | None) -> int:
    """What went over the wire in the larger direction."""
    sent = response.body_length if response is not None and response.prepared else 0
    if isinstance(response, web.Response) and isinstance(response.body, bytes):
        sent = len(response.body)
    return max(sent, request.content.total_bytes)


def _common_name(certificate: dict[str, tuple[tuple[tuple[str, str], ...], ...]]) -> str:
    pairs = (pair for part in certificate.get("subject", ()) for pair in part)
    return next((value for name, value in pairs if name == "commonName"), "(no name)")
