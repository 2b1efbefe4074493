"""Training on two processes: this one, and a fork of it."""

import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fitsmall.compressors import TopK, select
from fitsmall.compressors.surgery.quantizers import ActivationQuantizer
from fitsmall.compressors.training import (
    GradualPruning,
    LearningCompression,
    Plan,
    QuantizationAwareTraining,
    Stage,
    WeightSharing,
    messages,
    sharding,
)
from fitsmall.compressors.training.methods.scales import ScaleLearning
from fitsmall.compressors.training.statistics import Statistics
from training import IMAGES, LABELS

BATCHES = list(zip(IMAGES[:640].split(64), LABELS[:640].split(64), strict=True))


def on_two_processes(work: Callable[[int], None]) -> None:
    """Let work run on this process with rank 0, and on a fork of it with rank 1."""
    with socket.create_server(("localhost", 0)) as free:
        url = f"tcp://localhost:{free.getsockname()[1]}"
    child = os.fork()
    rank = int(not child)
    try:
        dist.init_process_group("gloo", url, timedelta(seconds=30), 2, rank)
        work(rank)
    finally:
        failed = sys.exc_info()[0] is not None
        if rank:
            if failed:
                traceback.print_exc()
            os._exit(failed)
        if failed:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if dist.is_initialized():
            dist.destroy_process_group()
    assert status == 0


def train(module: nn.Module, stages: list[Stage], steps: int = 10) -> Plan:
    plan = Plan(stages, module)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    plan.hook([optimizer])
    plan.begin(horizon=steps)
    for images, labels in BATCHES[:steps]:
        plan.open()
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), labels).backward()
        plan.restore_(optimizer)
        optimizer.step()
        plan.advance()
    plan.finish()
    return plan


def new_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))


def sharded_net() -> nn.Sequential:
    module, mesh = new_net(), init_device_mesh("cpu", (2,))
    for layer in (module[0], module[2], module):
        fully_shard(layer, mesh=mesh)
    return module


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: sharding.whole(t.detach()) for name, t in module.state_dict().items()}


STAGES: dict[str, Callable[[], list[Stage]]] = {
    **{
        f"pruning by {criterion}": lambda criterion=criterion: [
            GradualPruning(0.7, criterion=criterion, stop=0.6, every=2)
        ]
        for criterion in ("magnitude", "gradient", "hessian", "activation", "movement", "adam")
    },
    "straight-through pruning, sharing": lambda: [
        GradualPruning(0.5, stop=0.5, coupling="straight_through", pruned_decay=0.1),
        WeightSharing(6, start=0.5, stop=0.8, every=1),
    ],
    "pruning, learned quantization": lambda: [
        GradualPruning(0.5, stop=0.4),
        QuantizationAwareTraining(4, 4, "learned", start=0.4, stop=0.8, observe_steps=3),
    ],
    "automatic bits": lambda: [
        QuantizationAwareTraining("auto", None, average_bits=4, start=0.3, stop=0.8)
    ],
    "proximal": lambda: [LearningCompression(TopK(0.7), stop=0.8, every=2)],
}


def test_sharded_training_equals_a_whole_one() -> None:
    """Both processes see the same batches, so that their gradients are those of one process."""
    modules = {name: new_net() for name in STAGES}
    plans = {name: train(modules[name], make()) for name, make in STAGES.items()}

    # All in one process group, since FSDP2 keeps what it knows of the first one.
    def work(rank: int) -> None:
        for name, make in STAGES.items():
            module, plan = sharded_net(), plans[name]
            assert isinstance(module[0].weight, DTensor)
            sharded = train(module, make())
            latents = {key: sharding.whole(latent) for key, latent in sharded.latents().items()}
            close(state_of(module), state_of(modules[name]), name)
            close(latents, plan.latents(), name)
            assert sharded.distance() == pytest.approx(plan.distance(), abs=1e-6), name
            again = Plan(make(), module)
            again.load_state_dict(sharded.state_dict())
            for first, second in zip(sharded.stages, again.stages, strict=True):
                close(second.choices(), first.choices(), name)

    on_two_processes(work)


def close(found: Any, expected: Any, name: str) -> None:
    torch.testing.assert_close(found, expected, msg=lambda text: f"{name}: {text}")


def test_parts_and_wholes() -> None:
    whole = torch.arange(15.0).view(5, 3)

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        mine = (whole[:3], whole[3:])[rank]  # the first process has one row more
        split = distribute_tensor(whole, mesh, [Shard(0)])
        copied = distribute_tensor(whole, mesh, [Replicate()])
        assert sharding.processes() == (rank, 2)
        assert torch.equal(sharding.local(split), mine)
        assert torch.equal(sharding.whole(split), whole)
        assert torch.equal(sharding.shard(whole + 1, split), mine + 1)
        assert torch.equal(sharding.gather(mine + 1, split), whole + 1)
        transposed = distribute_tensor(whole.T.contiguous().T, mesh, [Shard(0)])
        assert torch.equal(sharding.gather(sharding.local(transposed), transposed), whole)
        # Parts of a sum are added, copies of it are not.
        assert torch.equal(sharding.reduce_(mine.sum(0), split), whole.sum(0))
        assert torch.equal(sharding.reduce_(whole.sum(0), copied), whole.sum(0))
        own = torch.tensor([1.0, 2.0]) + rank
        both = sharding.stack(own)
        assert both.tolist() == [[1.0, 2.0], [2.0, 3.0]]
        assert torch.equal(sharding.unstack(both), own)
        assert sharding.unstack(both[:1]) is None
        torch.manual_seed(7 + rank)
        assert sharding.shared_seed() == 7

    on_two_processes(work)


