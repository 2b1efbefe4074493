"""The examples of the README and of pages on methods run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fitsmall.compressors import load, same_bits

ROOT = Path(__file__).parents[1]


class Model(BoringModel):
    """Reads its batches in either form, and logs an error."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        self.log("val/error", self.layer(batch).square().mean())


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a reader has already, in a folder without files."""
    monkeypatch.chdir(tmp_path)
    dataset = RandomDataset(32, 64)
    names: dict[str, Any] = {"module": Model(), "MyModule": Model, "dataset": dataset}
    return names | dict.fromkeys(("loader", "validation_loader"), DataLoader(dataset, batch_size=8))


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_readme_s_examples_run(names: dict[str, Any]) -> None:
    fit, restore = examples(ROOT / "README.md")
    assert len(fit.splitlines()) == 10
    exec(fit, names)  # noqa: S102
    trained = names["module"].state_dict()
    restored = load("compressed/model.fitsmall")
    assert all(same_bits(restored[name], tensor) for name, tensor in trained.items())
    assert int(torch.count_nonzero(trained["layer.weight"])) == 3  # 5 % of 64
    exec(restore, names)  # noqa: S102


def test_the_examples_of_methods_run(names: dict[str, Any]) -> None:
    plan, shrink, fit, compress = examples(ROOT / "docs" / "methods.md")
    exec(plan, names)  # noqa: S102
    wide = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1))
    optimizer = torch.optim.Adam(wide.parameters())
    images = torch.randn(2, 3, 5, 5)
    exec(shrink, {"module": wide, "images": images, "optimizer": optimizer})  # noqa: S102
    assert wide[1].weight.shape == (2, 6, 1, 1)
    exec(fit, names)  # noqa: S102
    assert Path("resume/last.ckpt").exists()
    assert Path("pareto/pareto.json").exists()
    exec(compress, names)  # noqa: S102
    assert load("small.fitsmall").keys() == names["module"].state_dict().keys()


def test_the_example_of_sparse_kernels_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = examples(ROOT / "docs" / "sparse-kernels.md")
    names: dict[str, Any] = {"torch": torch, "module": nn.Linear(512, 512)}
    names["module"].weight.data.zero_()
    names["sample"] = torch.ones(64, 512)
    exec(example, names)  # noqa: S102
    assert torch.equal(names["outputs"], names["module"].bias.expand(64, -1))
    assert re.search(
        r"512x512 +100\.0% +64x512 .* (CSR|BSR 4x1)$", capsys.readouterr().out, re.MULTILINE
    )
