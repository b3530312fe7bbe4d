"""The seconds of each decoder layer in the last step, for measuring runs; off otherwise."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch


class LayerTimer:
    """Hooks around layers. Each layer waits for its device, so a measured step is not a quick one.

    Attributes:
        seconds: of each layer when it last ran, in their order.
    """

    def __init__(self, layers: Iterable[torch.nn.Module], device: torch.device) -> None:
        modules = list(layers)
        self.seconds = [0.0] * len(modules)
        self._started = 0.0
        self._device = device
        self._hooks = [
            hook
            for index, module in enumerate(modules)
            for hook in (
                module.register_forward_pre_hook(self._start),
                module.register_forward_hook(self._end(index)),
            )
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _start(self, *_: Any) -> None:
        self._synchronize()
        self._started = time.perf_counter()

    def _end(self, index: int) -> Any:
        def hook(*_: Any) -> None:
            self._synchronize()
            self.seconds[index] = time.perf_counter() - self._started

        return hook

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
