"""The settings of a layer split: the engine's side (`--mcp-split`) and the stage's.

Declared like those of the connector (`schema.py`), read by the same loader, but from files of their
own: a stage has no connector, and an engine that is split has no agent.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ByteSize, Field, model_validator
from pydantic_core import PydanticCustomError

from mcp_vllm.config import loader
from mcp_vllm.config.address import Address
from mcp_vllm.config.schema import TlsConfig
from mcp_vllm.config.section import ListenAddress, PeerAddress, Section, unique

_MIB = 1 << 20
_GIB = 1 << 30
_MAX_BYTES = 1 << 50
AUTO = "auto"


def parse_layers(text: str) -> tuple[int, int]:
    """`4:14` as (4, 14): the first layer, and the one after the last.

    Raises ValueError that says what is wrong with `text`.
    """
    first, colon, end = text.strip().partition(":")
    if not (colon and first.isascii() and first.isdigit() and end.isascii() and end.isdigit()):
        raise ValueError(f'"{text}" is not FIRST:END, as in 4:14 for layers 4 to 13')
    if not 0 < int(first) < int(end) < 10_000:
        raise ValueError(
            f'"{text}" must begin after layer 0, which stays local, and end after its beginning'
        )
    return int(first), int(end)


def _layers(text: str) -> str:
    first, end = parse_layers(text)
    return f"{first}:{end}"


def _layers_or_auto(text: str) -> str:
    return AUTO if text.strip() == AUTO else _layers(text)


Layers = Annotated[str, AfterValidator(_layers)]
LayersOrAuto = Annotated[str, AfterValidator(_layers_or_auto)]


class NoiseConfig(Section):
    """Noise on what is sent, as local differential privacy has it (docs/privacy.md says what it
    gives, and what it costs). What each request has spent is logged when it ends."""

    clip_norm: float = Field(gt=0, allow_inf_nan=False)
    """L2 norm that the hidden state of no token exceeds: longer ones are scaled down."""

    row_epsilon: float = Field(gt=0, allow_inf_nan=False)
    """Epsilon of one token's hidden state, at `delta`: the smaller, the more noise."""

    delta: float = Field(default=1e-5, gt=0, lt=1)
    """Of a token, and of a request."""


class SplitConfig(Section):
    """The engine's side of a layer split: which layers run elsewhere, where, and how patiently."""

    version: Literal[1] = 1
    """Version of this file format."""

    layers: Layers
    """FIRST:END of the layers that run at a stage: `4:14` is layers 4 to 13. The first and the last
    layer of the model always stay with the engine."""

    stages: Annotated[tuple[PeerAddress, ...], AfterValidator(unique)] = Field(
        min_length=1, max_length=64
    )
    """HOST:PORT of the stages that hold these layers; the next one is used when one is lost."""

    form: Literal["raw", "packed", "fold", "fp8"] = "raw"
    """Activations on the wire: `raw` and `packed` are exact, `packed` is compressed for slow links;
    `fold` sends half of `raw`, `fp8` a quarter, and both change results a little."""

    stage_dtype: Literal["float16", "bfloat16"] | None = None
    """What the stages compute in, where that is another 16-bit type than the engine's `--dtype`;
    unset: the same. Activations travel in the engine's."""

    noise: NoiseConfig | None = None
    """Clip activations and add Gaussian noise before they are sent; unset: none."""

    local_fallback: bool = True
    """Load the layers into this engine when no stage is left."""

    heartbeat_ms: int = Field(default=200, ge=10, le=10_000)
    """While waiting for a stage, ask so often whether it is alive."""

    lost_ms: int = Field(default=800, ge=100, le=600_000)
    """A stage that says nothing for so long is lost."""

    step_ms: int = Field(default=60_000, ge=100, le=3_600_000)
    """A stage that is alive and has not finished a step after so long is lost, too."""

    batch_tokens: int | None = Field(default=None, ge=16, le=1 << 20)
    """Tokens that a step takes at most, as `mcp-vllm plan --max-step-ms` finds them;
    --max-num-batched-tokens wins. Unset: vLLM's default."""

    replan_s: int = Field(default=60, ge=0, le=86_400)
    """While serving, compare other splits with this one over so many seconds, and change to one
    that has been better by a fifth three times in a row; 0: never. It needs a stage that holds more
    layers, or memory here."""

    connect_ms: int = Field(default=1_000, ge=50, le=60_000)
    """How long to wait for a connection to a stage."""

    load_ms: int = Field(default=600_000, ge=1_000, le=7_200_000)
    """How long to wait, when the engine starts, for stages that still load their weights."""

    tls: TlsConfig = TlsConfig()

    token_file: Path | None = None
    """File with the bearer token that the engine presents to stages; needs scope `stage:run`."""

    insecure: bool = False
    """Send activations, and the token, to other machines without TLS."""

    @property
    def span(self) -> tuple[int, int]:
        """`layers` as numbers."""
        return parse_layers(self.layers)

    @model_validator(mode="after")
    def _private_unless_insecure(self) -> "SplitConfig":
        far = [each for each in self.stages if not Address.parse(each).is_loopback]
        if far and not self.tls.is_set and not self.insecure:
            raise PydanticCustomError(
                "plain_stage",
                'activations would travel to {stage} in the clear: set "tls", '
                'or "insecure: true" to allow that',
                {"key": "stages", "stage": far[0]},
            )
        return self

    @classmethod
    def load(cls, source: str | Path | Mapping[str, object]) -> "SplitConfig":
        """Read a YAML or JSON file, JSON text, or a mapping. Raises ConfigError."""
        return loader.load(cls, source, flags={}, environ={}).config


