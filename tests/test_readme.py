"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader

from pressfit.compressors import load, same_bits

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    module = BoringModel()
    names = {"module": module, "MyModule": BoringModel}
    names["loader"] = DataLoader(RandomDataset(32, 64), batch_size=8)
    exec(first, names)  # noqa: S102
    trained = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    restored = load("compressed/model.pressfit")
    assert all(same_bits(restored[name], tensor) for name, tensor in trained.items())
    assert int(torch.count_nonzero(trained["layer.weight"])) == 3  # 5 % of 64
    exec(second, names)  # noqa: S102
    assert load("small.pressfit").keys() == trained.keys()
