"""Sweeps under one budget: equal costs, shared beginnings, and resuming after they stop."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Command
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from hydra.utils import get_object
from hydra_plugins.fitsmall.search import Search

from fitsmall.compressors import load, same_bits
from fitsmall.experiments.run.curves import step_curve

# The sweep below is made once for the tests of one worker.
group = pytest.mark.xdist_group("study")

BUDGET = ["trainer.accelerator=cpu", "budget.steps=24", "budget.scale=1", "budget.validations=4"]
ALONE = "hydra.sweeper.grids=[]"  # no grids but that of the command line
DOCS = Path(__file__).parents[1] / "docs" / "study.md"

MINE = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.body, self.head = torch.nn.Linear(20, width), torch.nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.body(x).relu())

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val/error", (self(batch[0]).argmax(1) != batch[1]).float().mean())

    def test_step(self, batch, _):
        self.log("test/error", (self(batch[0]).argmax(1) != batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


class Data(pl.LightningDataModule):
    def setup(self, stage):
        x = torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
        self.data = TensorDataset(x, (x[:, 0] > 0).long())

    def train_dataloader(self):
        return DataLoader(self.data, 100, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, 500)

    test_dataloader = val_dataloader
"""


def study(folder: Path, *words: str, experiment: str = "train_big_then_compress") -> Command:
    return Command("train", "-m", f"experiment={experiment}", *BUDGET, *words, folder=folder)


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in folder.glob("runs/*/*/*/result.json")]


