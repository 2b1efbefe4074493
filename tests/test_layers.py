"""Every kind of layer is compressed by default, along its own outputs and inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from fitsmall.compressors import NofM, Quantize, TopK, compress, restore, save, select
from fitsmall.compressors.codes.code import Integer
from fitsmall.compressors.training import (
    GradualPruning,
    LearningCompression,
    Plan,
    QuantizationAwareTraining,
    RankLearning,
    Stage,
    WeightSharing,
)
from fitsmall.compressors.weights import Matrices, matrices_of


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Conv1D(nn.Module):
    """The Linear layer of Hugging Face's GPT-2, with a weight of (inputs, outputs)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """Two fused experts, as Mixtral and, transposed, GPT-OSS have them."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        shape = (2, 8, 12) if transposed else (2, 12, 8)
        self.up = nn.Parameter(torch.randn(shape))
        self.up_bias = nn.Parameter(torch.zeros(2, 12))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.up if self.is_transposed else self.up.transpose(1, 2)
        return (x @ weight + self.up_bias.unsqueeze(1)).sum(0)


class Bare(nn.Module):
    """A module of an unknown class, as of graph networks, with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.lin_src = nn.Parameter(torch.randn(12, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 4, 8))
        self.cls_token = nn.Parameter(torch.randn(1, 2, 8))
        self.scale = nn.Parameter(torch.ones(12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (
            (x + self.pos_embed.mean() + self.cls_token.mean()) @ self.lin_src.T * self.scale.mean()
        )


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.position_embeddings = nn.EmbeddingBag(20, 8), nn.Embedding(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bag(x.argsort(1)) + self.position_embeddings.weight.mean()


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Matrices]]] = {
    "Conv1D": (lambda: Conv1D(12, 8), {"weight": Matrices("", 1, 0)}),
    "experts": (lambda: Experts(transposed=False), {"up": Matrices("", 1, 2, None)}),
    "transposed experts": (lambda: Experts(transposed=True), {"up": Matrices("", 2, 1, None)}),
    "bare": (Bare, {"lin_src": Matrices("")}),
    "bag": (Bag, {"bag.weight": Matrices("bag")}),
    "LSTM": (
        lambda: Recurrent(nn.LSTM),
        {f"rnn.weight_{kind}_l0": Matrices("rnn", parts=4) for kind in ("ih", "hh")},
    ),
    "GRU": (
        lambda: Recurrent(nn.GRU),
        {f"rnn.weight_{kind}_l0": Matrices("rnn", parts=3) for kind in ("ih", "hh")},
    ),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 12))),
        {"0.parametrizations.weight.original1": Matrices("0")},
    ),
    "spectral norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 12))),
        {"0.parametrizations.weight.original": Matrices("0")},
    ),
    "old weight norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(8, 12))),
        {"0.weight_v": Matrices("0")},
    ),
}


def train(module: nn.Module, *stages: Any) -> Plan:
    """Train for ten steps."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    plan = Plan(stages, module)
    plan.hook([optimizer])
    plan.begin(horizon=10)
    for _ in range(10):
        plan.open()
        optimizer.zero_grad()
        module(torch.randn(6, 8)).square().mean().backward()
        plan.restore_(optimizer)
        optimizer.step()
        plan.advance()
    plan.finish()
    return plan


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("layer", LAYERS)
def test_every_kind_of_layer(layer: str, tmp_path: Path) -> None:
    """Each matrix of a stack has the sparsity, each output channel a scale of its own, and the file
    gives a plain module the trained values."""
    make, forms = LAYERS[layer]
    module = make()
    plan = train(
        module,
        GradualPruning(0.5, allocation="uniform", stop=0.3),
        QuantizationAwareTraining(4, None, start=0.4, stop=0.8),
    )
    _, quantization = plan.stages
    assert dict(quantization.selection.forms) == forms
    for name, form in forms.items():
        weight = module.get_parameter(name)
        matrices = form.split(weight)
        assert torch.equal(form.join(matrices), weight)
        assert matrices.shape[1:] == form.matrix_shape(weight.shape)
        for matrix in matrices:
            assert (matrix == 0).sum() >= matrix.numel() // 2
            for row in matrix:  # an output channel
                assert len(row.unique()) <= 16
        assert quantization.scales[name].numel() == matrices.shape[0] * matrices.shape[1]
    save(tmp_path / "file", module.state_dict())
    fresh = restore(make(), tmp_path / "file")
    x = torch.randn(6, 8)
    module.eval()
    assert torch.equal(fresh.eval()(x), module(x))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_file_of_quantized_experts_is_small(transposed: bool, tmp_path: Path) -> None:
    """Eight experts of 64 x 64 with four bits each: half a byte a weight, and scales."""
    module = Experts(transposed)
    module.up = nn.Parameter(torch.randn(8, 64, 64))
    Plan([stage := QuantizationAwareTraining(4, None)], module)
    stage.choose({"up": module.up.detach()}, strength=1.0)
    with torch.no_grad():
        stage.project_("up", module.up, strength=1.0)
    size = save(tmp_path / "file", {"up": module.up.detach()})
    assert size < 8 * 64 * 64 // 2 + 8 * 64 * 2 + 200


