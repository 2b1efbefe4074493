"""Compression in loops of one's own: equal to the Trainer's, bit for bit."""

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as fabric
import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from fitsmall import callbacks
from fitsmall.compressors import LinearRamp, NofM, TopK, training
from fitsmall.compressors.training import Plan, Stage
from fitsmall.compressors.training.input_norms import InputNorm
from fitsmall.experiments.benchmarks.soak import differences
from training import IMAGES, LABELS, Net, fit

BATCHES = list(zip(IMAGES[:640].split(64), LABELS[:640].split(64), strict=True))
EPOCHS = 4

# Stages, made from the classes of a module: those of the Trainer, or those of any loop.
STAGES: dict[str, Callable[[Any], list[Stage]]] = {
    "pruning, sharing": lambda room: [
        room.GradualPruning(0.8, criterion="hessian", stop=0.5),
        room.WeightSharing(6, start=0.4, stop=0.8),
    ],
    "pruning, quantization": lambda room: [
        room.GradualPruning(0.5, structure=NofM(2, 4), coupling="straight_through"),
        room.QuantizationAwareTraining(4, 4, "learned", start=0.3, stop=0.8),
    ],
    "ranks": lambda room: [room.RankLearning(keep_size=0.6)],
}


def train(
    plan: Plan, module: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Any]
) -> None:
    for images, labels in batches:
        plan.open()
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), labels).backward()
        plan.restore_(optimizer)
        optimizer.step()
        plan.advance()


def plain_loop(module: nn.Module, stages: Sequence[Stage]) -> None:
    plan = Plan(stages, module)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    plan.hook([optimizer])
    plan.begin(horizon=EPOCHS * len(BATCHES))
    train(plan, module, optimizer, BATCHES * EPOCHS)
    plan.finish()


def fabric_loop(module: nn.Module, stages: Sequence[Stage]) -> None:
    runner = fabric.Fabric(accelerator="cpu", devices=1)
    plan = Plan(stages, module)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    wrapped, optimizer = runner.setup(module, optimizer)
    plan.hook([optimizer])
    plan.begin(horizon=EPOCHS * len(BATCHES))
    for images, labels in BATCHES * EPOCHS:
        plan.open()
        optimizer.zero_grad()
        runner.backward(nn.functional.cross_entropy(wrapped(images), labels))
        plan.restore_(optimizer)
        optimizer.step()
        plan.advance()
    plan.finish()


@pytest.mark.parametrize("make", STAGES.values(), ids=STAGES.keys())
def test_loops_equal_the_trainer(make: Callable[[Any], list[Stage]], tmp_path: Path) -> None:
    expected = fit(tmp_path, *make(callbacks), max_epochs=EPOCHS).state_dict()
    for loop in (plain_loop, fabric_loop):
        seed_everything(0)
        module = Net()
        loop(module, make(training))
        assert list(differences(dict(expected), dict(module.state_dict()))) == []


def test_a_plain_loop_resumes_exactly() -> None:
    def run(steps: Sequence[int], saved: dict[str, Any] | None = None) -> dict[str, Any]:
        torch.manual_seed(0)
        module = Net()
        plan = Plan(STAGES["pruning, sharing"](training), module)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        plan.hook([optimizer])
        if saved is not None:
            module.load_state_dict(saved["module"])
            plan.load_state_dict(saved["plan"])
            optimizer.load_state_dict(saved["optimizer"])
        plan.begin(horizon=40)
        train(plan, module, optimizer, (BATCHES[step % 10] for step in steps))
        state = {"module": module, "plan": plan, "optimizer": optimizer}
        return {key: owner.state_dict() for key, owner in state.items()}

    whole, half = run(range(40)), run(range(25))
    assert list(differences(whole, run(range(25, 40), half))) == []


