"""Where a step's activations come to a stage's layers; no engine is started."""

import time

import pytest
import torch

from mcp_vllm.split.activations import Activations
from mcp_vllm.split.engine.layer_timer import LayerTimer
from mcp_vllm.split.engine.layers import Entry, LayerCall

OLD = Activations(torch.full((3, 2), -1.0), torch.full((3, 2), -2.0))
ROWS = Activations(torch.full((3, 2), 10.0), torch.full((3, 2), 20.0))


class Adding(torch.nn.Module):
    def forward(
        self, positions: int, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states + 1, residual + positions


class AddingAlone(torch.nn.Module):
    def forward(self, positions: int, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + 1


def stack(kind: type[torch.nn.Module] = Adding) -> tuple[torch.nn.ModuleList, Entry]:
    layers = torch.nn.ModuleList([kind() for _ in range(4)])
    return layers, Entry(layers, LayerCall.of(layers[0]))


def run(layers: torch.nn.ModuleList) -> Activations:
    hidden, residual = OLD.hidden, OLD.residual
    for layer in layers:
        hidden, residual = layer(5, hidden, residual=residual)
    return Activations(hidden, residual)


@pytest.mark.parametrize("first", [0, 2])
def test_what_is_awaited_takes_the_place_of_what_the_model_hands_on(first):
    layers, entry = stack()
    entry.place(1)
    entry.place(first)
    entry.wait = lambda: ROWS
    result = run(layers)
    assert torch.equal(result.hidden, ROWS.hidden + 4 - first)
    assert torch.equal(result.residual, ROWS.residual + 5 * (4 - first))
    assert torch.equal(run(layers).hidden, OLD.hidden + 4)  # once


def test_layers_without_a_residual_get_their_rows():
    layers, entry = stack(AddingAlone)
    entry.place(0)
    entry.wait = lambda: Activations(ROWS.hidden, None)
    assert torch.equal(layers[0](positions=5, hidden_states=OLD.hidden), ROWS.hidden + 1)


def test_a_wait_in_which_others_have_their_turn_keeps_to_its_own_rows():
    layers, entry = stack()
    entry.place(0)

    def another_runs() -> Activations:
        entry.place(2)
        entry.wait = lambda: Activations(OLD.hidden * 100, OLD.residual)
        assert torch.equal(run(layers[2:]).hidden, OLD.hidden * 100 + 2)
        entry.place(0)
        return ROWS

    entry.wait = another_runs
    assert torch.equal(run(layers).hidden, ROWS.hidden + 4)


def test_an_error_while_waiting_leaves_the_model():
    layers, entry = stack()
    entry.place(0)

    def lost() -> Activations:
        raise ConnectionError

    entry.wait = lost
    with pytest.raises(ConnectionError):
        run(layers)
    assert torch.equal(run(layers).hidden, OLD.hidden + 4)


def test_waiting_does_not_count_as_the_layers_time():
    layers, entry = stack()
    timer = LayerTimer(layers, torch.device("cpu"))
    entry.place(0)
    waited = []

    def wait() -> Activations:
        started = time.perf_counter()
        while time.perf_counter() < started + 0.05:
            pass
        waited.append(time.perf_counter() - started)
        return ROWS

    entry.wait = wait
    started = time.perf_counter()
    run(layers)
    assert sum(timer.seconds) <= time.perf_counter() - started - waited[0]
