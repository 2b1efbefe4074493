"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import Tensor
from torch.utils.data import DataLoader

from fitsmall.compressors import load, same_bits

README = Path(__file__).parents[1] / "README.md"


class Model(BoringModel):
    """Reads its batches in either form, and logs an error."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        self.log("val/error", self.layer(batch).square().mean())


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short, after, long = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    module, dataset = Model(), RandomDataset(32, 64)
    names = {"module": module, "MyModule": Model, "dataset": dataset}
    names["loader"] = names["validation_loader"] = DataLoader(dataset, batch_size=8)
    exec(short, names)  # noqa: S102
    trained = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    restored = load("compressed/model.fitsmall")
    assert all(same_bits(restored[name], tensor) for name, tensor in trained.items())
    assert int(torch.count_nonzero(trained["layer.weight"])) == 3  # 5 % of 64
    exec(after, names)  # noqa: S102
    assert load("small.fitsmall").keys() == trained.keys()
    exec(long, names)  # noqa: S102
    assert Path("resume/last.ckpt").exists()
    assert Path("pareto/pareto.json").exists()
