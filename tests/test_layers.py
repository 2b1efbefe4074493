"""Every kind of layer is compressed by default, along its own outputs and inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint

from fitsmall.compressors import NofM, Quantize, TopK, Truncate, compress, restore, save, select
from fitsmall.compressors.codes.code import Integer
from fitsmall.compressors.training import (
    GradualPruning,
    LearningCompression,
    Plan,
    QuantizationAwareTraining,
    RankLearning,
    WeightSharing,
)
from fitsmall.compressors.training.stage import Stage
from fitsmall.compressors.training.statistics import Statistics
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
        {"0.parametrizations.weight.original1": Matrices("0", normed=0)},
    ),
    "spectral norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 12))),
        {"0.parametrizations.weight.original": Matrices("0")},
    ),
    "old weight norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(8, 12))),
        {"0.weight_v": Matrices("0", normed=0)},
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


@pytest.mark.parametrize("granularity", ["channel", 32])
@pytest.mark.parametrize(
    "make", [lambda: Experts(False), lambda: Experts(True), lambda: Conv1D(1, 1)]
)
def test_the_file_of_a_quantized_weight_is_small(
    make: Callable[[], nn.Module], granularity: Any, tmp_path: Path
) -> None:
    """Matrices of 64 x 64 with four bits each: half a byte a weight, and scales."""
    module = make()
    name = next(iter(dict(module.named_parameters())))
    weight = torch.randn(8, 64, 64) if name == "up" else torch.randn(64, 512)
    setattr(module, name, nn.Parameter(weight))
    Plan([stage := QuantizationAwareTraining(4, None, granularity=granularity)], module)
    stage.choose({name: weight}, strength=1.0)
    stage.project_(name, weight, strength=1.0)
    size = save(tmp_path / "file", {name: weight})
    assert size < 8 * 64 * 64 // 2 + stage.scales[name].numel() * 2 + 200


@pytest.mark.filterwarnings("ignore:compress. nothing makes up")
def test_scales_of_projections_are_of_outputs() -> None:
    for layer, scales in (
        (Conv1D(6, 16), (1, 6)),
        (nn.ConvTranspose2d(16, 6, 3), (1, 6, 1, 1)),
        (nn.Conv2d(16, 6, 3), (6, 1, 1, 1)),
        (Experts(transposed=False), (2, 12, 1)),
        (Experts(transposed=True), (2, 1, 12)),
    ):
        projection = TopK(0.5) | Quantize(4)
        Plan([learning := LearningCompression(projection)], layer)
        ((name, along),) = learning.projections.items()
        learned = along.encode(layer.get_parameter(name))
        for code in (learned, compress(layer, projection)[name]):
            assert isinstance(code, Integer)
            assert code.scales.shape == scales


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
    assert select(parametrizations.weight_norm(nn.Linear(2, 8))).chosen  # rows of few weights


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_module_with_a_computed_weight_is_fitted_to_data() -> None:
    """The old weight norm keeps the weight of the last forward pass, which has a gradient."""
    net, x = nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8)), torch.randn(9, 8)
    net(x)
    with pytest.warns(UserWarning, match=r"projected as they are: 0\.weight_v"):
        assert [*compress(net, TopK(0.5), data=[x])] == ["0.weight_v", "1.weight"]


def test_statistics_of_replaced_layers_are_forgotten() -> None:
    """Those that Adam keeps, too, which are as large as the weights."""
    net = nn.Sequential(nn.Linear(8, 8))
    statistics, weight = Statistics(("squared_gradient",)), net[0].weight
    statistics.attach(net, select(net), dict(net.named_parameters()))
    statistics.observe("0.weight", weight, weight.detach(), {"exp_avg_sq": weight.detach()})
    assert statistics.has_all("0.weight")
    statistics.attach(net, select(net), {})
    assert not statistics.has_all("0.weight")


def test_spectral_norm_learns_as_without_a_plan() -> None:
    """It learns whenever its layer's weight is read, so that none is read to count costs."""
    found = []
    for stages in ([], [RankLearning(price=1e-9, include="1")]):
        torch.manual_seed(0)
        net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 30))
        train(net, *stages)
        found.append(net[0].parametrizations.weight[0]._u)
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:compress. nothing makes up")
@pytest.mark.parametrize(
    "act",
    [
        lambda net: train(net, GradualPruning(0.7, "magnitude", stop=0.5)),
        lambda net: train(net, LearningCompression(TopK(0.7), stop=0.5)),
        lambda net: compress(net, TopK(0.7)),
        lambda net: compress(net, TopK(0.7) | Quantize(4, "tensor")),
    ],
    ids=["pruning", "learning", "one-shot", "scales"],
)
def test_a_normed_slice_keeps_a_weight(act: Callable[[nn.Module], Any]) -> None:
    """Weight norm divides by the norms of rows, of which some are much smaller than others."""
    net = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 4)), parametrizations.weight_norm(nn.Linear(4, 1))
    )
    first, second = (net.get_parameter(f"{n}.parametrizations.weight.original1") for n in range(2))
    with torch.no_grad():
        first[:2] *= 1e-3
        second *= 1e-3
    act(net)
    assert (first == 0).sum() + (second == 0).sum() >= 23
    assert (first != 0).any(1).all()
    assert second.any()
    assert net(torch.ones(1, 8)).isfinite().all()


