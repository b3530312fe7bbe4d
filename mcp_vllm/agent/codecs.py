"""The codecs of one agent: loaded and measured beside its start, so that nothing waits for them.

Lossy tiers are loaded for each kind of engine (namespace) when one connects: they need to know the
layout of its chunks, and all but `near-lossless` a calibration of its model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from mcp_vllm import __version__
from mcp_vllm.agent.transfer_plan import sending_speeds
from mcp_vllm.codec import ChunkLayout, Codec, CodecError, KVLayout, get_codec, needs_calibration
from mcp_vllm.codec.calibration import Calibration, calibration_file
from mcp_vllm.codec.loss import LOSSY_TIERS
from mcp_vllm.codec.speeds import Speed, remembered
from mcp_vllm.config import AUTO, KNOWN_CODECS, CodecConfig
from mcp_vllm.link.protocol import GroupLayout, group_index
from mcp_vllm.session.fingerprint import Fingerprint

logger = logging.getLogger(__name__)

WEIGHTS_FIELD = "model.weights"


@dataclass
class EngineCodecs:
    """What coding the chunks of one kind of engine takes.

    Attributes:
        layouts: of the chunks, by KV cache group.
        lossy: the lossy tiers that may be used for it, loaded.
        speeds: of those, of one thread.
    """

    layouts: Sequence[ChunkLayout]
    calibration: Calibration | None = None
    lossy: dict[str, Codec] = field(default_factory=dict)
    speeds: dict[str, Speed] = field(default_factory=dict)

    @property
    def calibration_id(self) -> bytes:
        """Which calibration it is; empty without one."""
        return self.calibration.fingerprint if self.calibration else b""

    def kv_of(self, key: bytes) -> KVLayout | None:
        """The layout of that chunk, where it is known."""
        group = group_index(key)
        return self.layouts[group].kv if group < len(self.layouts) else None


NO_ENGINE = EngineCodecs(())


class AgentCodecs:
    """See the module's docstring.

    Args:
        threads: how many chunks are coded at once.
        cache_folder: where measured speeds are remembered.

    Attributes:
        loaded: done when the codecs without loss are loaded and measured.
    """

    def __init__(self, config: CodecConfig, threads: int, cache_folder: Path) -> None:
        self._config = config
        self._threads = threads
        self._cache_folder = cache_folder
        self._codecs: dict[str, Codec] = {}
        self._speeds: dict[str, Speed] = {}
        self._engines: dict[bytes, EngineCodecs] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="mcp-codec-loader")
        self._stored: Future[Codec] = self._loader.submit(get_codec, config.name, config.level)
        self.loaded: Future[None] = self._loader.submit(self._load)
        self.loaded.add_done_callback(_log_failure)

    @property
    def stored(self) -> Codec:
        """The codec of stored frames; waits while it is being loaded, so ask in the pool only."""
        return self._stored.result()

    def engine(self, namespace: bytes) -> EngineCodecs:
        """What is known of the engines of that namespace."""
        return self._engines.get(namespace, NO_ENGINE)

    def speeds(self, namespace: bytes) -> Mapping[str, Speed]:
        """What was measured here, of one thread; what is missing is still being measured."""
        return {**self._speeds, **self.engine(namespace).speeds}

    def get(self, name: str, namespace: bytes, calibration_id: bytes) -> Codec | None:
        """The codec of that name for a receiver with that calibration, or None while (or because)
        there is none."""
        engine = self.engine(namespace)
        if needs_calibration(name) and calibration_id != engine.calibration_id:
            return None
        return self._codecs.get(name) or engine.lossy.get(name)

    def learn_engine(
        self, namespace: bytes, fingerprint: Fingerprint, groups: Sequence[GroupLayout]
    ) -> None:
        """An engine has connected: load, beside everything else, what its chunks need."""
        if namespace in self._engines:
            return
        engine = EngineCodecs([group.codec_layout for group in groups])
        self._engines[namespace] = engine
        if self._config.lossy:
            weights = fingerprint.fields.get(WEIGHTS_FIELD, "")
            loading = self._loader.submit(self._load_lossy, engine, weights, groups[0].raw_bytes)
            loading.add_done_callback(_log_failure)

    def forget_engine(self, namespace: bytes) -> None:
        self._engines.pop(namespace, None)

    def close(self) -> None:
        self._loader.shutdown(wait=False, cancel_futures=True)

    def acceptable(self, lossy: Sequence[str]) -> Sequence[str]:
        """The codecs to choose from for a transfer that accepts those lossy tiers."""
        wire = self._config.wire
        if wire == AUTO:
            return (*KNOWN_CODECS, *lossy)
        return KNOWN_CODECS if wire in LOSSY_TIERS and wire not in lossy else (wire,)

    def sending_speeds(self, namespace: bytes) -> dict[str, float]:
        """Codec -> raw bytes a second at which stored frames become frames of it."""
        return sending_speeds(self._config.name, self.speeds(namespace), self._threads)

    def _load(self) -> None:
        """Load what peers may ask for or send: kernels that are compiled take some seconds the
        first time on a machine."""
        self._codecs = {name: get_codec(name, self._config.level) for name in KNOWN_CODECS}
        self._speeds = remembered(self._codecs, __version__, self._cache_folder)

    def _load_lossy(self, engine: EngineCodecs, weights: str, chunk_bytes: int) -> None:
        layout = engine.layouts[0]
        if layout.kv is None:
            logger.warning(
                "codec.lossy has no effect: what the chunks of this engine's attention backend "
                "hold is not known"
            )
            return
        engine.calibration = self._find_calibration(weights)
        for name in self._config.lossy:
            if not needs_calibration(name) or engine.calibration is not None:
                engine.lossy[name] = get_codec(name, calibration=engine.calibration)
        engine.speeds = remembered(
            engine.lossy,
            f"{__version__} {weights} {engine.calibration_id.hex()}",
            self._cache_folder,
            layout,
            chunk_bytes,
        )

    def _find_calibration(self, weights: str) -> Calibration | None:
        if not any(needs_calibration(name) for name in self._config.lossy):
            return None
        path = self._config.calibration or calibration_file(self._cache_folder, weights)
        try:
            return Calibration.load(path)
        except (CodecError, OSError) as error:
            logger.warning(
                "no calibration for the lossy tiers at %s (%s): run `mcp-vllm codec calibrate "
                "MODEL` and give the file to all hosts",
                path,
                error,
            )
            return None


def _log_failure(loading: Future[None]) -> None:
    if not loading.cancelled() and (error := loading.exception()) is not None:
        logger.error("codecs could not be loaded: %r", error, exc_info=error)
