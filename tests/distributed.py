"""Run by two processes: train every case on them, and compare what each has in the end.

torchrun --nproc-per-node 2 tests/distributed.py ddp|fsdp FOLDER
"""

import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from cases import CASES, Case
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset

from fitsmall.callbacks import (
    EMA,
    CompressedCheckpoint,
    CompressionMonitor,
    GradualPruning,
    QuantizationAwareTraining,
    RandomState,
    RankLearning,
    ResumableLoader,
    plan_of,
)
from fitsmall.compressors import load, restore
from fitsmall.compressors.training.sharding import whole
from training import IMAGES, LABELS, Net

EVERY = CASES | {
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


RANKS = "rank learning"


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
            ModelCheckpoint(folder / "ranks", "{step}", every_n_train_steps=15, save_top_k=-1),
        ],
        logger=CSVLogger(folder / "ranks"),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Sharded() if isinstance(strategy, ModelParallelStrategy) else Net()
    data = ResumableLoader(TensorDataset(IMAGES[:640], LABELS[:640]), 64, shuffle=True)
    runner.fit(module, data)
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
        max_epochs=4,
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
    data = ResumableLoader(TensorDataset(IMAGES[:640], LABELS[:640]), 64, shuffle=True)
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
    choices = [method.choices() for method in plan.methods]
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
    for step in (15, 30):  # before layers became two, and behind it
        saved = folder / "ranks" / f"step={step}.ckpt"
        again = learn_ranks(folder / "again", DDPStrategy(process_group_backend="gloo"), saved)
        assert again == ranks, step
    return {**results, RANKS: ranks}


def fsdp(folder: Path) -> dict[str, Any]:
    """Train, and resume from sharded and from full checkpoints."""
    results = {}
    for name in EVERY:
        for sharded in (True, False):
            kind = "sharded" if sharded else "full"

            def strategy(sharded: bool = sharded) -> ModelParallelStrategy:
                return ModelParallelStrategy(2, 1, save_distributed_checkpoint=sharded)

            saves = folder / kind / name
            saver = ModelCheckpoint(saves, "{step}", every_n_train_steps=5, save_top_k=-1)
            results[f"{name}, {kind}"] = train(name, saves, strategy(), callbacks=[saver])
            for step in (5, 15) if sharded else (15,):
                resumed = train(name, saves / "again", strategy(), saves / f"step={step}.ckpt")
                assert resumed == results[f"{name}, {kind}"], (name, kind, step)
    ranks = learn_ranks(folder, ModelParallelStrategy(2, 1))
    for step in (15, 30):
        saved = folder / "ranks" / f"step={step}.ckpt"
        assert learn_ranks(folder / "again", ModelParallelStrategy(2, 1), saved) == ranks, step
    return {**results, f"{RANKS}, full": ranks}


def main() -> None:
    torch.set_num_threads(1)
    kind, folder = sys.argv[1], Path(sys.argv[2])
    results = {"ddp": ddp, "fsdp": fsdp}[kind](folder)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