class StageSecurity(Section):
    """Who may have a lease. Neither `tls` nor `token_keys`: everybody who reaches `listen`."""

    tls: TlsConfig = TlsConfig()

    token_keys: Path | None = None
    """YAML or JSON file of the keys that sign bearer tokens. Set: an engine needs a token with the
    scope `stage:run`. Unset: with `tls` it needs a certificate of the CA."""

    audience: str = Field(default="mcp-vllm", min_length=1, max_length=256)
    """The `aud` that a token must name."""

    clock_skew_s: int = Field(default=30, ge=0, le=600)
    """By how much the clocks of those who make tokens may differ from ours."""


class StageConfig(Section):
    """A stage: some layers of one model, for engines elsewhere."""

    version: Literal[1] = 1
    """Version of this file format."""

    layers: LayersOrAuto
    """FIRST:END of the layers to hold: `4:14` is layers 4 to 13; engines may use some of them.
    `auto`: as many as fit, in the middle of the model."""

    memory_bytes: ByteSize | None = Field(default=None, ge=_MIB, le=_MAX_BYTES)
    """With `layers: auto`: memory for weights and KV blocks together. Unset: 70 % of what is
    free."""

    listen: ListenAddress = "127.0.0.1:7090"
    """HOST:PORT for engines. Port 0 takes any free one."""

    http: ListenAddress | None = None
    """HOST:PORT for `/healthz` and `/metrics`. Unset: none."""

    kv_bytes: ByteSize = Field(default=ByteSize(4 * _GIB), ge=_MIB, le=_MAX_BYTES)
    """Memory for KV blocks of all engines together; each gets an equal part."""

    leases: int = Field(default=1, ge=1, le=64)
    """How many engines may use the stage at once."""

    security: StageSecurity = StageSecurity()

    insecure: bool = False
    """Serve engines on other machines without TLS."""

    @model_validator(mode="after")
    def _room_for_layers(self) -> "StageConfig":
        if self.memory_bytes is None:
            return self
        if self.layers != AUTO:
            raise PydanticCustomError(
                "memory_bytes",
                '"memory_bytes" says how many layers `layers: auto` holds; here {layers} are given',
                {"key": "memory_bytes", "layers": self.layers},
            )
        if self.memory_bytes <= self.kv_bytes:
            raise PydanticCustomError(
                "memory_bytes",
                '"memory_bytes" leaves no room for layers beside "kv_bytes"',
                {"key": "memory_bytes"},
            )
        return self

    @model_validator(mode="after")
    def _loopback_unless_secure(self) -> "StageConfig":
        far = not Address.parse(self.listen).is_loopback
        if far and not self.insecure and not self.security.tls.is_set:
            raise PydanticCustomError(
                "plain_listen",
                '{listen} can be reached from other machines and has no TLS: set "security.tls" '
                '(certificate, key, ca), or "insecure: true" to allow that, or listen on a '
                "loopback address",
                {"key": "listen", "listen": self.listen},
            )
        return self

    @classmethod
    def load(
        cls,
        source: str | Path | Mapping[str, object] | None,
        flags: Mapping[str, object],
    ) -> "StageConfig":
        """Merge command line options (None: not given) over the file. Raises ConfigError."""
        given = {
            name: loader.Setting(value, f"--{name.replace('_', '-')}")
            for name, value in flags.items()
            if value is not None
        }
        return loader.load(cls, source, flags=given, environ={}).config
