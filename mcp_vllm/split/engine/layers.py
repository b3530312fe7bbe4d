"""Building a model with some of its decoder layers only.

vLLM's models make their layers through `make_layers` of `models/utils.py`. While a plan is active
in this process, that function asks the plan instead: the engine's leaves out the span and puts a
gate in its place, the stage's leaves out everything else, and has an entry before its layers.
Model modules import `make_layers` by name, so those that are loaded already are patched, too.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle
from vllm.model_executor.models import utils as model_utils
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.model_executor.offloader import get_offloader

from mcp_vllm.split.activations import Activations
from mcp_vllm.split.errors import SplitError

LayerFn = Callable[..., torch.nn.Module]
Made = tuple[int, int, torch.nn.ModuleList]
_MODELS = "vllm.model_executor.models"
_HANDED_ON = ("hidden_states", "residual")


class LayersUnsupported(SplitError):
    """This model's layers cannot be split; names the model's layer and what is unusual."""


class Plan(Protocol):
    """Which layers to make."""

    def make(self, num_layers: int, layer_fn: LayerFn, prefix: str) -> Made:
        """What `make_layers` returns: the first layer, the one after the last, and all modules."""


@dataclass(frozen=True)
class LayerCall:
    """How a decoder layer is called: which argument is which.

    Attributes:
        places: of hidden states and residual, where a call gives them without their names. (To
            bind its signature to each call would take longer than all else that is done with it.)
    """

    places: Mapping[str, int]
    has_residual: bool

    @classmethod
    def of(cls, layer: torch.nn.Module) -> LayerCall:
        """Raises LayersUnsupported."""
        name = type(layer).__name__
        signature = inspect.signature(layer.forward)
        parameters = signature.parameters
        unknown = [
            each.name
            for each in parameters.values()
            if each.default is each.empty
            and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
            and each.name not in (*_HANDED_ON, "positions")
        ]
        if "hidden_states" not in parameters or unknown:
            raise LayersUnsupported(
                f"{name} cannot be split: its forward takes {', '.join(parameters)}, and only "
                "layers of positions, hidden_states and residual can"
            )
        has_residual = "residual" in parameters
        if not has_residual and "uple" in str(signature.return_annotation):
            raise LayersUnsupported(f"{name} cannot be split: it returns more than hidden states")
        by_place = [
            name
            for name, each in parameters.items()
            if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        ]
        places = {name: by_place.index(name) for name in _HANDED_ON if name in by_place}
        return cls(places, has_residual)

    def activations(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Activations:
        """What a call hands to the layer."""

        def given(name: str) -> Any:
            place = self.places.get(name, len(args))
            return args[place] if place < len(args) else kwargs.get(name)

        return Activations(given("hidden_states"), given("residual"))

    def of_others(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], activations: Activations
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call, of other activations."""
        by_place, by_name = list(args), dict(kwargs)
        others = {"hidden_states": activations.hidden}
        if self.has_residual:
            others["residual"] = activations.residual
        for name, value in others.items():
            place = self.places.get(name, len(args))
            if place < len(args):
                by_place[place] = value
            else:
                by_name[name] = value
        return tuple(by_place), by_name

    def result(self, activations: Activations) -> Any:
        """What a layer of this kind returns."""
        if self.has_residual:
            return activations.hidden, activations.residual
        return activations.hidden


class PassThrough(PPMissingLayer):
    """In the place of a layer that is not here: hands on what it gets."""

    def __init__(self, call: LayerCall) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call.result(self.call.activations(args, kwargs))


class RemoteSpan(PassThrough):
    """In the place of the span's first layer: what `exchange` makes of the activations.

    `exchange` None: no step is in flight (a profiling run), and they are handed on as they are.
    """

    def __init__(self, call: LayerCall) -> None:
        super().__init__(call)
        self.exchange: Callable[[Activations], Activations] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self.call.activations(args, kwargs)
        return self.call.result(given if self.exchange is None else self.exchange(given))


