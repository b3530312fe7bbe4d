"""What can go wrong between an engine and a stage."""

from typing import Literal

from mcp_vllm.errors import McpError


class SplitError(McpError):
    """Root of the layer split's errors."""


class WireError(SplitError):
    """Bytes that are not our protocol, or break its bounds; the connection cannot go on."""


class StageLost(SplitError):
    """The stage is gone, silent or broken: another one, or local layers, must take over.

    Attributes:
        cause: `gone`; `slow`: it is alive and has not answered in time; `memory`: it answers, and
            has not enough for the step.
    """

    def __init__(self, message: str, cause: Literal["gone", "slow", "memory"] = "gone") -> None:
        super().__init__(message)
        self.cause = cause


class StageTimeout(StageLost):
    """The stage is alive and has not finished in time."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "slow")


class StageResourceError(SplitError):
    """The stage has no lease, memory or KV blocks for this; smaller or fewer sessions may fit."""


class StageRefused(SplitError):
    """The stage answers and does not want us.

    Attributes:
        code: one of wire.REFUSALS.
        reason: without the stage's name, for the other side.
    """

    def __init__(self, stage: str, code: str, reason: str) -> None:
        super().__init__(f"stage {stage} refuses: {reason}" if stage else reason)
        self.code = code
        self.reason = reason
