"""`StageClient`: layers of a model at a stage, for programs without vLLM.

    client = StageClient("127.0.0.1:7090", auth_key=token)
    after = client.execute(input_data=hidden, layer_range=(4, 14), session="chat-1")

`mcp_vllm.MCPClient` makes one of an endpoint that is no URL. docs/hf-split.md has the whole.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

import numpy as np
import torch

from mcp_vllm.config.split import SplitConfig
from mcp_vllm.split import wire
from mcp_vllm.split.activations import FOLD, FP8
from mcp_vllm.split.errors import SplitError
from mcp_vllm.split.link import Stages
from mcp_vllm.split.noise import ActivationNoise, NoisySessions
from mcp_vllm.split.sessions import Endurance, StageSessions
from mcp_vllm.split.wire import Hello

SCHEME = "mcp://"
TASK = "transformer_layer"
MAX_REQUESTS = 64
# How long the first call waits for a stage that loads, or is taken.
LOAD_MS = 120_000
# Hidden states of transformers are sums already, so `fold` loses nothing.
_FORM_OF = {None: FOLD, "none": FOLD, "fp8": FP8}

Rows = TypeVar("Rows", torch.Tensor, "np.ndarray[Any, Any]")
LayerRange = tuple[int, int] | range | str


class StageClient:
    """Layers at stages, with a lease for each range of layers that is used. Safe for threads."""

    def __init__(
        self,
        endpoint: str | Sequence[str],
        *,
        auth_key: str | None = None,
        compression: str | None = None,
        noise: ActivationNoise | None = None,
        max_tokens: int = 2048,
        attempts: int = 4,
        reconnect_s: float = 10.0,
        **settings: Any,
    ) -> None:
        """Nothing is connected before the first `execute`.

        Args:
            endpoint: HOST:PORT of a stage, or several (a list, or with commas): the next one is
                used when one is lost, and each range of layers at those that hold it.
            auth_key: bearer token with the scope `stage:run`.
            compression: of activations on the wire: None (exact) or "fp8" (a quarter of float32,
                half of bfloat16, and results change a little).
            noise: on all that is sent; None: none.
            max_tokens: of a step; longer inputs are computed in several.
            attempts: of each call, when stages are lost.
            reconnect_s: how long to look for a stage after one is lost.
            settings: keys of --mcp-split, as `tls`, `lost_ms`, `step_ms`, `insecure`.

        Raises:
            ConfigError: a setting is wrong, as a far stage without TLS.
            ValueError: unknown compression.
        """
        if compression not in _FORM_OF:
            raise ValueError(f'compression {compression!r}: known are None, "none" and "fp8"')
        names = endpoint.split(",") if isinstance(endpoint, str) else endpoint
        self._settings = {
            "form": _FORM_OF[compression],
            "stages": [each.strip().removeprefix(SCHEME) for each in names],
            "load_ms": LOAD_MS,
            **settings,
        }
        self._auth_key = auth_key
        self._noise = NoisySessions(noise) if noise is not None else None
        self._max_tokens = max_tokens
        self._attempts = attempts
        self._reconnect_s = reconnect_s
        self._open: dict[tuple[str, str], StageSessions] = {}
        self._config("1:2")

    def execute(
        self,
        *,
        input_data: Rows,
        layer_range: LayerRange,
        session: str | None = None,
        task_type: str = TASK,
    ) -> Rows:
        """Rows after the layers of `layer_range`.

        Args:
            input_data: hidden states [tokens, width] before the first of the layers, as torch
                tensor or numpy array, float32, float16 or bfloat16. The stage computes in its own
                dtype.
            layer_range: the first layer and the one after the last, as (4, 14), range(4, 14) or
                "4:14"; exactly what a stage holds.
            session: the rows follow on what this session has already sent; None: on nothing, and
                nothing is kept.

        Returns: of the kind, dtype and device of `input_data`.

        Raises what `StageSessions.run` does, and ValueError: `input_data` or `task_type` is none.
        """
        if task_type != TASK:
            raise ValueError(f"task_type {task_type!r}: only {TASK!r} is known")
        sessions = self.open(layer_range)
        name = session if session is not None else uuid.uuid4().hex
        rows = torch.from_numpy(input_data) if isinstance(input_data, np.ndarray) else input_data
        if not rows.is_floating_point():
            raise ValueError(f"input_data of {rows.dtype}, not hidden states")
        try:
            result = sessions.run({name: rows})[name].to(rows.device, rows.dtype)
        finally:
            if session is None:
                sessions.abandon(name)
        return result.numpy() if isinstance(input_data, np.ndarray) else result

    def open(
        self, layer_range: LayerRange, facts: Mapping[str, str] | None = None
    ) -> StageSessions:
        """The sessions of these layers; they are made at the first call.

        Args:
            facts: what must agree with the stage's, as `model.weights`; see wire.Hello.

        Raises ValueError: no such layers. SecurityError: a certificate cannot be used.
        """
        layers = _layers_text(layer_range)
        key = (layers, repr(sorted((facts or {}).items())))
        if key not in self._open:
            config = self._config(layers)
            hello = Hello(
                facts=dict(facts or {}),
                max_model_len=wire.MAX_MODEL_LEN,
                max_requests=MAX_REQUESTS,
                max_tokens=self._max_tokens,
                form=config.form,
                token=self._auth_key,
                is_client=True,
            )
            endurance = Endurance(
                self._attempts, config.step_ms / 1000, config.load_ms / 1000, self._reconnect_s
            )
            stages = Stages(config, hello, None)
            self._open[key] = StageSessions(stages, hello, endurance, self._noise)
        return self._open[key]

    def close_session(self, session: str) -> None:
        """Free the session's KV blocks, and the rows that are kept here."""
        for sessions in self._open.values():
            sessions.end(session)

    def epsilon(self, session: str) -> float:
        """What the session has spent of its privacy. Raises SplitError: there is no noise."""
        if self._noise is None:
            raise SplitError("no noise is set: nothing bounds what activations tell")
        return self._noise.epsilon(session)

    def close(self) -> None:
        """End all leases."""
        for sessions in self._open.values():
            sessions.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _config(self, layers: str) -> SplitConfig:
        return SplitConfig.load({**self._settings, "layers": layers})


def _layers_text(layers: LayerRange) -> str:
    if isinstance(layers, str):
        return layers
    if isinstance(layers, range):
        if layers.step != 1:
            raise ValueError(f"layer_range {layers}: layers must follow on each other")
        return f"{layers.start}:{layers.stop}"
    first, end = layers
    return f"{first}:{end}"