def test_one_process_has_the_whole() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    for same in (sharding.local, sharding.whole):
        assert same(tensor) is tensor
    for same in (sharding.shard, sharding.gather, sharding.reduce_):
        assert same(tensor, tensor) is tensor
    assert sharding.processes() == (0, 1)
    assert torch.equal(sharding.stack(tensor), tensor[None])
    assert torch.equal(sharding.unstack(tensor[None]), tensor)
    assert sharding.unstack(torch.stack([tensor, tensor])) is None
    torch.manual_seed(5)
    assert sharding.shared_seed() == 5


def test_scales_are_learned_from_the_mean_gradient() -> None:
    def learned(gradients: Tensor, of_input: Tensor) -> tuple[Tensor, Tensor]:
        learning, quantizer = ScaleLearning(), ActivationQuantizer(4)
        quantizer.log_scale.requires_grad_(True).grad = of_input
        for _ in range(3):
            learning.gradients = {"weight": gradients.clone()}
            learning.step(["weight"], {"weight": torch.ones(2)}, {"weight": quantizer}, 1.0, 1.0)
        return learning.log_scales["weight"], quantizer.log_scale.detach()

    gradients = torch.tensor([[1.0, -3.0], [-2.0, 1.0]])
    of_input = torch.tensor([0.5, -1.5]).view(2, *ActivationQuantizer(4).log_scale.shape)
    expected = learned(gradients.mean(0), of_input.mean(0))
    assert all(moved.abs().min() > 1e-3 for moved in expected)

    def work(rank: int) -> None:
        torch.testing.assert_close(learned(gradients[rank], of_input[rank]), expected)

    on_two_processes(work)


class Layers(nn.Module):
    """Layers of which a process need not use all."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.first, self.idle = (nn.Linear(2, 2) for _ in range(3))
        self.second = nn.Conv1d(4, 2, 1, groups=2)


def test_input_norms_are_averaged_over_the_processes_that_saw_inputs() -> None:
    def work(rank: int) -> None:
        module = Layers()
        weights = {f"{name}.weight": layer.weight for name, layer in module.named_children()}
        statistics = Statistics(["input_norm"])
        statistics.attach(module, select(module, include="*.weight"), weights)
        statistics.hook()
        module.shared(torch.tensor([[1.0, 0.0]] if rank else [[7.0, 3.0]]))
        if rank == 0:
            module.first(torch.tensor([[2.0, 3.0]]))
        else:
            module.second(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]))
        for name, weight in weights.items():
            statistics.observe(name, weight, None, {})
        assert not statistics.is_ready("idle.weight")
        statistics.synchronize()
        found = {name: statistics.of(name, weight) for name, weight in weights.items()}
        assert found.pop("idle.weight") == {}
        expected = {
            "shared.weight": torch.tensor([[5.0, 4.5**0.5]]),
            "first.weight": torch.tensor([[2.0, 3.0]]),
            "second.weight": torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]),
        }
        torch.testing.assert_close(found, {n: {"input_norm": t} for n, t in expected.items()})
        # Each process saves and gets back its own.
        statistics._own["shared.weight"]["input_norm"] += rank
        again = Statistics(["input_norm"])
        again.attach(module, select(module, include="*.weight"), weights)
        again.load_state_dict(statistics.state_dict(), weights)
        own = again.of("shared.weight", module.shared.weight)["input_norm"]
        torch.testing.assert_close(own, expected["shared.weight"] + rank)

    on_two_processes(work)


def test_ranges_of_inputs_are_those_of_all_processes() -> None:
    def work(rank: int) -> None:
        module = Layers()
        stage = QuantizationAwareTraining(8, 4, start=0.5)
        plan = Plan([stage], module, horizon=10)
        plan.open()
        staged = {
            "shared": ([-1.0, 2.0, 0.5], [0.0, 5.0, 1.0]),
            "first": ([0.0, 0.0, -1.0], [-3.0, 1.0, 0.25]),
            "idle": ([0.0, 0.0, -1.0], [0.0, 0.0, -1.0]),
        }
        for name, both in staged.items():
            stage.quantizers[f"{name}.weight"].staged.copy_(torch.tensor(both[rank]))
        stage.train_own(plan.names.values(), 1.0, 1.0)
        seen = {name: stage.quantizers[f"{name}.weight"].seen.tolist() for name in staged}
        assert seen == {
            "shared": [-1.0, 5.0, 0.75],
            "first": [-3.0, 1.0, 0.25],
            "idle": [0.0, 0.0, -1.0],
        }

    on_two_processes(work)


def test_messages_are_of_the_first_process(caplog: pytest.LogCaptureFixture) -> None:
    def work(rank: int) -> None:
        with caplog.at_level("INFO", "fitsmall"), warnings.catch_warnings(record=True) as caught:
            messages.inform("one")
            messages.warn("two")
        found = [*caplog.messages, *(str(warning.message) for warning in caught)]
        assert found == ([] if rank else ["one", "two"])

    on_two_processes(work)
