"""Work for two processes: they train every case, and write down hashes of what each has in the end.

``test_distributed.py`` starts them and compares.
"""

import faulthandler
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from cases import BY_CRITERION, CASES, COUPLINGS, Case
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from fitsmall.callbacks import (
    EMA,
    ChannelPruning,
    CompressedCheckpoint,
    CompressionMonitor,
    GradualPruning,
    QuantizationAwareTraining,
    RandomState,
    RankLearning,
    plan_of,
)
from fitsmall.compressors import load, restore
from fitsmall.compressors.training.sharding import whole
from training import IMAGES, LABELS, ModelCheckpointAt, Net, resumable

QUANTIZED = {
    f"pruning, quantization ({scale})": Case(
        lambda scale=scale: [
            GradualPruning(0.8, stop=0.5),
            QuantizationAwareTraining(4, 4, scale, start=0.3, stop=0.8, observe_steps=5),
        ],
        sparsity=0.8,
        bits=4,
    )
    for scale in ("mse", "learned")
}
EVERY = CASES | BY_CRITERION | QUANTIZED
# All that methods save; the other cases save parts of it.
RESUMED = {*COUPLINGS, "quantization to automatic widths", *QUANTIZED} - {
    "pruning, learned quantization of weights"
}

RANKS, CHANNELS = "rank learning", "channel pruning"


class Sharded(Net):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.body, self.head):
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)


