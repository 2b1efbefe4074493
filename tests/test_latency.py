"""Latency of networks in engines."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fitsmall.compressors import timing
from fitsmall.compressors.export import latency
from fitsmall.compressors.export.latency import forward_of, latency_ratio


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.gate(x).sigmoid() * self.value(x) * scale


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_engines_run_a_network_as_it_was_called(engine: str) -> None:
    if engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    network, x, scale = Gated().eval(), torch.randn(2, 6), torch.randn(2, 8)
    forward_of(engine, network, [x, scale], {})()
    run = forward_of(engine, network, [x], {"scale": scale})
    if engine == "onnxruntime":
        (found,) = run()  # type: ignore[misc]
        torch.testing.assert_close(found, network(x, scale))


def test_each_network_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than torch.compile keeps of one function, and the user's own after that."""
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(latency.torch, "compile", partial(torch.compile, backend=backend))
    x = torch.randn(2, 6)
    for width in range(2, 12):
        network = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2)).eval()
        forward_of("compiled", network, [x], {})()
    torch.compile(network)(x)
    assert len(compiled) == 11


def test_ratios_are_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine becomes slower all the time, and a network takes half the time of the other."""
    now = 0.0

    def wait(seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += seconds * (1 + now)

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    found = latency_ratio(wait(0.0005), wait(0.001), rounds=9, least=0.002)
    assert found.median == pytest.approx(0.5, rel=0.05)
    assert 0 < found.spread < 0.1
