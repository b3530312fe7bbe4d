"""The result of one check. Pure data, made by the modules beside this one, shown by the command."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum


class Status(StrEnum):
    """`WARN`: it works, but not as well as it could, or it cannot be told from here."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and what to do about it (empty when all is well)."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Check:
    return Check(name, Status.OK, found)


def warn(name: str, found: str, remedy: str) -> Check:
    return Check(name, Status.WARN, found, remedy)


def fail(name: str, found: str, remedy: str) -> Check:
    return Check(name, Status.FAIL, found, remedy)


def report(checks: Iterable[Check]) -> dict[str, object]:
    """The machine form: `{"ok": bool, "checks": [{"name", "status", "found", "remedy"}]}`."""
    listed = list(checks)
    return {"ok": not any_failed(listed), "checks": [asdict(check) for check in listed]}


def any_failed(checks: Iterable[Check]) -> bool:
    return any(check.status is Status.FAIL for check in checks)
