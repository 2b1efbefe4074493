"""Export of networks of others: their norms, their signatures, their own ways with weights."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from exporting import GENERATOR, Conv1D, operators, quantized, worst
from torch import Tensor, nn
from torch.nn import functional

from fitsmall.compressors.export.engines import ENGINES, session
from fitsmall.compressors.export.onnx import export_onnx


class NormAct(nn.BatchNorm2d):
    """As of timm: a norm with an activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        active: Tensor = self.act(super().forward(x))
        return active


class Activated(nn.Module):
    """A norm with an activation, and one of what a Linear gives for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm1 = nn.Conv2d(3, 8, 3), NormAct(8)
        self.linear, self.norm2 = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm1(self.conv(x)).flatten(2))
        return self.norm2(y.flatten(0, 1)).reshape_as(y)


def test_a_norm_is_folded_up_to_its_activation_and_across_positions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 4, 5, generator=GENERATOR)
    found = export_onnx(quantized(Activated(), (x,), 8), tmp_path / "net.onnx", x)
    kinds = operators(tmp_path / "net.onnx")
    assert kinds.count("Relu") == 1
    assert "BatchNormalization" not in kinds
    assert worst(found).difference < 0.05


class Signature(nn.Module):
    """Arguments of all kinds, and outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(3, 5)

    def forward(self, *inputs: Tensor, mask: Tensor, **more: Tensor) -> dict[str, Any]:
        y = self.left(inputs[0])
        return {"masked": y * mask, "nested": [self.right(more["z"]), None, y > 0]}


def test_any_signature_and_nested_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Positional(Signature):
        def forward(self, *inputs: Tensor) -> dict[str, Any]:  # type: ignore[override]
            return super().forward(inputs[0], mask=inputs[1], z=inputs[2])

    class Named(Signature):
        def forward(self, x: Tensor, **named: Tensor) -> dict[str, Any]:  # type: ignore[override]
            return super().forward(x, **named)

    given = torch.randn(16, 6), torch.ones(16, 1), torch.randn(16, 3)
    net = quantized(Positional(), given, 8)
    assert worst(export_onnx(net, tmp_path / "net.onnx", given)).difference < 0.01
    net.__class__ = Named
    named = {"z": given[2], "x": given[0], "mask": given[1]}
    assert worst(export_onnx(net, tmp_path / "net.onnx", named)).difference < 0.01
    for engine in ENGINES:
        run = session(engine, tmp_path / "net.onnx", threads=1, names=list(named))
        masked, right, _ = run([x[:3] for x in named.values()])
        assert torch.allclose(masked, net(**{k: x[:3] for k, x in named.items()})["masked"])
        assert right.shape == (3, 5)


class Readers(nn.Module):
    """Weights that are read: by the network, by their own layer, by others, through norms."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.lent = nn.Linear(6, 6), nn.Linear(6, 6)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.old = torch.nn.utils.weight_norm(nn.Linear(6, 6))
        self.columns, self.tied = Conv1D(4, 6), nn.Linear(4, 9, bias=False)
        self.embedding = nn.Embedding(9, 4)
        self.tied.weight = self.embedding.weight

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        assert self.asked.weight.shape == (6, 6)
        x = self.asked(x.to(self.asked.weight.device, self.asked.weight.dtype))
        x = self.lent(x) + functional.linear(x, self.lent.weight, self.lent.bias)
        x = self.columns(self.old(self.normed(x)))
        logits: Tensor = self.tied(x + self.embedding(index))
        return logits


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_weights_that_others_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(16, 6), torch.randint(0, 9, (16,))
    net = quantized(Readers(), inputs, 4)
    net(*inputs)  # the old norm's weight has a gradient now
    found = export_onnx(net, tmp_path / "net.onnx", inputs)
    assert found.integer == ("asked", "lent", "normed", "columns", "tied")
    assert found.floating == ("old",)
    assert worst(found).difference < 0.01
    scales = {
        tensor.name: tensor.dims for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer
    }
    assert scales["columns.scales"] == [4]
    net(*inputs)


class Stubborn(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        y: Tensor = self.layer(x)
        if self.kind == "branches":
            if y.sum() > 0:
                y = 2 * y
            return y
        if self.kind == "fixed":
            return y.reshape(16, 6)
        if self.kind == "random":
            return y + torch.rand_like(y)
        return y.tolist()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("branches", r"test_export_networks.py:\d+, `if y.sum\(\) > 0:`.*use torch.where"),
        ("fixed", "is for 16 examples alone: derive shapes from those of the inputs"),
        ("random", "returns NaN, or other outputs each time"),
        ("list", "returns no tensors"),
    ],
)
def test_a_forward_that_cannot_be_exported_is_told_in_a_sentence(
    kind: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 6, generator=GENERATOR)
    net = quantized(Stubborn(kind), (x,), 8)
    with pytest.raises(ValueError, match=f"the forward of Stubborn .*{message}") as raised:
        export_onnx(net, tmp_path / "net.onnx", x)
    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")
