"""Repair: one-shot compression that is fitted to data, and a word on what cannot be fitted."""

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fitsmall.compressors import (
    Block,
    KMeans,
    NofM,
    Projection,
    Quantize,
    TopK,
    Truncate,
    compress,
    restore,
    save,
)
from fitsmall.compressors.repair.batches import Batch, batches_of, compared
from fitsmall.compressors.repair.tuning import divergence, tune
from fitsmall.compressors.surgery.quantizers import attach_quantizer


class Net(nn.Module):
    """Layers of many kinds: grouped, strided, dilated, padded in all ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, stride=2, padding="valid", groups=4)
        self.conv3 = nn.Conv1d(16, 12, 3, padding="same", padding_mode="circular", dilation=2)
        self.fc = nn.Linear(12, 8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv2(torch.relu(self.norm1(self.conv1(images))))
        return self.fc(torch.relu(self.conv3(torch.relu(x).flatten(2))).mean(2))


class Text(nn.Module):
    """An embedding that also gives the outputs, and a position that no product uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.fc = nn.Linear(16, 16)
        self.unused = nn.Linear(3, 3)

    def forward(self, text: Tensor, mask: Tensor | None = None) -> Tensor:
        x = torch.tanh(self.fc(self.embedding(text)))
        return nn.functional.linear(x, weight=self.embedding.weight)


def net() -> Net:
    """A network with the statistics of its data, as training leaves them."""
    torch.manual_seed(0)
    made = Net()
    made.norm1.momentum = None
    nn.init.uniform_(made.norm1.bias, -0.5, 0.5)
    made(images())
    return made.eval()