SMALL = "model.net.widths=[64,8,10]"
GRIDS = [
    "{model.net.widths:'[64,8,10]',compression:'none,bits4,zeros80_bits4',fine_tune:'true,false'}",
    "{model.net.widths:'[64,16,10]',compression:'none,bits4',fine_tune:true}",
]
SWEPT = ["seed=0", f"hydra.sweeper.grids=[{','.join(GRIDS)}]"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sizes: one with two compressions, tuned and not; one with a tuned compression."""
    folder = tmp_path_factory.mktemp("study")
    done = study(folder, *SWEPT).end()
    assert done.returncode == 0, done.stderr
    return folder


@group
def test_every_run_spends_the_budget(swept: Path) -> None:
    found = results(swept)
    # Without compression there is nothing to tune: with and without fine-tuning are one run.
    assert len(found) == (1 + 2 * 2) + 2
    for result in found:
        tuned = result["fine_tune"]
        plain = result["compression"] == "none"
        assert result["steps_before"] == (12 if tuned else 24)
        assert result["steps"] == (24 if tuned or plain else 24 + 20)
        assert 0 < result["operations_needed"] <= result["operations"]
        if not plain:
            beginning = json.loads(Path(result["init"]).with_name("result.json").read_text())
            assert result["seconds"] > beginning["seconds"] > 0
        if "80 % zeros" in result["compression"]:
            assert result["operations_needed"] < 0.35 * result["operations"]


@group
def test_runs_that_differ_in_compression_alone_begin_alike(swept: Path) -> None:
    begun = [path for path in (swept / "runs" / "dense").iterdir() if path.is_dir()]
    assert len(begun) == 2 * 2  # sizes, half of the budget or all of it
    # Each was trained once: its folder has one curve, of four points.
    assert all(len(step_curve(path / "metrics.csv", "error")) == 4 for path in begun)
    tuned = {result["init"] for result in results(swept) if result["fine_tune"]}
    assert {str(path / "model.fitsmall") for path in begun} > tuned
    assert len(tuned) == 2


@group
def test_without_fine_tuning_weights_stay(swept: Path) -> None:
    (path,) = (
        path
        for path in swept.glob("runs/*/*/*/result.json")
        if "80 % zeros" in path.read_text() and '"fine_tune": false' in path.read_text()
    )
    assert "within_budget.FrozenWeights" in path.with_name("config.yaml").read_text()
    dense = load(json.loads(path.read_text())["init"])
    compressed = load(path.with_name("model.fitsmall"))
    for name, weight in dense.items():
        if name.endswith("weight"):
            zero = compressed[name] == 0
            assert weight[zero].abs().mean() < weight[~zero].abs().mean()
            error = (compressed[name] - weight)[~zero].abs().max()
            assert error < 0.5 * weight.abs().max()
        else:
            assert same_bits(compressed[name], weight)


@group
def test_a_finished_study_is_not_done_again(swept: Path) -> None:
    times = {path: path.stat().st_mtime for path in swept.glob("runs/**/*") if path.is_file()}
    done = study(swept, *SWEPT).end()
    assert done.returncode == 0, done.stderr
    assert "7 jobs in" in done.stdout
    assert "7 of them finished before" in done.stdout
    for path, changed in times.items():
        if path.name not in ("multirun.yaml", "summary.json"):
            assert path.stat().st_mtime == changed, path


def test_a_job_that_fails_sinks_no_other(tmp_path: Path) -> None:
    sizes = f"{SMALL},[63,8,10]"
    done = study(tmp_path, "seed=0", sizes, "compression=none", ALONE).end()
    assert done.returncode == 1
    (result,) = results(tmp_path)
    assert result["size"] == "64-8-10"
    assert "2 of 2" in done.stdout
    assert "1 failed" in done.stderr
    assert "mat1 and mat2 shapes cannot be multiplied" in done.stderr
    (failure,) = tmp_path.glob("runs/*/*/*/error.txt")
    command, _, trace = failure.read_text().partition("\n\n")
    assert command.startswith("fitsmall train seed=0 'model.net.widths=[63,8,10]'")
    assert trace.startswith("Traceback")
    # It is no failure of another sweep in this folder, and other observers are another run.
    coders = "observers.checkpoint.coder=context,huffman"
    done = study(tmp_path, "seed=0", SMALL, "compression=none", coders, ALONE).end()
    assert done.returncode == 0, done.stderr
    assert "2 jobs in" in done.stdout
    assert "1 of them finished before" in done.stdout
    assert {result["coder"] for result in results(tmp_path)} == {"context", "huffman"}


def test_a_study_that_is_stopped_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = [
        "seed=0",
        SMALL,
        "compression=none,zeros80_bits4",
        "budget.steps=300",
        "observers.resume.train_time_interval={_target_: datetime.timedelta, seconds: 0.2}",
        "hydra.sweeper.grids=[{},{fine_tune:false}]",
    ]
    for folder in (whole, killed):
        folder.mkdir()
    run = study(killed, *words)
    while not list(killed.glob("runs/dense/*/resume-*.ckpt")):
        assert run.runs()
        time.sleep(0.02)
    run.send(signal.SIGKILL)
    run.end()
    assert not results(killed)
    (saved,) = killed.glob("runs/dense/*/resume-*.ckpt")
    step = int(torch.load(saved, weights_only=False)["global_step"])
    assert 0 < step < 300
    # Then once more, between two jobs or within the next one, by Ctrl-C.
    run = study(killed, *words)
    # A result exists for a moment before it has its size.
    while not any('"size"' in path.read_text() for path in killed.glob("runs/*/*/*/result.json")):
        assert run.runs()
        time.sleep(0.02)
    run.send(signal.SIGINT)
    done = run.end()
    assert done.returncode != 0
    assert "stopped with 1 of 3 jobs finished: run the same command to continue" in done.stdout
    for folder in (killed, whole):
        done = study(folder, *words).end()
        assert done.returncode == 0, done.stderr
    pairs = [
        {(r["compression"], r["fine_tune"]): r for r in results(folder)}
        for folder in (killed, whole)
    ]
    assert len(pairs[0]) == 3
    for name, result in pairs[0].items():
        assert result["error"] == pairs[1][name]["error"]
        assert result["bytes"] == pairs[1][name]["bytes"]
    for path in killed.glob("runs/dense/*/metrics.csv"):
        mended = step_curve(path, "error")
        assert len(mended) == 4
        assert mended == step_curve(whole / path.relative_to(killed), "error")


def test_numbered_folders_are_those_of_this_sweep(tmp_path: Path) -> None:
    """Results that another sweep left in a folder are not taken for those of this one."""
    words = ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "reference=false"]
    words += ["trainer.enable_progress_bar=false", "hydra.sweep.dir=here"]
    for sparsities, finished in (("0.5,0.6", 0), ("0.6,0.7", 0), ("0.6,0.7", 2)):
        values = f"callbacks.prune.sparsity={sparsities}"
        done = Command("train", "-m", *words, values, folder=tmp_path).end()
        assert done.returncode == 0, done.stderr
        assert f"2 jobs in here, {finished} of them finished before" in done.stdout
        for number, sparsity in enumerate(sparsities.split(",")):
            result = json.loads((tmp_path / "here" / str(number) / "result.json").read_text())
            assert f"callbacks.prune.sparsity={sparsity}" in result["overrides"]
            said = f" of 2: callbacks.prune.sparsity={sparsity}: " in done.stdout
            assert said == (finished == 0)


def test_a_search_learns_and_goes_on(tmp_path: Path) -> None:
    experiment = "search_compression"
    words = ["hydra/sweeper=search", "model.net.widths=[64,16,10]", "hydra.sweeper.trials=3"]
    done = study(tmp_path, *words, experiment=experiment).end()
    assert done.returncode == 0, done.stderr
    assert "3 trials in" in done.stdout
    found = results(tmp_path)
    assert len(found) == 3
    assert len({result["compression"] for result in found}) == 3
    front = re.findall(r"^([\d.]+), (\S+): callbacks.prune.sparsity=", done.stdout, re.MULTILINE)
    points = {(r["error_validation"], r["bytes"]) for r in found}
    best = {
        (error, size)
        for error, size in points
        if not any(e <= error and b <= size and (e, b) != (error, size) for e, b in points)
    }
    assert len(front) == len(best)
    done = study(tmp_path, *words[:-1], "hydra.sweeper.trials=4", experiment=experiment).end()
    assert done.returncode == 0, done.stderr
    assert "4 trials in" in done.stdout
    assert "3 of them finished before" in done.stdout
    assert len(results(tmp_path)) == 4
    message = "a search with other settings, for the objectives error_validation, bytes: repeat"
    for other in ("hydra.sweeper.objectives=[error_validation,ratio]", "budget.steps=30"):
        done = study(tmp_path, *words, other, experiment=experiment).end()
        assert done.returncode == 2
        assert message in done.stderr
    report = Command("report", "runs/search_compression/digits_mlp", folder=tmp_path).end()
    assert report.returncode == 0, report.stderr


def test_objectives_are_numbers_of_the_result() -> None:
    search = Search(objectives=["error_validation", "size"])
    message = "objectives: size is not a number in result.json; it has error_validation, bytes"
    with pytest.raises(HydraException, match=message):
        search._values({"error_validation": 0.1, "size": "64-8-10", "bytes": 9})


def test_the_documented_study_of_an_own_network_runs(tmp_path: Path) -> None:
    for name, text in re.findall(r"```yaml\n# (\S+)\n(.*?)```", DOCS.read_text(), re.DOTALL):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "mine.py").write_text(MINE)
    words = ["--config-dir", "configs", "experiment=mine", "seed=0", "budget.steps=10", ALONE]
    words += ["budget.scale=1", "model.width=4,64", "compression=none,zeros80_bits4"]
    done = Command("train", "-m", *words, folder=tmp_path).end()
    assert done.returncode == 0, done.stderr
    sizes = [(r["size"], r["compression"]) for r in results(tmp_path)]
    ways = ("none", "80 % zeros, 4 bits")
    assert sorted(sizes) == sorted((f"width {n}", way) for n in (4, 64) for way in ways)
    assert all(f"{number} of 4" in done.stdout for number in range(1, 5))


def results_of_small(folder: Path) -> dict[tuple[str, bool], dict[str, Any]]:
    """Results of the smaller network, by compression and fine-tuning."""
    found = (r for r in results(folder) if r["size"] == "64-8-10")
    return {(r["compression"], r["fine_tune"]): r for r in found}


def same(found: dict[Any, dict[str, Any]], expected: dict[Any, dict[str, Any]]) -> bool:
    return all(
        found[key][name] == expected[key][name] for key in found for name in ("error", "bytes")
    )


@pytest.mark.slow
@group
def test_jobs_run_at_the_same_time(swept: Path, tmp_path: Path) -> None:
    # In an interpreter of its own, at whose end joblib's workers end.
    command = [str(Path(sys.executable).with_name("fitsmall")), "train", "-m"]
    command += ["experiment=train_big_then_compress", *BUDGET, "seed=0", SMALL, ALONE]
    command += ["compression=none,bits4", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 of 2" in done.stdout
    found = results_of_small(tmp_path)
    assert len(found) == 2
    assert same(found, results_of_small(swept))


@pytest.mark.slow
@group
def test_a_job_is_submitted(swept: Path, tmp_path: Path) -> None:
    words = ["seed=0", SMALL, ALONE, "compression=bits4", "hydra/launcher=submitit_local"]
    done = study(tmp_path, *words, "hydra.launcher.timeout_min=9").end()
    assert done.returncode == 0, done.stderr
    assert "1 of 1" in done.stdout
    found = results_of_small(tmp_path)
    assert len(found) == 1
    assert same(found, results_of_small(swept))


def test_a_cluster_gets_a_task_and_a_gpu_for_each_process() -> None:
    words = ["hydra/launcher=cluster", "hydra.launcher.partition=p", "trainer.devices=2"]
    with initialize_config_module("fitsmall.configs", version_base="1.3"):
        config = compose("train", words, return_hydra_config=True)
    launcher = config.hydra.launcher
    assert get_object(launcher._target_).__name__ == "SlurmLauncher"
    assert (launcher.tasks_per_node, launcher.gpus_per_node, launcher.partition) == (2, 2, "p")


@pytest.mark.slow
@group
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_every_job_of_a_sweep_has_its_own_processes(
    launcher: str, swept: Path, tmp_path: Path
) -> None:
    (tmp_path / "own" / "trainer").mkdir(parents=True)
    two = "defaults: [default]\ndevices: 2\nstrategy: ddp\n"
    (tmp_path / "own" / "trainer" / "two.yaml").write_text(two)
    words = ["train", "-m", "--config-dir=own", "experiment=train_big_then_compress", *BUDGET]
    words += ["seed=0", SMALL, ALONE, "compression=none,bits4", "trainer=two"]
    done = Command(*words, f"hydra/launcher={launcher}", folder=tmp_path).end()
    assert done.returncode == 0, done.stderr
    alone, found = results_of_small(swept), results_of_small(tmp_path)
    assert len(found) == 2
    for key, result in found.items():
        # Both processes together do what one does.
        assert result["flops_per_step"] == alone[key]["flops_per_step"]
        assert result["error"] == pytest.approx(alone[key]["error"], abs=0.1)
        assert result["steps"] == 24
    # The second process of each job has worked in the folder of the job.
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "dense",
        "train_big_then_compress",
    }
