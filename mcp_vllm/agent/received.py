"""What must hold of a frame that came from outside, before it is decoded or stored.

A sealed frame whose key is not here is kept as it is: this agent passes it on and cannot read it.
"""

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
from mcp_vllm.security.seals import SealedHeader, SealError, is_sealed, read_sealed_header
from mcp_vllm.store.ram import Chunk, ChunkKey

AnyHeader = FrameHeader | SealedHeader


def check_received(
    frame: bytes, loss_before: str, max_raw_bytes: int, lossy: Sequence[str]
) -> tuple[AnyHeader, str]:
    """The frame's header, and the loss of what it decodes to.

    Raises:
        CodecError: it is no frame, too large, or of a tier that is not among `lossy`.
    """
    header: AnyHeader
    if is_sealed(frame):
        header = read_sealed_header(frame, max_raw_size=max_raw_bytes)
        loss_before = worst([loss_before, header.loss])
    else:
        header = read_header(frame[:FRAME_PREFIX_SIZE], max_raw_size=max_raw_bytes)
    loss = worst([loss_before, EXACT if header.lossless else header.codec_name])
    if not is_acceptable(loss, lossy):
        raise FrameError(f"a chunk that went through codec {loss}, which is not accepted")
    return header, loss


def check_sealed(context: AgentContext, name: ChunkKey, frame: bytes) -> None:
    """A peer's frame for a tenant that has a key here proves whose it is by being sealed.

    Raises:
        SealError: it is not.
    """
    if not is_sealed(frame) and context.seals.key_ids(name.tenant):
        raise SealError("a frame that is not sealed, of a tenant whose frames are")


async def keep_verified(
    context: AgentContext, name: ChunkKey, frame: bytes, header: AnyHeader, loss: str
) -> None:
    """Put a frame that `check_received` let through into the store: decoded once, and sealed.

    Raises:
        CodecError: it does not open or decode to what it says, or is not that chunk's.
    """
    if header.key != name.key:
        raise FrameError(f"frame holds chunk {header.key.hex()}, not {name.key.hex()}")
    if context.seals.opens(name.tenant, frame):
        frame = await context.in_pool(_verified, context, name, frame, header.raw_size, loss)
    context.store.put(name, Chunk(header.layout, header.raw_size, frame=frame, loss=loss))


def _verified(
    context: AgentContext, name: ChunkKey, frame: bytes, raw_bytes: int, loss: str
) -> bytes:
    """Runs in the pool: the frame, proved good, as it is to be stored. Raises CodecError."""
    opened = context.seals.open(frame, name.namespace, name.tenant)
    _verify(name.key, opened, raw_bytes, context.codecs.engine(name.namespace))
    return context.seals.seal(frame, name.namespace, name.tenant, loss)


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
