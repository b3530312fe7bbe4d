"""What must hold of a frame that came from outside, before it is decoded or stored."""

from __future__ import annotations

from collections.abc import Sequence

from mcp_vllm.agent.codecs import EngineCodecs
from mcp_vllm.agent.context import AgentContext
from mcp_vllm.codec import (
    FRAME_PREFIX_SIZE,
    ChecksumError,
    CodecError,
    FrameError,
    FrameHeader,
    decode_frame_into,
    read_header,
)
from mcp_vllm.codec.loss import EXACT, is_acceptable, worst
from mcp_vllm.store.ram import Chunk, ChunkKey


def check_received(
    frame: bytes, loss_before: str, max_raw_bytes: int, lossy: Sequence[str]
) -> tuple[FrameHeader, str]:
    """The frame's header, and the loss of what it decodes to.

    Raises:
        CodecError: it is no frame, too large, or of a tier that is not among `lossy`.
    """
    header = read_header(frame[:FRAME_PREFIX_SIZE], max_raw_size=max_raw_bytes)
    loss = worst([loss_before, EXACT if header.lossless else header.codec_name])
    if not is_acceptable(loss, lossy):
        raise FrameError(f"a chunk that went through codec {loss}, which is not accepted")
    return header, loss


async def keep_verified(
    context: AgentContext, name: ChunkKey, frame: bytes, header: FrameHeader, loss: str
) -> None:
    """Put a frame that `check_received` let through into the store, once it has been decoded.

    Raises:
        CodecError: it does not decode to what it says, or is not that chunk's.
    """
    coding = context.codecs.engine(name.namespace)
    await context.in_pool(_verify, name.key, frame, header.raw_size, coding)
    context.store.put(name, Chunk(header.layout, header.raw_size, frame=frame, loss=loss))


def _verify(key: bytes, frame: bytes, raw_bytes: int, coding: EngineCodecs) -> None:
    """Decode a frame and throw the result away; codec work, so run it in the pool.

    A lossy frame for engines that have not connected here is checked for damage only: it cannot be
    decoded yet.

    Raises:
        CodecError: it does not decode to what it says.
    """
    out, kv = memoryview(bytearray(raw_bytes)), coding.kv_of(key)
    try:
        decode_frame_into(frame, out, key=key, kv=kv, calibration=coding.calibration)
    except (FrameError, ChecksumError):
        raise
    except CodecError:
        if kv is not None and coding.calibration is not None:
            raise