@pytest.mark.filterwarnings("ignore:compress. nothing makes up")
def test_n_of_m_counts_inputs() -> None:
    """Of transposed weights, too: groups of four inputs of one output have two weights."""
    trained, compressed, experts = Conv1D(6, 8), Conv1D(6, 8), Experts(transposed=True)
    train(trained, GradualPruning(structure=NofM(2, 4), stop=0.5))
    for layer in (compressed, experts):
        compress(layer, TopK(0.5, NofM(2, 4)))
    for matrix in (trained.weight.T, compressed.weight.T, *experts.up.mT):
        assert bool(((matrix != 0).view(len(matrix), 2, 4).sum(2) == 2).all())


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


class Named(nn.Module):
    """A module that calls its layer by keyword, and not by the one that torch's layers have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Conv1D(12, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(x=inputs)


def test_layers_are_called_by_any_keyword() -> None:
    module = Named()
    train(
        module,
        GradualPruning(0.1, criterion="activation", stop=0.2),
        QuantizationAwareTraining(4, 4, start=0.3, observe_steps=3),
    )
    assert module.layer.input_quantizer.active
    train(module := Named(), RankLearning(keep_size=0.5))
    assert module.layer.reduce.out_features < 4


def test_shapes_that_a_method_cannot_take_are_named_before_training() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(6, 8, 1))
    for projection, reason in (
        (
            TopK(0.5, NofM(2, 4)) | Quantize(4),
            "NofM(n=2, m=4) cannot prune the tensor: dimension 1",
        ),
        (TopK(0.5) | Quantize(4, granularity=8), "groups of 8 do not divide a weight of shape"),
    ):
        plan = Plan([LearningCompression(projection)], net)
        assert list(plan.stages[0].selection.chosen) == ["0.weight"]
        assert f"left out ({reason}" in str(plan)
    with pytest.raises(ValueError, match="separable for convolutions"):
        Plan([LearningCompression(Truncate(2, form="separable"))], nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"1\.weight: groups of 8 do not divide.*or leave it out"):
        Plan([QuantizationAwareTraining(granularity=8)], net)
    net.scale = nn.Parameter(torch.tensor(1.0))
    plan = Plan([QuantizationAwareTraining(include="*")], net)
    assert "left out (it is a single number): scale" in str(plan)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LearningCompression({"0": TopK(0.5)}, stop=0.5),
        lambda: GradualPruning(0.5, overrides={"0": 0.5}, stop=0.5),
        lambda: WeightSharing(4, overrides={"0": 4}, start=0.2, stop=0.5),
        lambda: QuantizationAwareTraining(overrides={"0": 4}),
    ],
)
def test_overrides_of_weights_that_come_later(make: Callable[[], Stage]) -> None:
    """Lazy layers have theirs after the first forward pass, frozen ones once they may train."""
    net = nn.Sequential(nn.LazyLinear(12), nn.Linear(12, 4).requires_grad_(False))
    train(net, stage := make())
    assert "0.weight" in stage.selection.chosen
    assert stage.chosen_at is not None


def test_inputs_that_stay_in_float_are_listed() -> None:
    net = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20))
    net[2].weight = net[0].weight  # as language models have it
    text = str(Plan([QuantizationAwareTraining()], net))
    assert "inputs of 8 bits: 1\n" in text
    assert "weights alone, not their inputs: 0, 2\n" in text


class Checkpointed(nn.Module):
    """A layer that the backward pass computes a second time, and one that it does not."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 20), nn.Linear(20, 8)
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        if self.settings:
            x = x.requires_grad_()
            return self.second(checkpoint(self.first, x, **self.settings))
        return self.second(self.first(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_twice_count_once(reentrant: bool) -> None:
    found = []
    for settings in ({}, {"use_reentrant": reentrant}):
        torch.manual_seed(0)
        module = Checkpointed(**settings)
        pruning, ranks = GradualPruning(criterion="activation"), RankLearning(price=1e-9, stop=1.0)
        train(module, pruning)
        train(module, ranks)
        norm = pruning.choices()["statistics"]["first.weight"]["input_norm"][0]
        found.append((norm, ranks.costs.state_dict()["all"]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_learned_positions_stay_out_unless_asked_for() -> None:
    text = str(Plan([GradualPruning()], Bag()))
    assert "left out (learned positions): position_embeddings.weight; 16.7 %, 128 bytes" in text
    assert "position_embeddings.weight" in select(Bag(), include="position_embeddings").chosen


def test_a_criterion_leaves_out_what_it_cannot_score() -> None:
    net = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 40))
    text = str(Plan([GradualPruning(criterion="activation")], net))
    assert "left out (inputs of Embedding have no norms): 0.weight; 30.8 %" in text
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["adam", "hessian", "movement"])
def test_scores_in_half_precision(criterion: str, dtype: torch.dtype) -> None:
    """Gradients are so small that their squares are zero in float16, and averages of bfloat16
    would stop to move. The same weights survive as of the same numbers in single precision."""
    weight, gradients = 1e-3 * torch.randn(8, 8).to(dtype), 1e-4 * torch.randn(50, 8, 8).to(dtype)
    masks = []
    for kind in (dtype, torch.float32):
        layer = nn.Linear(8, 8).to(kind)
        Plan([stage := GradualPruning(0.5, criterion)], layer)
        for gradient in gradients:
            stage.observe("weight", weight.to(kind), gradient.to(kind), {})
        stage.choose({"weight": weight.to(kind)}, strength=1.0)
        masks.append(stage.masks["weight"])
    assert torch.equal(*masks)
