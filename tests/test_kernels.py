"""Layers that skip zeros: equal outputs, a choice by measurement, and what is refused."""

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fitsmall.compressors import Block, TopK
from fitsmall.compressors.kernels import accelerate, choice, product
from fitsmall.compressors.kernels.layers import SparseConvolution, SparseLayer, SparseLinear
from fitsmall.compressors.surgery.quantizers import attach_quantizer


class Conv1D(nn.Module):
    """As in Hugging Face's transformers."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], self.nf)


def pruned(module: nn.Module, zeros: float = 0.8) -> nn.Module:
    """The module with zeros at random, in evaluation mode."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data *= torch.rand_like(parameter) > zeros
    return module.eval()


LAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Linear(37, 24), (37,)),
    (lambda: nn.Linear(37, 24), (1, 37)),
    (lambda: nn.Linear(37, 24, bias=False), (3, 5, 37)),
    (lambda: nn.Linear(8, 4), (0, 8)),
    (lambda: nn.Linear(100, 8), (70, 100)),
    (lambda: weight_norm(nn.Linear(37, 24)), (5, 37)),
    (lambda: Conv1D(8, 12), (2, 3, 12)),
    (lambda: nn.Conv2d(6, 8, 3), (3, 6, 9, 11)),
    (lambda: nn.Conv2d(6, 8, 3, padding=1, stride=2), (3, 6, 10, 11)),
    (lambda: nn.Conv2d(6, 8, (3, 5), (2, 3), (1, 4), (2, 1), groups=2), (3, 6, 19, 21)),
    (lambda: nn.Conv2d(8, 8, 3, groups=8, padding="same"), (2, 8, 7, 7)),
    (lambda: nn.Conv2d(8, 12, (3, 5), padding="same", dilation=3), (2, 8, 17, 27)),
    (lambda: nn.Conv1d(4, 8, 4, padding="same"), (2, 4, 11)),  # one more zero after than before
    (lambda: nn.Conv2d(16, 8, 1, stride=2), (16, 9, 9)),
    (lambda: nn.Conv2d(2, 8, 1, padding="valid"), (1, 2, 1, 1)),
    (lambda: nn.Conv1d(4, 8, 5, stride=2, padding=2, bias=False), (2, 4, 50)),
    (lambda: nn.Conv3d(2, 4, 3, padding=1, stride=(1, 2, 1)), (2, 2, 5, 6, 7)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", LAYERS, ids=range(len(LAYERS)))
@torch.no_grad()
def test_outputs_are_those_of_the_layer(
    case: tuple[Callable[[], nn.Module], tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    make, shape = case
    layer, x = pruned(make()), torch.randn(shape)
    kind = SparseConvolution if hasattr(layer, "groups") else SparseLinear
    expected = layer(x)
    for rows in (1, 4):
        if getattr(layer, "groups", 1) == 8 and rows == 4:
            continue  # a block lies within a group
        sparse = kind(copy.deepcopy(layer), rows)
        assert torch.equal(sparse.weight, layer.weight)
        if getattr(sparse, "_csr", None) is not None:
            with monkeypatch.context() as patch:
                patch.setattr(torch.backends.mkl, "is_available", lambda: False)
                without = kind(copy.deepcopy(layer), rows)
            assert without._csr is None
            torch.testing.assert_close(without(x), expected, rtol=1e-5, atol=1e-5)
        for share in (product._SHARE, 1):  # in one part, and in a part for each of three threads
            monkeypatch.setattr(product, "_SHARE", share)
            monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
            found = sparse(x)
            assert found.is_contiguous()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        # The sizes of the last input are remembered, and others are not taken for them.
        more = torch.cat([x, x], -1) if kind is SparseConvolution else torch.cat([x[None], x[None]])
        torch.testing.assert_close(sparse(more), layer(more), rtol=1e-5, atol=1e-5)


Times = dict[str, float]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Times:
    """The seconds that each kernel, and the whole module as ``"fast"``, will be said to take."""
    times: Times = {"dense": 1.0, "CSR": 0.5, "BSR 4x1": 0.7, "fast": 0.5}

    def interleaved(
        runs: Mapping[str, Callable[[], object]], least: float = 0.0
    ) -> dict[str, list[float]]:
        for run in runs.values():
            run()
        # A busy machine slows all kernels alike in the last round.
        rounds = [(1, 0), (1, 0), (1, 0), (1, 1), (10, 1)]
        noise = times.get("noise", 0.0)  # of the first kernel, in two rounds of five
        return {
            name: [
                slower * (times[name] + noise * (name == "CSR") * more) for slower, more in rounds
            ]
            for name in runs
        }

    monkeypatch.setattr(choice, "interleaved", interleaved)
    return times


@pytest.mark.parametrize(
    ("measured", "kernel"),
    [
        ({}, "CSR"),
        ({"BSR 4x1": 0.4}, "BSR 4x1"),
        ({"CSR": 0.96, "BSR 4x1": 1.2}, "dense"),  # not clearly faster
        ({"CSR": 0.8, "BSR 4x1": 0.9, "noise": 0.3}, "dense"),  # faster in three rounds of five
        ({"fast": 1.01}, "dense"),
    ],
)
def test_the_fastest_kernel_is_chosen(timed: Times, measured: Times, kernel: str) -> None:
    timed |= measured
    net = pruned(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Conv1d(8, 3, 1), nn.Flatten(0)))
    net[0].weight.data[:4] = 0
    net[2].weight.data[:] = 1
    fast = accelerate(net, torch.ones(8, 16))
    first, second = fast.choices.layers
    assert first.kernel == kernel
    assert isinstance(fast[0], SparseLayer) == (kernel != "dense")
    assert (first.layer, first.shape, first.input) == ("0", (8, 16), (8, 16))
    if "noise" not in timed:
        assert first.seconds == {name: timed[name] for name in ("dense", "CSR", "BSR 4x1")}
    assert first.zeros == 1 - int(net[0].weight.count_nonzero()) / 128
    assert (second.kernel, second.reason) == ("dense", "fewer than 30% zeros")
    printed = str(fast.choices)
    assert re.search(r"0 +8x16 +\d+\.\d% +8x16 +1000\.000 ", printed)
    if timed["fast"] > 1:
        assert first.reason == "the module as a whole is no faster"
        assert "1.00 times as fast" in printed
    elif kernel != "dense":
        assert "2.00 times as fast" in printed
    torch.testing.assert_close(fast(torch.ones(8, 16)), net(torch.ones(8, 16)))


def test_pruned_blocks_need_no_more_memory_than_their_weights(timed: Times) -> None:
    timed["BSR 4x1"] = 0.4
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Conv2d(4, 8, 3))
    for layer in (net[0], net[2]):
        layer.weight.data = TopK(0.75, structure=Block(4, 4)).project(layer.weight.data)
    for layer, x in ((net[0], torch.ones(8, 32)), (net[2], torch.ones(2, 4, 8, 8))):
        fast = accelerate(layer, x)
        assert isinstance(fast, SparseLayer)
        assert fast.matrix.values.size == int(layer.weight.count_nonzero())


class Twice(nn.Module):
    """One layer under two names, a layer that shares its weight, and one that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.first.weight
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tied(self.again(self.first(x))) + self.first.weight.sum()
        return self.attention(y, y, y)[0]  # type: ignore[no-any-return]


def test_the_module_is_left_as_it_is(timed: Times) -> None:
    torch.manual_seed(0)
    module, x = pruned(Twice()).train(), torch.randn(3, 8)
    module.first.register_forward_hook(lambda layer, inputs, output: 2 * output)
    quantizer = attach_quantizer(module.first, bits=8)
    quantizer.observing = True
    module(x)
    quantizer.commit()
    quantizer.observing, quantizer.active = False, True
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fast = accelerate(module, x)
    assert all(layer.training for layer in module.modules())
    assert module.first.weight.requires_grad
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    assert isinstance(fast.first, SparseLinear)
    assert fast.first is fast.again
    assert fast.tied is not fast.first
    reasons = {mine.layer: mine.reason for mine in fast.choices.layers}
    assert "not called" in reasons["attention.out_proj"]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), module.eval()(x))
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    # Dense layers share their memory, but not their parameters.
    shared = fast.attention.out_proj.weight
    assert shared.data_ptr() == module.attention.out_proj.weight.data_ptr()
    fast.to(torch.float64)
    assert module.attention.out_proj.weight.dtype == torch.float32


def test_a_copy_can_be_copied_and_pickled(timed: Times) -> None:
    net = pruned(nn.Sequential(nn.Linear(16, 8)))
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        torch.set_warn_always(True)
        fast = accelerate(net, torch.ones(8, 16))
        x = torch.randn(1, 16)
        for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            torch.testing.assert_close(twin(x), net(x))
        torch.set_warn_always(False)
    assert not seen  # of torch, that its CSR tensors are in beta


def test_what_an_accelerated_module_refuses(timed: Times) -> None:
    fast = accelerate(pruned(nn.Sequential(nn.Linear(16, 8))), torch.ones(8, 16))
    for act in (
        lambda: fast.train(),
        lambda: fast.state_dict(),
        lambda: fast.load_state_dict({}),
        lambda: fast(torch.ones(8, 16, requires_grad=True)),
    ):
        with pytest.raises(RuntimeError, match=r"an accelerated .* the module that it was made"):
            act()
    with pytest.raises(TypeError, match="takes float32 on the CPU"):
        fast(torch.ones(8, 16).double())
    with pytest.raises(ValueError, match=r"16 inputs got an input of \(8, 15\)"):
        fast(torch.ones(8, 15))
    conv = SparseConvolution(nn.Conv2d(4, 4, 3).eval(), rows=1)
    with pytest.raises(ValueError, match=r"4 channels got an input of \(1, 3, 8, 8\)"):
        conv(torch.ones(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"images of \(2, 8\) are smaller"):
        conv(torch.ones(1, 4, 2, 8))
    with pytest.raises(ValueError, match=r"weight is on meta: module\.cpu\(\) first"):
        accelerate(nn.Linear(2, 2, device="meta"), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"put them together in 0: give the module"):
        accelerate(nn.Sequential(torch.compile(nn.Linear(2, 2))), torch.ones(1, 2))


class Doubled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Rotated(nn.Conv2d):
    """A layer whose own forward is another's."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.flip(-1), bias)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_layers_stay_dense_for_a_reason(timed: Times) -> None:
    vector, image = torch.randn(8, 16), torch.randn(2, 4, 8, 8)
    reflecting = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    for layer, x, reason in (
        (Doubled(16, 8), vector, "no sparse kernel does what its forward does"),
        (reflecting, image, "no sparse kernel does what its forward does"),
        (Rotated(4, 4, 3), image, "CSR has other outputs"),
        (nn.Linear(16, 8).double(), vector.double(), "float32"),
        (nn.utils.weight_norm(nn.Linear(16, 8)), vector, "remove the weight norm"),
    ):
        with torch.no_grad():
            pruned(layer)(x)
        fast = accelerate(layer, x)
        (mine,) = fast.choices.layers
        assert mine.kernel == "dense"
        assert reason in mine.reason
        assert type(fast) is type(layer)


def test_real_time_is_measured() -> None:
    """A layer of zeros takes no time: the one statement on time that holds on every machine."""
    net = nn.Linear(1024, 1024)
    net.weight.data.zero_()
    fast = accelerate(net, torch.ones(128, 1024))
    assert isinstance(fast, SparseLinear)
    assert fast.choices.speedup > 1
    assert set(fast.choices.layers[0].seconds) == {"dense", "CSR", "BSR 4x1"}
