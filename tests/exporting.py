"""Networks with quantizers that have seen inputs, and what their export gives."""

from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from fitsmall.compressors import Quantize, compress
from fitsmall.compressors.export.agreement import Agreement
from fitsmall.compressors.export.onnx import Export
from fitsmall.compressors.surgery.quantizers import attach_quantizer

GENERATOR = torch.Generator().manual_seed(0)


class Conv1D(nn.Module):
    """As of Hugging Face: a linear layer whose weight is stored as (inputs, outputs)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def quantized(net: nn.Module, inputs: tuple[Tensor, ...], bits: int) -> nn.Module:
    """A network with random norms, of both signs, and quantizers that have seen inputs.

    Weights have 7 bits at most, with which no processor's sums saturate.
    """
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            for parameter in norm.parameters():
                nn.init.normal_(parameter, generator=GENERATOR)
    layers = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, Conv1D)
    quantizers = [attach_quantizer(m, bits) for m in net.modules() if isinstance(m, layers)]
    for quantizer in quantizers:
        quantizer.observing = True
    net.train()(*inputs)
    for quantizer in quantizers:
        quantizer.commit()
        quantizer.observing, quantizer.active = False, True
    columns = (nn.ConvTranspose2d, Conv1D)
    transposed = [n for n, m in net.named_modules() if isinstance(m, columns)]
    bits = min(bits, 7)
    compress(net, {"*": Quantize(bits)} | {n: Quantize(bits, axis=1) for n in transposed})
    return net.eval()


def worst(found: Export) -> Agreement:
    """Over the engines, both of which have run it."""
    assert found.agreement.keys() == {"onnxruntime", "OpenVINO"}
    each = found.agreement.values()
    return Agreement(
        max(a.difference for a in each),
        min(a.equal for a in each),
        min(a.decided for a in each),
        min(a.examples for a in each),
    )


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]
