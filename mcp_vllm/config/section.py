"""What settings are made of: a group of keys, and the kinds of value that several have."""

from collections.abc import Sequence
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict

from mcp_vllm.config.address import Address
from mcp_vllm.config.nearest import did_you_mean

KNOWN_CODECS = ("raw", "zstd", "lossless")
LOSSY_TIERS = ("near-lossless", "balanced", "small")
AUTO = "auto"


def _listen_address(text: str) -> str:
    return str(Address.parse(text))


def _peer_address(text: str) -> str:
    address = Address.parse(text)
    if address.port == 0:
        raise ValueError(f'"{text}" needs the port that the peer listens on, not 0')
    return str(address)


def _redis_url(text: str) -> str:
    url = urlsplit(text)
    if url.scheme not in ("redis", "rediss") or not url.hostname:
        raise ValueError(f'"{text}" is not redis://HOST:PORT/DB, nor rediss:// for TLS')
    _ = url.port  # raises ValueError where it is none
    if url.password or url.query:
        raise ValueError(
            "no password and no options here: the password goes into a file, see the key beside it"
        )
    if not url.path.removeprefix("/").isdigit() and url.path not in ("", "/"):
        raise ValueError(f'"{text}" needs the number of a database after the slash')
    return text


def unique(values: tuple[str, ...]) -> tuple[str, ...]:
    """The values, each of which is there once. Raises ValueError."""
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f'"{value}" is listed twice')
    return values


def _known(kind: str, names: Sequence[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f'unknown {kind} "{name}" {did_you_mean(name, names)}')
        return name

    return AfterValidator(check)


ListenAddress = Annotated[str, AfterValidator(_listen_address)]
PeerAddress = Annotated[str, AfterValidator(_peer_address)]
RedisUrl = Annotated[str, AfterValidator(_redis_url)]
CodecName = Annotated[str, _known("codec", KNOWN_CODECS)]
WireCodecName = Annotated[str, _known("codec", (AUTO, *KNOWN_CODECS, *LOSSY_TIERS))]
LossyTier = Annotated[str, _known("lossy tier", LOSSY_TIERS)]


class Section(BaseModel):
    """What every group of settings is: closed, frozen, each key with its sentence."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True
    )
