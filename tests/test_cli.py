"""The command ``fitsmall``: help, mistakes, completion, and a new project."""

import csv
import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from command import Command

import fitsmall.configs
from fitsmall.experiments.cli.main import main

QUICK = ["trainer.max_epochs=1", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
EXPERIMENTS = Path(fitsmall.configs.__file__).parent / "experiment"


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are set for Hydra."""
    monkeypatch.setattr(sys, "argv", ["fitsmall"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert not exit.value.code
    assert capsys.readouterr().out == f"fitsmall {version('fitsmall')}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "nowhere.fitsmall"], "nowhere.fitsmall"),
        (["inspect", __file__], "is not a fitsmall file"),
        (["train", "data=mnistt"], "data/mnistt': did you mean data=mnist? There are cifar10, "),
        (["train", "data=zzz"], "there are cifar10, digits, mnist, stdlib"),
        (["train", "callbacks=[prun]"], "did you mean callbacks=[prune]?"),
        (["train", "callbacks.prune.sparsty=0.5"], "did you mean callbacks.prune.sparsity?"),
        (["train", "trainer={max_epoch: 3}"], "add others by ++trainer.NAME=VALUE"),
        (["train", "callbacks.rank.price=1"], "a setting of callbacks=[rank], which is not chosen"),
        (["train", "callbacks.prune.sparsity=95", *QUICK], "a fraction in [0, 1], got 95"),
        (["train", "callbacks=[share,prune]", *QUICK], "list GradualPruning first"),
        (
            ["train", "callbacks@observers=[monitor]", *QUICK],
            "add checkpoint to callbacks@observers",
        ),
        (["train", "trainer.max_epoch=3"], "did you mean trainer.max_epochs?"),
        (["train", "init=nowhere.fitsmall", *QUICK], "nowhere.fitsmall is no file"),
        (["compress", "size=1/20"], "takes a checkpoint first"),
        (["suggest", "model=perceptron"], "takes a checkpoint first"),
        (["suggest", "a.ckpt", "-m", "seed=0,1"], "fitsmall suggest makes one run"),
        (["suggest", "nowhere.ckpt", *QUICK], "nowhere.ckpt is no file"),
        (["compress", "a.ckpt", "trainer.max_epochs=3"], "has no target: name one"),
        (["compress", "nowhere.ckpt", "size=1/20", *QUICK], "nowhere.ckpt is no file"),
        (["compress", "nowhere.ckpt", "size=40", *QUICK], "for bytes write '40 B'"),
        (["train", "-m", "hydra/sweeper=search"], "nothing to search: give an interval"),
        (
            ["train", "-m", "experiment=search_compression", "hydra/sweeper=grids"],
            "sparsity: a grid has values, not an interval: list values, or search with",
        ),
        (["train", "model=lenet5", *QUICK], "choose data=mnist"),
        (["train", "~model._target_", *QUICK], "makes a dict, and no LightningModule: name its"),
        # After the first validation, and not when the file is written.
        (
            ["train", "metric=f1", "+trainer.limit_train_batches=2", *QUICK],
            "it logs val/error: choose one by metric=..., or log it\n",
        ),
        (["train", "model=resnet20", *QUICK], "images of 3 x 32 x 32, and got 1 x 8 x 8"),
    ],
)
def test_mistakes_get_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quiet = [
        f"hydra.run.dir={tmp_path}",
        f"hydra.sweep.dir={tmp_path}",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]
    with pytest.raises(SystemExit) as exit:
        main(words + quiet * (words[0] in ("train", "compress")))
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_help_helps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert not exit.value.code
    top = capsys.readouterr().out
    assert all(word in top for word in ("train", "inspect", "decompress"))
    with pytest.raises(SystemExit) as exit:
        main(["train", "--help"])
    assert not exit.value.code
    below = capsys.readouterr().out
    for part in (
        "experiment=deep_compression",
        "callbacks: channels, checkpoint, compress, ema, guard, learn",
        "data: cifar10, digits, mnist",
    ):
        assert part in below


def test_a_trained_network_is_compressed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, first, second = (tmp_path / name for name in ("dense", "first", "second"))
    quick = [*QUICK, "trainer.max_epochs=4", "reference=false"]
    main(["train", "callbacks=[]", *quick, f"hydra.run.dir={dense}"])
    main(["suggest", f"{dense}/model.fitsmall", *QUICK, f"hydra.run.dir={tmp_path}/guide"])
    shown = capsys.readouterr().out
    with open(tmp_path / "guide" / "trade_off.csv", newline="") as file:
        offers = list(csv.DictReader(file))
    assert [float(offer["ratio"]) for offer in offers] == [4, 6, 8, 10, 15, 20, 30, 40, 60, 80]
    losses = [float(offer["rise"]) for offer in offers]
    assert losses == sorted(losses)
    assert all(f"{int(offer['bytes']):,}" in shown for offer in offers)
    assert (tmp_path / "guide" / "trade_off.png").is_file()
    main(["compress", f"{dense}/model.fitsmall", "size=1/25", *quick, f"hydra.run.dir={first}"])
    assert 8000 < (first / "model.fitsmall").stat().st_size <= 202440 // 25
    shown = capsys.readouterr().out
    assert "at most 8,097 bytes" in shown
    was = json.loads((dense / "result.json").read_text())["error"]
    assert json.loads((first / "result.json").read_text())["error_before"] == was
    assert f"before: {100 * was:.2f} % in 202,440 bytes" in shown
    # A dense network that was perfect cannot be kept up with.
    main(["decompress", f"{dense}/model.fitsmall", "-o", f"{tmp_path}/dense.safetensors"])
    words = ["max_drop=0", "dense=0", *quick, "+trainer.val_check_interval=6"]
    with pytest.raises(SystemExit) as exit:
        main(["compress", f"{tmp_path}/dense.safetensors", *words, f"hydra.run.dir={second}"])
    assert exit.value.code == 1
    assert not json.loads((second / "result.json").read_text())["targets_met"]
    assert "within 0 of 0" in capsys.readouterr().out


def test_a_users_own_configuration_and_module(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "from fitsmall.experiments.models.classifier import Classifier\n"
        "class Mine(Classifier):\n"
        "    def __init__(self, units, optimizer):\n"
        "        net = nn.Sequential(nn.Flatten(), nn.Linear(64, units), nn.Linear(units, 10))\n"
        "        super().__init__(net, optimizer)\n"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "_target_: mine.Mine\nunits: 20\n"
        "optimizer: {_target_: torch.optim.SGD, _partial_: true, lr: 0.1}\n"
    )
    words = ["train", "--config-dir", str(tmp_path), "model=mine", "model.units=25", *QUICK]
    run = Command(*words, "reference=false", "hydra.run.dir=run", folder=tmp_path).end()
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["layers"]["net.1.weight"]["weights"] == 25 * 64


def test_a_new_project_trains_at_once(tmp_path: Path) -> None:
    run = Command("new", str(tmp_path / "mine")).end()
    assert run.returncode == 0, run.stderr
    commands = re.findall(r"^    (.*)$", run.stdout, re.MULTILINE)
    assert commands[0] == f"cd {tmp_path / 'mine'}"
    readme = (tmp_path / "mine" / "README.md").read_text()
    assert commands[1] in readme
    first, study, report = (
        shlex.split(line, comments=True)[1:]
        for line in re.findall(r"^    (fitsmall .*)$", readme, re.MULTILINE)
    )
    cpu = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    quick = ["trainer.max_epochs=8", "reference=false"]
    small = ["seed=0", "model.width=4,64", "budget.steps=10", "hydra.sweeper.grids=[]"]
    small += ["compression=none,zeros80_bits4"]
    for words in ([*first, *cpu, *quick], [*study, *cpu, *small], report):
        run = Command(*words, folder=tmp_path / "mine").end()
        assert run.returncode == 0, run.stderr
    (result,) = (tmp_path / "mine" / "runs").glob("20*/result.json")
    assert json.loads(result.read_text())["error"] < 0.2
    assert list((tmp_path / "mine" / "runs").glob("*/*/report/report.html"))
    again = Command("new", str(tmp_path / "mine")).end()
    assert again.returncode == 2
    assert "is not empty" in again.stderr


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("fitsmall tr", {"train"}),
        ("fitsmall train data=mni", {"mnist"}),
        ("fitsmall train callbacks.prune.spars", {"callbacks.prune.sparsity="}),
        (
            "fitsmall train -m experiment=",
            {path.stem for path in EXPERIMENTS.glob("*.yaml")},
        ),
        ("fitsmall inspect ", set()),
    ],
)
def test_bash_completes(line: str, reply: set[str]) -> None:
    """As Bash calls it, which breaks words at spaces and at equal signs."""
    words = [w for w in re.split(r"[ ]|(=)", line) if w is not None]
    words = [w for i, w in enumerate(words) if w or i == len(words) - 1]
    words = words[:-1] if words[-2:] == ["=", ""] else words
    script = (
        f"PATH={Path(sys.executable).parent}:$PATH\n"
        'eval "$(fitsmall completion bash)"\n'
        f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)}\n"
        f"COMP_WORDS=({' '.join(map(shlex.quote, words))}) COMP_CWORD={len(words) - 1}\n"
        '_fitsmall; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    run = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)
    assert {*run.stdout.split()} == reply, run.stderr