@pytest.mark.filterwarnings("ignore:compress. nothing makes up")
def test_scales_without_training_are_of_outputs() -> None:
    for layer, axis in (
        (Conv1D(6, 16), 1),
        (nn.ConvTranspose2d(16, 6, 3), 1),
        (nn.Conv2d(16, 6, 3), 0),
    ):
        code = compress(layer, TopK(0.5) | Quantize(4))["weight"]
        assert isinstance(code, Integer)
        assert [n for n in code.scales.shape if n > 1] == [6]
        assert code.scales.shape[axis] == 6


def test_what_a_layer_multiplies_by_is_sparse() -> None:
    """Weight norm and spectral norm keep zeros; an orthogonal weight is left out and said so."""
    net = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 8)),
        parametrizations.spectral_norm(nn.Linear(8, 8)),
        parametrizations.orthogonal(nn.Linear(8, 8)),
    )
    plan = train(net, GradualPruning(0.75, "magnitude", "uniform", stop=0.5))
    normed, spectral, orthogonal = (int((layer.weight == 0).sum()) for layer in net)
    assert 40 <= normed <= 48  # each row keeps a weight
    assert (spectral, orthogonal) == (48, 0)
    reason = "its layer computes the weight from it by more than scaling"
    assert f"left out ({reason}): 2.parametrizations.weight.original;" in str(plan)
    with pytest.raises(ValueError, match=reason):
        select(net, include="2.parametrizations*")


def test_a_normed_slice_keeps_a_weight() -> None:
    """Of the weight's rows two are much smaller than the others; weight norm divides by norms."""
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 4)))
    direction = net.get_parameter("0.parametrizations.weight.original1")
    with torch.no_grad():
        direction[:2] *= 1e-3
    train(net, GradualPruning(0.7, stop=0.5))
    assert (direction != 0).any(1).all()
    assert net[0].weight.isfinite().all()


def test_n_of_m_counts_inputs() -> None:
    """Of transposed weights, too: groups of four inputs of one output have two weights."""
    layer = Conv1D(6, 8)
    train(layer, GradualPruning(structure=NofM(2, 4), stop=0.5))
    assert torch.equal((layer.weight.T != 0).view(6, 2, 4).sum(2), torch.full((6, 2), 2))


@pytest.mark.parametrize(("granularity", "scales"), [("tensor", (4, 1)), (8, (24, 2))])
def test_scales_of_gates(granularity: Any, scales: tuple[int, ...]) -> None:
    form = matrices_of(nn.LSTM(16, 6), "weight_ih_l0")
    assert form.scale_shape((24, 16), granularity) == scales


def test_inputs_of_parametrized_layers_are_quantized(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 12)), nn.ReLU())

    net = make()
    train(net, QuantizationAwareTraining(8, 8, start=0.4, observe_steps=3))
    save(tmp_path / "file", net.state_dict())
    fresh, x = restore(make(), tmp_path / "file"), torch.randn(6, 8)
    assert fresh[0].input_quantizer.active
    assert torch.equal(fresh.eval()(x), net.eval()(x))


def test_learned_positions_stay_out_unless_asked_for() -> None:
    text = str(Plan([GradualPruning()], Bag()))
    assert "left out (learned positions): position_embeddings.weight; 16.7 %, 128 bytes" in text
    assert "position_embeddings.weight" in select(Bag(), include="position_embeddings").chosen


