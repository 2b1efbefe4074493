"""Private names of torch and Lightning: each is there, and its loss is told at the start."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from fitsmall.callbacks import (
    EMA,
    ChannelPruning,
    CompressedCheckpoint,
    RandomState,
    RankLearning,
)
from fitsmall.callbacks import lightning_internals as of_lightning
from fitsmall.compressors import Rank, factorize, restore, save
from fitsmall.compressors import torch_internals as of_torch
from fitsmall.compressors.export.onnx import export_onnx
from fitsmall.compressors.torch_internals import Private, is_there
from fitsmall.compressors.training import Plan, QuantizationAwareTraining
from training import fit

ROOT = Path(__file__).parents[1]
PRIVATE = (*of_torch.PRIVATE, *of_lightning.PRIVATE)

# A use of each feature, in a folder.
USES: dict[str, Callable[[Path], Any]] = {
    "RankLearning and factorize": lambda folder: factorize(
        nn.Sequential(nn.Linear(4, 4)), {"0.weight": Rank("channels", 2)}
    ),
    "QuantizationAwareTraining and restore": lambda folder: Plan(
        [QuantizationAwareTraining()], nn.Linear(4, 4), horizon=10
    ),
    "CompressedCheckpoint and export_onnx": lambda folder: fit(
        folder, CompressedCheckpoint(folder)
    ),
    "RandomState": lambda folder: fit(folder, RandomState()),
    "ChannelPruning and restore": lambda folder: fit(folder, ChannelPruning(keep_size=0.5)),
    "RankLearning and ChannelPruning under DDP": lambda folder: fit(
        folder, RankLearning(keep_size=0.5), strategy="ddp"
    ),
    "EMA": lambda folder: fit(folder, EMA(decay=0.9)),
}


@pytest.fixture(autouse=True)
def _destroy_process_group() -> Iterator[None]:
    """A training under DDP that is refused leaves its group of one process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("private", PRIVATE, ids=lambda p: f"{p.holder}.{p.name}")
def test_the_name_is_there(private: Private) -> None:
    """The test that fails first with a version that has lost a name."""
    assert is_there(private)


def test_every_feature_has_a_use() -> None:
    assert {private.feature for private in PRIVATE} == USES.keys()


@pytest.mark.parametrize("feature", USES)
def test_a_lost_name_is_told_before_training(
    feature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (of_torch, of_lightning):
        if any(private.feature == feature for private in module.PRIVATE):
            lost = Private("torch.nn:Module", "_lost", feature)
            monkeypatch.setattr(module, "PRIVATE", (*module.PRIVATE, lost))
    with pytest.raises((RuntimeError, MisconfigurationException)) as told:
        USES[feature](tmp_path)
    assert str(told.value).startswith(f"{feature}: ")
    assert re.search(r"has no torch.nn:Module._lost any more: install \w+ 2\.\d", str(told.value))


@pytest.mark.parametrize(
    ("feature", "use"),
    [
        ("restore", restore),
        ("export_onnx", lambda net, path: export_onnx(net, path, torch.ones(1, 2))),
    ],
)
def test_without_training_it_is_told_too(
    feature: str, use: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, path = nn.Linear(2, 2), tmp_path / "file"
    save(path, net.state_dict())
    monkeypatch.setattr(of_torch, "PRIVATE", (Private("torch.nn:Module", "_lost", feature),))
    with pytest.raises(RuntimeError, match=f"{feature}: torch .* any more: install torch"):
        use(net, path)


def test_private_names_are_used_in_the_adapters_alone() -> None:
    # Classes of ours override these.
    overridden = {"_load_from_state_dict", "_apply", "_buffers"} | {
        private.name for private in of_lightning.PRIVATE if private.feature == "EMA"
    }
    names = {private.name for private in PRIVATE if private.name.startswith("_")} - overridden
    for folder in ("compressors", "callbacks", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            if not path.name.endswith("_internals.py"):
                found = {name for name in names if re.search(rf"\b{name}\b", path.read_text())}
                assert not found, path
