"""The codecs of one agent: loaded and measured beside its start, so that nothing waits for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from mcp_vllm import __version__
from mcp_vllm.agent.transfer_plan import sending_speeds
from mcp_vllm.codec import Codec, get_codec
from mcp_vllm.codec.loss import LOSSY_TIERS
from mcp_vllm.codec.speeds import Speed, remembered
from mcp_vllm.config import AUTO, KNOWN_CODECS, CodecConfig

logger = logging.getLogger(__name__)


class AgentCodecs:
    """See the module's docstring.

    Args:
        threads: how many chunks are coded at once.
        cache_folder: where measured speeds are remembered.
    """

    def __init__(self, config: CodecConfig, threads: int, cache_folder: Path) -> None:
        self._config = config
        self._threads = threads
        self._codecs: dict[str, Codec] = {}
        self._speeds: dict[str, Speed] = {}
        loader = ThreadPoolExecutor(1, thread_name_prefix="mcp-codec-loader")
        self._stored: Future[Codec] = loader.submit(get_codec, config.name, config.level)
        loader.submit(self._load, cache_folder).add_done_callback(_log_failure)
        loader.shutdown(wait=False)

    @property
    def stored(self) -> Codec:
        """The codec of stored frames; waits while it is being loaded, so ask in the pool only."""
        return self._stored.result()

    @property
    def speeds(self) -> Mapping[str, Speed]:
        """What was measured here, of one thread; empty while it is being measured."""
        return self._speeds

    def get(self, name: str) -> Codec | None:
        """The codec of that name, or None while (or because) it is not there."""
        return self._codecs.get(name)

    def acceptable(self, lossy: Sequence[str]) -> Sequence[str]:
        """The codecs to choose from for a transfer that accepts those lossy tiers."""
        wire = self._config.wire
        if wire == AUTO:
            return (*KNOWN_CODECS, *lossy)
        return KNOWN_CODECS if wire in LOSSY_TIERS and wire not in lossy else (wire,)

    def sending_speeds(self) -> dict[str, float]:
        """Codec -> raw bytes a second at which stored frames become frames of it."""
        return sending_speeds(self._config.name, self._speeds, self._threads)

    def _load(self, cache_folder: Path) -> None:
        """Load what peers may ask for or send: kernels that are compiled take some seconds the
        first time on a machine."""
        codecs = {name: get_codec(name, self._config.level) for name in KNOWN_CODECS}
        self._codecs = codecs
        makers: dict[str, Callable[[], Codec]] = {
            name: (lambda codec=codec: codec)  # type: ignore[misc]
            for name, codec in codecs.items()
        }
        self._speeds = remembered(makers, __version__, cache_folder)


def _log_failure(loading: Future[None]) -> None:
    if (error := loading.exception()) is not None:
        logger.error("codecs could not be loaded: %r", error, exc_info=error)