def images() -> Tensor:
    """Smooth images, whose pixels are as correlated as those of real ones."""
    rough = torch.randn(64, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(rough, size=(9, 9), mode="bilinear")


@torch.no_grad()
def error(whole: Callable[[Tensor], Tensor], compressed: nn.Module, inputs: Tensor) -> float:
    expected, found = whole(inputs), compressed(inputs)
    return float((expected - found).square().mean() / expected.var())


@pytest.mark.parametrize(
    "projection",
    [
        TopK(0.7),
        TopK(0.5, NofM(2, 4)),
        TopK(0.5, Block(2, 2)),
        KMeans(8),
        Quantize(4),
        TopK(0.7) | KMeans(16),
        TopK(0.7) | Quantize(4),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:compress. nothing makes up")
def test_data_repair_what_a_projection_breaks(projection: Projection, tmp_path: Path) -> None:
    whole, plain, fitted = net(), net(), net().train()
    compress(plain, projection)
    codes = compress(fitted, projection, data=[(images(), "labels")])
    assert fitted.training
    assert error(whole, fitted.eval(), images()) < 0.2 * error(whole, plain, images())
    # Codes and module are what the projection allows, and so what the file holds.
    for name, code in codes.items():
        weight = fitted.get_parameter(name).detach()
        assert torch.equal(code.decode(), weight)
        assert torch.equal(projection.project(weight), weight)
    save(tmp_path / "net", fitted.state_dict())
    restored = restore(Net(), tmp_path / "net").eval()
    assert torch.equal(restored(images()), fitted(images()))


def test_what_cannot_be_fitted_is_named() -> None:
    torch.manual_seed(0)
    whole = Text()
    plain, fitted = copy.deepcopy(whole), copy.deepcopy(whole)
    text = torch.randint(20, (50, 8))  # ten rows are never read
    with pytest.warns(UserWarning, match="nothing makes up .* data=loader"):
        compress(plain, TopK(0.5))
    plan: dict[str, Projection] = {"*": TopK(0.5), "fc": Truncate(8)}
    with pytest.warns(UserWarning, match="as they are") as said:
        compress(fitted, plan, data=[{"text": text[:20]}, {"text": text[20:]}])
    (warning,) = said
    assert "form='channels') has no levels to choose from)" in str(warning.message)
    assert "unused.weight (no product of it with data was seen)" in str(warning.message)
    assert "embedding" not in str(warning.message)
    # Rows that are read often are worth more than others.
    expected = whole(text)[..., :20]
    losses = [(net(text)[..., :20] - expected).square().mean() for net in (fitted, plain)]
    assert losses[0] < 0.7 * losses[1]


class Conv1D(nn.Module):
    """Hugging Face's Linear with its weight transposed."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


@pytest.mark.parametrize("projection", [TopK(0.5, NofM(2, 4)), TopK(0.5) | Quantize(4)], ids=str)
@pytest.mark.parametrize(
    "made",
    [
        lambda: nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True),
        lambda: nn.Sequential(Conv1D(32, 16), nn.ReLU(), Conv1D(8, 32)),
    ],
)
@pytest.mark.filterwarnings("ignore:compress. nothing makes up")
def test_layers_that_multiply_in_other_ways_are_fitted(
    made: Callable[[], nn.Module], projection: Projection
) -> None:
    torch.manual_seed(0)
    whole = made().eval()
    inputs = torch.randn(40, 5, 16) @ torch.randn(16, 16)
    plain, fitted = copy.deepcopy(whole), copy.deepcopy(whole)
    compress(plain, projection)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out
        codes = compress(fitted, projection, data=[inputs])
    assert error(whole, fitted, inputs) < 0.4 * error(whole, plain, inputs)
    for name, code in codes.items():
        assert torch.equal(code.decode(), fitted.get_parameter(name))


@pytest.mark.parametrize("first", [nn.Linear(6, 8), nn.Conv1d(6, 8, 1, groups=2)])
def test_errors_count_as_the_outputs_see_them(first: nn.Module) -> None:
    """Outputs read the mean of four units: errors of units that cancel each other cost nothing."""
    torch.manual_seed(0)
    last = nn.Linear(8, 2, bias=False)
    last.weight.data = torch.tensor([[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [1.0] * 4])
    flatten = nn.Flatten() if isinstance(first, nn.Conv1d) else nn.Identity()
    whole = nn.Sequential(copy.deepcopy(first), flatten, last)
    inputs = torch.randn(200, 6, 1) if isinstance(first, nn.Conv1d) else torch.randn(200, 6)
    fitted, alone = copy.deepcopy(whole), copy.deepcopy(whole)
    compress(fitted, {"0": TopK(0.7)}, data=[inputs])
    compress(alone[0], TopK(0.7), data=[inputs])
    assert error(whole, fitted, inputs) < 0.2 * error(whole, alone, inputs)


class Classes(nn.Module):
    """Outputs and hidden units without derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).sign()).argmax(1)


def test_networks_without_derivatives_are_fitted_layer_by_layer() -> None:
    torch.manual_seed(0)
    module, inputs = Classes(), torch.randn(50, 8)
    expected = module.first(inputs).detach()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(module, TopK(0.5) | KMeans(4), data=[inputs])
    assert int((module.first.weight == 0).sum()) == 32
    assert error(lambda x: expected, module.first, inputs) < 0.3


def test_outputs_of_labels_and_symbols_are_logits() -> None:
    images, labels = torch.randn(6, 4), torch.tensor([0, 2, 1, 1, 0, 2])
    text = torch.randint(8, (6, 8))
    cases: list[tuple[nn.Module, Batch, Tensor, int | None]] = [
        (nn.Linear(4, 3), Batch((images,), {}, labels), torch.randn(6, 3), 1),
        (nn.Linear(4, 3), Batch((images,), {}, labels + 1), torch.randn(6, 3), None),  # no class 3
        (nn.Linear(4, 3), Batch((images,), {}), torch.randn(6, 3), None),
        (nn.Conv2d(3, 5, 1), Batch((images,), {}, torch.ones(6, 2, 2).long()),
         torch.randn(6, 5, 2, 2), 1),
        (nn.Embedding(8, 4), Batch((text,), {}), torch.randn(6, 8, 8), 2),  # as long as wide
        (nn.Embedding(9, 8), Batch((text,), {}), torch.randn(6, 8, 8), None),  # hidden units
        (nn.Embedding(8, 4), Batch((), {"input_ids": text}), torch.randn(6, 8, 8), 2),
    ]  # fmt: skip
    for module, batch, output, expected in cases:
        found = compared(module, batch, {"loss": torch.zeros(()), "out": output})
        assert [(tensor is output, logits) for tensor, logits in found] == [(True, expected)]


class Masked(nn.Linear):
    """Logits, of which one is impossible."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill(torch.arange(self.out_features) == 0, -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tuning_brings_the_whole_closer_and_keeps_what_is_shared(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.LayerNorm(32), Masked(32, 5)).to(dtype)
    inputs, labels = torch.randn(256, 6, dtype=dtype), torch.randint(4, (256,))
    batches = batches_of(zip(inputs.split(64), labels.split(64), strict=True), inputs.device)
    fitted = copy.deepcopy(whole)
    with pytest.warns(UserWarning, match="nothing makes up"):
        compress(fitted, TopK(0.5) | KMeans(3))
    weights = {name: p for name, p in fitted.named_parameters() if p.dim() == 2}
    free = {"2.weight": fitted[2].weight, "3.bias": fitted[3].bias}
    before = {name: p.detach().clone() for name, p in fitted.named_parameters()}

    def distance() -> Tensor:
        return divergence([fitted(inputs)], [(whole(inputs), 1)]).detach()

    start = distance()
    tune(fitted, whole, free, weights, batches)
    assert distance() < 0.8 * start
    for name, parameter in fitted.named_parameters():
        if name in weights:
            assert torch.equal(parameter == 0, before[name] == 0)
            pairs = torch.stack([parameter.detach(), before[name]], -1).flatten(0, 1)
            assert len(pairs.unique(dim=0)) == len(before[name].unique())
        assert torch.equal(parameter, before[name]) == (name not in {**free, **weights})


def test_a_layer_with_equal_inputs_needs_one_of_them() -> None:
    """Its weights make up for each other, and those of dead inputs are never kept."""
    layer, rows = nn.Linear(4, 1, bias=False), torch.randn(100, 1) * torch.tensor([[1.0, 1, 1, 0]])
    expected = layer(rows)
    compress(layer, TopK(0.75), data=[rows])
    torch.testing.assert_close(layer(rows), expected, rtol=0.05, atol=0)


class Routed(nn.Module):
    """Experts that may see no input, a layer under two names, and a forward that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6, sparse=True)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = self.same = nn.Linear(6, 6)
        self.head.bias.requires_grad_(False)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 1}

    def forward(self, text: Tensor, scores: Tensor) -> Tensor:
        x = self.embedding(text)
        scores.sub_(scores.amax(1, keepdim=True)).exp_()
        y = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            y[scores[:, k] == 1] = expert(x[scores[:, k] == 1])
        return self.same(self.head(y).relu_())