def test_a_criterion_leaves_out_what_it_cannot_score() -> None:
    net = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 40))
    text = str(Plan([GradualPruning(criterion="activation")], net))
    assert "left out (the inputs of a Embedding have no norms): 0.weight; 30.8 %" in text
    with pytest.raises(ValueError, match=r"exclude 0\.weight, or choose another criterion"):
        Plan([GradualPruning(criterion="activation", include="0")], net)


class Deep(nn.Module):
    """Three hundred layers in blocks of five, with norms between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleDict(
                    {
                        "convs": nn.ModuleList(nn.Conv2d(4, 4, 3) for _ in range(4)),
                        "norm": nn.BatchNorm2d(4),
                        "fc": nn.Linear(8, 8),
                    }
                )
                for _ in range(15)
            )
            for _ in range(4)
        )


def test_the_plan_of_a_deep_network_is_short() -> None:
    stages = [
        GradualPruning(0.9),
        WeightSharing(8),
        QuantizationAwareTraining(8, 8, include="*fc*"),
    ]
    text = str(Plan(stages[:2], Deep()))
    lines = text.split("\n")
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 200
    assert "stages.0-3.0-14.convs.0-3.weight  240 x  34,560  85.7 %" in text
    text = str(Plan([stages[0], QuantizationAwareTraining(8, 8)], Deep()))
    assert len(text.split("\n")) <= 40


@pytest.mark.parametrize(
    ("settings", "warned"),
    [({}, True), ({"exclude": "position_embeddings"}, False), ({"include": "bag"}, False)],
)
def test_low_coverage_warns(
    settings: dict[str, Any], warned: bool, recwarn: pytest.WarningsRecorder
) -> None:
    module = Bag()
    module.position_embeddings = nn.Embedding(20, 8)
    train(module, GradualPruning(0.5, stop=0.5, **settings))
    text = "\n".join(str(warning.message) for warning in recwarn)
    assert ("GradualPruning acts on 50% of the weights. The largest left out: " in text) == warned
    if warned:
        assert "position_embeddings.weight (50%: learned positions)" in text
        assert "add a second GradualPruning(include=['position_embeddings.weight'])" in text


@pytest.mark.parametrize(
    "stage",
    [
        GradualPruning(0.5, overrides={"0": 0.75}),
        WeightSharing(4, overrides={"0": 2}),
        QuantizationAwareTraining(8, overrides={"0": 4}),
        LearningCompression({"0": TopK(0.75), "1": TopK(0.5)}),
    ],
    ids=lambda stage: type(stage).__name__,
)
def test_patterns_match_layers_that_join_later(stage: Stage) -> None:
    net = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 4))
    stage.attach(net)
    assert [*stage.selection.chosen] == ["1.weight"]
    net(torch.ones(1, 8))
    net[1].requires_grad_(False)
    stage.attach(net)
    assert [*stage.selection.chosen] == ["0.weight"]


def test_layers_that_ranks_cannot_take_are_not_advised(recwarn: pytest.WarningsRecorder) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    module[0].position_embeddings = nn.Embedding(20, 8)
    train(module, RankLearning(price=0.1, stop=0.5))
    (text,) = (str(each.message) for each in recwarn if "RankLearning acts on" in str(each.message))
    assert "position_embeddings.weight" in text
    assert "include=" not in text


def test_a_stage_whose_weights_are_frozen_warns(recwarn: pytest.WarningsRecorder) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    module[0].weight.requires_grad = module[1].weight.requires_grad = False
    train(module, GradualPruning(0.5, stop=0.5))
    text = "\n".join(str(warning.message) for warning in recwarn)
    assert "GradualPruning acts on nothing, since all of its weights are frozen: 0.weight" in text
    assert "acts on nothing" in str(Plan([GradualPruning(0.5)], module))


def test_a_layer_that_loses_nearly_everything_is_named(recwarn: pytest.WarningsRecorder) -> None:
    net = nn.Sequential(nn.Linear(8, 400), nn.Linear(400, 8))
    with torch.no_grad():
        net[1].weight *= 1e-4
    train(net, GradualPruning(0.6, "magnitude", stop=0.5))
    text = "\n".join(str(warning.message) for warning in recwarn)
    assert text.count("GradualPruning: 1.weight kept less than a hundredth of the average den") == 1
