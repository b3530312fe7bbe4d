"""Request traces: one JSON object a line, as published with the Mooncake paper (FAST '25).

`timestamp` (ms), `input_length` and `output_length` (tokens), `hash_ids` (ids of the prompt's
blocks, prefix-chained: a block can hit only if all before it hit). Other fields are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mcp_vllm.errors import McpError

MAX_BLOCKS_PER_REQUEST = 1 << 20


class _Line(msgspec.Struct):
    timestamp: float
    hash_ids: list[int]
    input_length: int = 0
    output_length: int = 0


@dataclass(frozen=True)
class Request:
    """One request: its blocks from the root to the leaf, as numbers from 0 in order of appearance.

    Attributes:
        time_s: arrival.
        blocks: no number twice.
        num_tokens: of the prompt; the last block may be only partly filled.
        num_output_tokens: of the answer.
    """

    time_s: float
    blocks: tuple[int, ...]
    num_tokens: int
    num_output_tokens: int


@dataclass(frozen=True)
class Trace:
    """Requests by time.

    Attributes:
        num_blocks: distinct blocks.
        num_accesses: blocks of all requests.
        block_tokens: tokens of a full block.
    """

    requests: Sequence[Request]
    num_blocks: int
    num_accesses: int
    block_tokens: int

    def tokens_of(self, request: Request, position: int) -> int:
        """Tokens in a request's block: a full block, except where the prompt ends."""
        return max(0, min(self.block_tokens, request.num_tokens - position * self.block_tokens))


def read(path: Path) -> Trace:
    """Read a trace file.

    Raises:
        McpError: the file cannot be read, is empty, or a line is not of the format.
    """
    decoder = msgspec.json.Decoder(_Line)
    lines: list[_Line] = []
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    try:
                        lines.append(_checked(decoder.decode(text)))
                    except (msgspec.DecodeError, ValueError) as error:
                        raise McpError(f"{path}, line {number}: {error}") from error
    except OSError as error:
        raise McpError(f"cannot read the trace {path}: {error.strerror}") from error
    if not lines:
        raise McpError(f"{path} holds no request; expected one JSON object a line")
    return _numbered(sorted(lines, key=lambda line: line.timestamp))


def _checked(line: _Line) -> _Line:
    if len(line.hash_ids) > MAX_BLOCKS_PER_REQUEST:
        raise ValueError(f"{len(line.hash_ids)} blocks, at most {MAX_BLOCKS_PER_REQUEST}")
    if line.input_length < 0 or line.output_length < 0:
        raise ValueError("a length below 0")
    return line


def _numbered(lines: list[_Line]) -> Trace:
    """Ids may be anything; numbers are dense. A repeated id inside a request ends its chain."""
    numbers: dict[int, int] = {}
    requests: list[Request] = []
    for line in lines:
        ids = list(dict.fromkeys(line.hash_ids))
        blocks = tuple(numbers.setdefault(each, len(numbers)) for each in ids)
        requests.append(
            Request(line.timestamp / 1000, blocks, line.input_length, line.output_length)
        )
    return Trace(
        requests,
        num_blocks=len(numbers),
        num_accesses=sum(len(request.blocks) for request in requests),
        block_tokens=_block_tokens(lines),
    )


def _block_tokens(lines: list[_Line]) -> int:
    """The block size: the smallest power of two that fits every request's lengths."""
    size = 1
    for line in lines:
        while line.hash_ids and size * len(line.hash_ids) < line.input_length:
            size *= 2
    return size