@pytest.mark.parametrize("projection", [TopK(0.5), TopK(0.5) | KMeans(4)], ids=str)
def test_what_belongs_to_the_user_stays(projection: Projection) -> None:
    """Gradients, frozen biases, the data, the mode, the names of layers, and random numbers."""
    torch.manual_seed(0)
    module, text = Routed(), torch.randint(9, (40,))
    scores = torch.randn(40, 3) - torch.tensor([0.0, 0.0, 99.0])
    scores[:20, 1] = -99.0  # one expert sees nothing of the first batch, and one nothing at all
    scores.requires_grad_()
    batches = [{"text": text[k], "scores": scores[k]} for k in (slice(20), slice(20, 40))]
    given, parameters = copy.deepcopy(scores), [*module.parameters()]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    random, bias = torch.get_rng_state(), module.head.bias.clone()
    with pytest.warns(UserWarning, match=r"as they are: experts\.2\.weight \(no product") as said:
        compress(module, projection, data=batches)
    assert len(said) == 1
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    for parameter in parameters:
        assert parameter.grad is None or bool((parameter.grad == 1).all())
    assert torch.equal(module.head.bias, bias)
    assert torch.equal(scores, given)
    assert scores.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert module.embedding.sparse
    assert all(layer.training for layer in module.modules())


def test_bad_data_are_refused_and_leave_the_module_as_it_is() -> None:
    module = net()
    before = copy.deepcopy(module.state_dict())
    cases: list[tuple[Any, type[Exception], str]] = [
        (images(), TypeError, "data is an iterable of batches, .* got a Tensor"),
        (["text"], TypeError, "batch 0 of data is a str"),
        (iter(()), ValueError, "no batch: .* used before"),
        ([images()[:, :3]], ValueError, "Net cannot take batch 0 of data: .* channels"),
        ([images(), images() * torch.nan], ValueError, r"conv1\.weight, or inputs .* NaN"),
    ]
    for data, kind, message in cases:
        with pytest.raises(kind, match=message):
            compress(module, Quantize(8), data=data, activation_bits=8)
    with pytest.raises(ValueError, match="activation_bits needs data"):
        compress(module, Quantize(8), activation_bits=8)
    locked = nn.Linear(2, 2)
    locked.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"Linear cannot be copied, .* lock"):
        compress(locked, Quantize(8), data=[torch.ones(1, 2)])
    assert module.state_dict().keys() == before.keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_quantization_after_training_in_one_call(tmp_path: Path) -> None:
    whole, quantized = net(), net().train()
    compress(quantized, Quantize(8), data=[images()], activation_bits=8)
    assert all(layer.training for layer in quantized.modules())
    quantized.eval()
    assert int(quantized.conv2.input_quantizer.bits) == 8
    assert 0 < error(whole, quantized, images()) < 1e-3
    save(tmp_path / "net", quantized.state_dict())
    restored = restore(Net(), tmp_path / "net").eval()
    assert torch.equal(restored(images()), quantized(images()))
    with pytest.warns(UserWarning, match=r"weight_hh_l0 \(no product .*, and inputs are not round"):
        compress(nn.LSTM(4, 4), Quantize(8), data=[torch.randn(5, 3, 4)], activation_bits=8)
    # Fewer bits cut off outliers.
    outliers = torch.cat([torch.rand(1, 1000), torch.full((1, 1), 20.0)], 1)
    quantizer = attach_quantizer(nn.Linear(1, 1), 3)
    quantizer.calibrate(0.0, 20.0, outliers)
    assert 1 < quantizer(torch.tensor([30.0])) < 20


def test_a_single_example_is_enough_data() -> None:
    """Inputs of a layer that never vary leave no variance but rounding errors."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    data = [torch.randn(1, 3, 8, 8).expand(64, -1, -1, -1)]
    expected = net(data[0])
    compress(net, Quantize(8), data=data)
    assert torch.allclose(net(data[0]), expected, atol=0.01 * float(expected.abs().max()))