def test_a_gradient_scaler_in_a_plain_loop() -> None:
    """A step that the scaler skips leaves no trace, and the others see true gradients."""
    torch.manual_seed(0)
    module = Net()
    pruning = training.GradualPruning(0.8, criterion="gradient", stop=0.5)
    plan = Plan([pruning], module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    plan.hook([optimizer])
    plan.begin(horizon=40)
    before = module.head.weight.detach().clone()
    for step, (images, labels) in enumerate(BATCHES * EPOCHS):
        plan.open()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(images), labels)
        scaler.scale(loss * (torch.inf if step == 0 else 1.0)).backward()
        scaler.unscale_(optimizer)
        plan.restore_(optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()
        plan.advance()
        if step == 0:
            assert torch.equal(module.head.weight, before)
            assert not pruning.choices()["statistics"]
    with warnings.catch_warnings(action="error"):
        plan.finish()
    assert plan.clock.steps == 40
    zeros = torch.cat([module.body[0].weight.flatten(), module.head.weight.flatten()]) == 0
    assert float(zeros.float().mean()) == pytest.approx(0.8, abs=1e-3)


def test_a_loop_that_forgets_a_call_is_told() -> None:
    module = Net()
    plan = Plan([training.WeightSharing(4, start=0.0)], module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=r"call plan\.hook.* and plan\.begin"):
        plan.restore_(optimizer)
    plan.hook([optimizer])
    with pytest.raises(ValueError, match=r"call plan\.hook.* and plan\.begin"):
        plan.restore_(optimizer)
    plan.begin(horizon=10)
    with pytest.raises(ValueError, match=r"call plan\.open"):
        plan.restore_(optimizer)
    plan.open()
    nn.functional.cross_entropy(module(BATCHES[0][0]), BATCHES[0][1]).backward()
    with pytest.raises(ValueError, match=r"call plan\.restore_\(optimizer\) before it"):
        optimizer.step()


def test_a_stage_starts_fresh_in_another_plan() -> None:
    stages = STAGES["pruning, sharing"](training)
    torch.manual_seed(0)
    first, second, alone = Net(), Net(), Net()
    alone.load_state_dict(second.state_dict())
    plain_loop(first, stages)
    plain_loop(second, stages)
    plain_loop(alone, STAGES["pruning, sharing"](training))
    assert not list(differences(dict(alone.state_dict()), dict(second.state_dict())))
    assert not second.body[0]._forward_pre_hooks


def test_a_pull_that_stops_short_is_not_pulled_once_more() -> None:
    from fitsmall.compressors import TopK

    torch.manual_seed(0)
    module = Net()
    stage = training.LearningCompression(TopK(0.5), schedule=lambda progress: progress)
    plan = Plan([stage], module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    plan.hook([optimizer])
    plan.begin(horizon=40)
    train(plan, module, optimizer, BATCHES)
    before = module.head.weight.detach().clone()
    with pytest.warns(UserWarning, match="has not reached its full strength"):
        plan.finish()
    assert torch.equal(module.head.weight, before)


def test_a_layer_that_is_frozen_later_keeps_its_mask() -> None:
    module = Net()
    plan = Plan([training.GradualPruning(0.8, criterion="hessian", stop=0.5)], module)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    plan.hook([optimizer])
    plan.begin(horizon=10)
    train(plan, module, optimizer, BATCHES)
    state = plan.state_dict()
    module.head.weight.requires_grad_(False)
    resumed = Plan([training.GradualPruning(0.8, criterion="hessian", stop=0.5)], module)
    resumed.load_state_dict(state)
    assert not list(differences(state, resumed.state_dict()))


# Structures.


def structured(structure: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
    """The final weight of a layer that was pruned, and its weights after every step."""
    torch.manual_seed(0)
    module, seen = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 12)), []
    plan = Plan([training.GradualPruning(structure=structure, stop=0.5, **kwargs)], module)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    plan.hook([optimizer])
    plan.begin(horizon=20)
    for batch in BATCHES * 2:
        train(plan, module, optimizer, [batch])
        seen.append(module[0].weight.detach().clone())
    with warnings.catch_warnings(action="error"):
        plan.finish()
    return module[0].weight.detach(), seen


@pytest.mark.parametrize("coupling", ["hard", "straight_through"])
@pytest.mark.parametrize("criterion", ["magnitude", "hessian", "random"])
def test_two_of_four(criterion: str, coupling: str) -> None:
    weight, seen = structured(NofM(2, 4), criterion=criterion, coupling=coupling)
    assert (weight.view(16, 16, 4) != 0).sum(-1).eq(2).all()
    kept = [int(step.count_nonzero()) for step in seen]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == weight.numel() // 2 < kept[5] < weight.numel()


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk", "lamp"])
def test_blocks(allocation: str) -> None:
    from fitsmall.compressors import Block

    weight, _ = structured(Block(4, 4), sparsity=0.75, allocation=allocation)
    blocks = (weight.view(4, 4, 16, 4) != 0).sum((1, 3))
    assert {*blocks.flatten().tolist()} == {0, 16}
    if allocation == "uniform":
        assert int((blocks == 0).sum()) == 48


def test_decay_of_pruned_weights_keeps_them_small() -> None:
    """SR-STE: latents of pruned weights decay, those of kept ones do not."""

    def latents(pruned_decay: float) -> Tensor:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 12))
        stage = training.GradualPruning(
            structure=NofM(2, 4), coupling="straight_through", pruned_decay=pruned_decay, stop=0.0
        )
        plan = Plan([stage], module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        plan.hook([optimizer])
        plan.begin(horizon=10)
        for _ in range(10):
            plan.open()
            module[0].weight.grad = torch.zeros_like(module[0].weight)
            plan.restore_(optimizer)
            optimizer.step()
            plan.advance()
        return plan.latents()["0.weight"][stage.masks["0.weight"] == 0]

    torch.testing.assert_close(latents(0.5), latents(0.0) * 0.95**9)


def test_layers_that_a_structure_cannot_take_are_listed() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    text = str(Plan([training.GradualPruning(structure=NofM(2, 4))], net, horizon=10))
    assert "sparsity 0.5 (gradient of NofM(n=2, m=4))" in text
    assert "  1.weight  576 " in text
    assert "left out (NofM(n=2, m=4): dimension 1 of its shape (8, 3, 3, 3) is no mult" in text


# Open axes.


def test_a_criterion_of_several_statistics(tmp_path: Path) -> None:
    from fitsmall.compressors import Criterion

    def damage(weight: Tensor, statistics: Any) -> Tensor:
        """The first two terms of the loss's rise by a removal."""
        second = weight.square() * statistics["squared_gradient"] / 2
        return (second - weight * statistics["gradient"]).abs() + 0 * statistics["input_norm"]

    names = ("gradient", "squared_gradient", "input_norm")
    pruning = callbacks.GradualPruning(0.8, criterion=Criterion(damage, names))
    module = fit(tmp_path, pruning)
    zeros = torch.cat([module.body[0].weight.flatten(), module.head.weight.flatten()]) == 0
    assert float(zeros.float().mean()) == pytest.approx(0.8, abs=1e-3)
    statistics = pruning.choices()["statistics"]["head.weight"]
    assert {*statistics, "squared_gradient"} == {*names}  # Adam's own average is in its state


def test_functions_as_criterion_allocation_and_schedule(tmp_path: Path) -> None:
    pruning = callbacks.GradualPruning(
        0.8,
        criterion=lambda weight, statistics: -weight.abs(),  # the largest go first
        allocation=lambda scores, sparsity: {n: round(0.2 * scores[n].numel()) for n in scores},
        schedule=lambda progress: 1.0,
        start_step=38,
        stop_step=39,
    )
    module = fit(tmp_path, pruning)
    assert int((module.head.weight != 0).sum()) == 80
    assert float(module.head.weight.abs().max()) < 0.2


def test_random_masks_differ_by_name_and_seed() -> None:
    def masks(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        stage = training.GradualPruning(0.5, criterion="random", allocation="uniform", stop=0.0)
        plan = Plan([stage], net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        plan.hook([optimizer])
        plan.begin(horizon=1)
        plan.open()
        net(torch.ones(1, 8)).sum().backward()
        plan.restore_(optimizer)
        optimizer.step()
        return stage.masks

    first, again, other = masks(0), masks(0), masks(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], first["1.weight"])
    assert not torch.equal(first["0.weight"], other["0.weight"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: training.GradualPruning(0.9, structure=NofM(2, 4)), "leave out sparsity"),
        (
            lambda: training.GradualPruning(structure=NofM(2, 4), allocation="lamp"),
            "leave out allocation",
        ),
        (
            lambda: training.GradualPruning(structure=NofM(2, 4), overrides={"fc": 0.5}),
            "leave out overrides",
        ),
        (lambda: training.GradualPruning(pruned_decay=0.1), "coupling='straight_through'"),
        (lambda: training.GradualPruning(criterion="magnitud"), "did you mean magnitude"),
    ],
)
def test_settings_that_do_not_go_together(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_inputs_by_keyword_count() -> None:
    class Keyword(Net):
        def forward(self, images: Tensor) -> Tensor:
            return self.head(input=self.body(images))

    module = Keyword()
    stage = training.GradualPruning(0.5, criterion="activation", include="head.weight")
    plan = Plan([stage], module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    plan.hook([optimizer])
    plan.begin(horizon=10)
    hidden = module.body(BATCHES[0][0])
    train(plan, module, optimizer, BATCHES[:1])
    norm = stage.choices()["statistics"]["head.weight"]["input_norm"][0]
    torch.testing.assert_close(norm.squeeze(), hidden.square().sum(0).sqrt())


def test_wide_weights_have_inputs_of_eight_bits() -> None:
    stage = training.QuantizationAwareTraining(4, 4, overrides={"head": 16, "body.0": 6})
    text = str(Plan([stage], Net(), horizon=10))
    assert "inputs of 6 bits: body.0\n" in text
    assert "inputs of 8 bits: head\n" in text


def test_the_proximal_step_is_the_lc_algorithm() -> None:
    """With mu rising by the schedule from strength s = mu / (1 + mu) on, and q the multiplier over
    mu: P of w - q, the new q = P - (w - q), and w goes to P + q by a fraction s."""
    stage = training.LearningCompression(TopK(0.5), schedule=LinearRamp(), start=0, stop=1, every=1)
    module = nn.Linear(4, 1, bias=False)
    Plan([stage], module)
    weight = torch.tensor([[4.0, 1.0, -3.0, 2.0]])
    stage.choose({"weight": weight}, strength=0.2)
    scaled = torch.tensor([[0.0, -1.0, 0.0, -2.0]])
    assert torch.equal(stage.targets["weight"], torch.tensor([[4.0, 0.0, -3.0, 0.0]]) + scaled)
    stage.choose({"weight": weight}, strength=0.5)  # mu is four times as large
    shifted = weight - scaled / 4
    assert torch.equal(shifted, torch.tensor([[4.0, 1.25, -3.0, 2.5]]))
    pulled = torch.tensor([[4.0, -1.25, -3.0, -2.5]])
    assert torch.equal(stage.targets["weight"], pulled)
    moved = weight.clone()
    stage.project_("weight", moved, strength=0.5)
    assert torch.equal(moved, (weight + pulled) / 2)


def test_a_pruned_weight_does_not_move_its_scale() -> None:
    """Its latent is far from zero, where the forward pass saw a zero."""
    gradients = []
    for methods in ([training.GradualPruning(0.5)], []):
        stage = training.QuantizationAwareTraining(4, None, "learned", start=0)
        module = nn.Linear(2, 1, bias=False)
        plan = Plan([*methods, stage], module)
        plan.hook([torch.optim.SGD(module.parameters(), lr=1.0)])
        plan.begin(horizon=10)
        stage.scales["weight"] = torch.ones(1, 1)
        seen, latent = torch.tensor([[3.0, 0.0]]), torch.tensor([[3.25, 2.25]])
        stage.observe("weight", seen, torch.ones(1, 2), {"latent": latent})
        gradients.append(float(stage.learning.gradients["weight"]))
    assert gradients == [-0.25, -0.25 - 2.25]


def test_inputs_count_in_training_alone() -> None:
    layer = nn.Linear(2, 2)
    norm = InputNorm(layer, layer.weight)
    norm.hook()
    x = torch.tensor([[3.0, 0.0], [4.0, 2.0]])
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    assert norm.squares is None
    layer.train()(x)
    collected: dict[str, Tensor] = {}
    norm.commit(collected)
    assert torch.equal(collected["input_norm"], torch.tensor([[5.0, 2.0]]))


@pytest.mark.parametrize(
    "stage",
    [
        training.QuantizationAwareTraining(4, None, "learned", start=0.2),
        training.GradualPruning(0.5, coupling="straight_through", pruned_decay=0.1),
    ],
    ids=["learned scales", "decay of pruned weights"],
)
def test_sparse_gradients_stay_sparse(stage: Stage) -> None:
    """As of a dense table, whose other rows have a gradient of zero."""
    tables = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(30, 8, sparse=sparse)
        optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
        plan = Plan([copy.deepcopy(stage)], table)
        plan.hook([optimizer])
        plan.begin(horizon=20)
        for _ in range(20):
            plan.open()
            optimizer.zero_grad()
            table(torch.arange(30)).square().sum().backward()
            plan.restore_(optimizer)
            optimizer.step()
            plan.advance()
        assert table.weight.grad is not None
        assert table.weight.grad.is_sparse == sparse
        tables.append(table.weight)
    assert torch.allclose(*tables)