def digest(tensors: Any) -> str:
    """A hash of the bits of nested tensors."""
    buffer = io.BytesIO()
    leaves, _ = torch.utils._pytree.tree_flatten(tensors)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            buffer.write(leaf.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def learn_ranks(folder: Path, strategy: Any, path: Path | None = None) -> dict[str, Any]:
    """The network becomes another one, under sharding only in the file."""
    pl.seed_everything(1 + int(os.environ["RANK"]), verbose=False)
    ranks, file = RankLearning(keep_size=0.6), CompressedCheckpoint(folder / "ranks")
    runner = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        callbacks=[
            ranks,
            CompressionMonitor(),
            RandomState(),
            file,
            ModelCheckpointAt(folder / "ranks", 8, 18),
        ],
        logger=CSVLogger(folder / "ranks"),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Sharded() if isinstance(strategy, ModelParallelStrategy) else Net()
    data = resumable()
    runner.fit(module, data, ckpt_path=path)
    assert file.path is not None
    stored = load(file.path)
    rank = ranks.ranks["body.0.weight"].rank
    assert ranks.ranks.keys() == {"body.0.weight", "head.weight"}
    assert stored["body.0.reduce.weight"].shape == (rank, 64)
    restored = restore(Net(), file.path).eval()
    assert (restored(IMAGES[:640]).argmax(1) == LABELS[:640]).float().mean() > 0.8
    weights = {name: whole(parameter.detach()) for name, parameter in module.named_parameters()}
    kept = {name: stored[name] for name in weights if isinstance(strategy, DDPStrategy)}
    return {"weights": digest(weights), "choices": digest(ranks.choices()), "file": digest(kept)}


def remove_channels(folder: Path, strategy: Any, path: Path | None = None) -> dict[str, Any]:
    """The network becomes narrower, twice."""
    pl.seed_everything(1 + int(os.environ["RANK"]), verbose=False)
    channels, file = ChannelPruning(keep_size=0.6, cuts=2), CompressedCheckpoint(folder)
    saver = ModelCheckpointAt(folder, 8, 18)
    runner = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        callbacks=[channels, RandomState(), file, saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Sharded() if isinstance(strategy, ModelParallelStrategy) else Net()
    runner.fit(module, resumable(), ckpt_path=path)
    assert module.body[0].out_features == channels.history.counts["body.0"][1] < 40
    assert file.path is not None
    weights = dict(module.named_parameters())
    stored = restore(Net(), file.path)
    return {
        "weights": digest(weights),
        "choices": channels.choices(),  # by now numbers alone
        "file": digest(dict(stored.named_parameters())),
    }


def train(
    name: str, folder: Path, strategy: Any, path: Path | None = None, seed: int = 0, **kwargs: Any
) -> dict[str, Any]:
    """Train a case; returns whole tensors by name, and the hashes of all that must be equal."""
    pl.seed_everything(seed, verbose=False)
    file = CompressedCheckpoint(folder / name)
    callbacks = [*EVERY[name].make(), CompressionMonitor(), RandomState(), file]
    if isinstance(strategy, DDPStrategy):
        callbacks.append(EMA(decay=0.9))
    more = kwargs.pop("callbacks", [])
    runner = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        callbacks=[*callbacks, *more],
        logger=CSVLogger(folder / name),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        enable_checkpointing=bool(more),
        **kwargs,
    )
    module = Sharded() if isinstance(strategy, ModelParallelStrategy) else Net()
    data = resumable()
    runner.fit(module, data, ckpt_path=path)
    state = {key: whole(tensor.detach()) for key, tensor in module.state_dict().items()}
    plan = plan_of(runner)
    assert plan is not None
    latents = {key: whole(tensor) for key, tensor in plan.latents().items()}
    # The averages of batch-norm are each process's own.
    weights = {key: tensor for key, tensor in state.items() if "running" not in key}
    EVERY[name].check(as_plain(state))
    assert file.path is not None
    stored = load(file.path)
    if dist.get_rank() == 0:
        assert digest(stored) == digest(state)
    choices = [method.choices() for method in plan.stages]
    return {
        "weights": digest(weights),
        "latents": digest(latents),
        "choices": digest(choices),
        "file": digest({key: stored[key] for key in weights}),
    }


def as_plain(state: dict[str, Any]) -> Net:
    module = Net()
    module.load_state_dict({name: state[name] for name in module.state_dict()})
    return module


def ddp(folder: Path) -> dict[str, Any]:
    """Each process sees other data, and starts from another seed."""
    results = {
        name: train(
            name,
            folder,
            DDPStrategy(process_group_backend="gloo"),
            seed=1 + int(os.environ["RANK"]),
        )
        for name in EVERY
    }
    ranks = learn_ranks(folder, DDPStrategy(process_group_backend="gloo"))
    assert ranks["file"] == ranks["weights"]
    for step in (8, 18):  # before layers became two, and after it
        saved = folder / "ranks" / f"step={step}.ckpt"
        again = learn_ranks(folder / "again", DDPStrategy(process_group_backend="gloo"), saved)
        assert again == ranks, step
    channels = remove_channels(folder / "channels", DDPStrategy(process_group_backend="gloo"))
    for step in (8, 18):  # between the cuts, and after them
        saved = folder / "channels" / f"step={step}.ckpt"
        strategy = DDPStrategy(process_group_backend="gloo")
        assert remove_channels(folder / "again", strategy, saved) == channels, step
    return {**results, RANKS: ranks, CHANNELS: channels}


def fsdp(folder: Path) -> dict[str, Any]:
    """Parameters are shards, and so are the checkpoints or not."""
    results = {
        name: resumed(name, folder) if name in RESUMED else train(name, folder, sharding())
        for name in EVERY
    }
    ranks = learn_ranks(folder, sharding())
    for step in (8, 18):
        saved = folder / "ranks" / f"step={step}.ckpt"
        assert learn_ranks(folder / "again", sharding(), saved) == ranks, step
    with pytest.raises(ValueError, match=r"body\.0\.weight is sharded"):
        remove_channels(folder / "channels", sharding())
    return {**results, RANKS: ranks}


def sharding(sharded: bool = True) -> ModelParallelStrategy:
    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=sharded)


def resumed(name: str, folder: Path) -> dict[str, Any]:
    """Train a case, and resume it: from sharded checkpoints, before and in windows, and from a full
    one, which a run has written that was resumed itself."""
    sharded, full = folder / "sharded" / name, folder / "full" / name
    first, second = (sharded / f"step={step}.ckpt" for step in (3, 8))
    whole = train(name, folder, sharding(), callbacks=[ModelCheckpointAt(sharded, 3, 8)])
    saver = ModelCheckpointAt(full, 8)
    assert train(name, folder, sharding(sharded=False), first, callbacks=[saver]) == whole, name
    for path in (second, full / second.name):
        assert train(name, folder, sharding(), path) == whole, (name, path)
    return whole


def main(rank: int, kind: str, folder: Path, port: int) -> None:
    """One of the two processes; a crash shows where it was."""
    faulthandler.enable()
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in environment.items()}
    torch.set_num_threads(1)
    results = {"ddp": ddp, "fsdp": fsdp}[kind](folder)
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