class AllButSpan:
    """The engine's plan: every layer but [first, end).

    Attributes (after the model is built):
        layers: the model's layers; `layers[first]` is `gate`.
        gate: in the place of the span's first layer, wherever that is.
    """

    gate: RemoteSpan

    def __init__(self, first: int, end: int, num_layers: int) -> None:
        """Raises LayersUnsupported: the model has no such layers, or none would stay."""
        check_span(first, end, num_layers)
        self.first, self.end, self._num_layers = first, end, num_layers
        self.layers: torch.nn.ModuleList | None = None

    def make(self, num_layers: int, layer_fn: LayerFn, prefix: str) -> Made:
        _check_only_stack(num_layers, self._num_layers, self.layers, prefix)
        here = [i for i in range(num_layers) if not self.first <= i < self.end]
        made = get_offloader().wrap_modules(layer_fn(prefix=f"{prefix}.{i}") for i in here)
        self.gate = RemoteSpan(LayerCall.of(made[0]))
        away = [PassThrough(self.gate.call) for _ in range(self.first, self.end)]
        self.layers = torch.nn.ModuleList([*made[: self.first], *away, *made[self.first :]])
        self.vacate(range(self.first, self.end))
        return 0, num_layers, self.layers

    def vacate(self, indices: Collection[int]) -> None:
        """Leave these places, which are one span, to the gate; empty: there is none."""
        assert self.layers is not None
        for index in indices:
            self.layers[index] = PassThrough(self.gate.call)
        if indices:
            self.layers[min(indices)] = self.gate


class Entry:
    """Before the first layer that runs at a stage: what `wait` returns takes the place of what the
    model hands to it.

    Attributes:
        wait: for the next step, once; None: the layer gets what it is given.
    """

    def __init__(self, layers: torch.nn.ModuleList, call: LayerCall) -> None:
        self.wait: Callable[[], Activations] | None = None
        self._layers = layers
        self._call = call
        self._hook: RemovableHandle | None = None

    def place(self, first: int) -> None:
        """Before that layer, and no other one."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._layers[first].register_forward_pre_hook(
            self._enter, prepend=True, with_kwargs=True
        )

    def _enter(
        self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        wait, self.wait = self.wait, None
        return None if wait is None else self._call.of_others(args, kwargs, wait())


class OnlySpan:
    """The stage's plan: the layers [first, end) alone.

    Attributes (after the model is built):
        layers: the model's layers; only the span's have weights.
        call: of one of them.
    """

    call: LayerCall

    def __init__(self, first: int, end: int, num_layers: int) -> None:
        """Raises LayersUnsupported: the model has no such layers, or none would stay elsewhere."""
        check_span(first, end, num_layers)
        self.first, self.end, self._num_layers = first, end, num_layers
        self.layers: torch.nn.ModuleList | None = None

    def make(self, num_layers: int, layer_fn: LayerFn, prefix: str) -> Made:
        _check_only_stack(num_layers, self._num_layers, self.layers, prefix)
        made = get_offloader().wrap_modules(
            layer_fn(prefix=f"{prefix}.{i}") for i in range(self.first, self.end)
        )
        self.call = LayerCall.of(made[0])
        self.layers = torch.nn.ModuleList(
            [PPMissingLayer() for _ in range(self.first)]
            + list(made)
            + [PPMissingLayer() for _ in range(self.end, num_layers)]
        )
        return self.first, self.end, self.layers

    def owner(self, model: torch.nn.Module) -> Any:
        """The module of `model` whose `start_layer` and `end_layer` say which of `layers` run.

        Raises LayersUnsupported.
        """
        for module in model.modules():
            if getattr(module, "layers", None) is self.layers and hasattr(module, "start_layer"):
                return module
        raise LayersUnsupported(
            f"{type(model).__name__} cannot be split: it does not say where its layers begin"
        )


def check_span(first: int, end: int, num_layers: int) -> None:
    """Raises LayersUnsupported: [first, end) leaves no first or no last layer of the model."""
    if not 0 < first < end < num_layers:
        raise LayersUnsupported(
            f"layers {first}:{end} of a model with {num_layers}: the first and the last one must "
            f"stay with the engine, so 1:{num_layers - 1} is the most"
        )


def _check_only_stack(
    num_layers: int, expected: int, layers: torch.nn.ModuleList | None, prefix: str
) -> None:
    if num_layers != expected or layers is not None:
        raise LayersUnsupported(
            f"the model builds layers at {prefix} beside its {expected} decoder layers: "
            "only models with one stack of layers can be split"
        )


_make_layers = model_utils.make_layers
_plan: Plan | None = None


def _make_planned_layers(num_hidden_layers: int, layer_fn: LayerFn, prefix: str) -> Made:
    if _plan is None:
        return _make_layers(num_hidden_layers, layer_fn, prefix)
    return _plan.make(num_hidden_layers, layer_fn, prefix)


@contextlib.contextmanager
def building(plan: Plan) -> Iterator[None]:
    """Models that this process builds inside have the plan's layers. Not reentrant."""
    global _plan
    assert _plan is None
    for name, module in list(sys.modules.items()):
        if name.startswith(_MODELS) and getattr(module, "make_layers", None) is _make_layers:
            module.make_layers = _make_planned_layers  # type: ignore[attr-defined]
    _plan = plan
    try:
        yield
    finally:
        _plan = None
