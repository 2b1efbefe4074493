"""Sweeps under one budget: equal costs, shared beginnings, and what is left when they stop."""

import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from command import Command
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from hydra.utils import get_object
from hydra_plugins.fitsmall.search import Search
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from fitsmall.compressors import load, same_bits
from fitsmall.experiments.models.operations import count_operations, operation_counter
from fitsmall.experiments.run.budget import Budget, StepCost
from fitsmall.experiments.run.curves import step_curve
from fitsmall.experiments.run.folder import write_text
from fitsmall.experiments.run.processes import make_once, process_group_id
from fitsmall.experiments.run.within_budget import StepTimer

# One worker, since the sweep below is made once for all.
pytestmark = pytest.mark.xdist_group("study")

STUDY = [
    "trainer.accelerator=cpu",
    "budget.steps=80",
    "budget.scale=1",
    "budget.validations=4",
]
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

SIZES = "model.net.widths=[64,8,10],[64,16,10]"


def study(folder: Path, *words: str, experiment: str = "train_big_then_compress") -> Command:
    return Command("train", "-m", f"experiment={experiment}", *STUDY, *words, folder=folder)


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in folder.glob("runs/*/*/*/result.json")]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sizes, two compressions of each, with training and without."""
    folder = tmp_path_factory.mktemp("study")
    compressions = "compression=none,bits4,zeros80_bits4"
    done = study(folder, "seed=0", SIZES, compressions, "fine_tune=true,false").end()
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_every_run_spends_the_budget(swept: Path) -> None:
    found = results(swept)
    # Without compression there is nothing that could be tuned: these two are one run.
    assert len(found) == 2 * (1 + 2 * 2)
    for result in found:
        tuned = result["fine_tune"]
        plain = result["compression"] == "none"
        assert result["steps_before"] == (40 if tuned else 80)
        assert result["steps"] == (80 if tuned or plain else 100)
        assert 0 < result["operations_needed"] <= result["operations"]
        if not plain:
            beginning = json.loads(Path(result["init"]).with_name("result.json").read_text())
            assert result["seconds"] > beginning["seconds"] > 0
        if "80 % zeros" in result["compression"]:
            assert result["operations_needed"] < 0.35 * result["operations"]


def test_runs_that_differ_in_compression_alone_begin_alike(swept: Path) -> None:
    begun = [path for path in (swept / "runs" / "dense").iterdir() if path.is_dir()]
    assert len(begun) == 2 * 2  # sizes, half of the budget or all of it
    for path in begun:
        # Each was trained once: its folder has one curve, of four points.
        curve = (path / "metrics.csv").read_text().splitlines()
        column = curve[0].split(",").index("val/error")
        assert sum(bool(line.split(",")[column]) for line in curve[1:]) == 4
    tuned = {result["init"] for result in results(swept) if result["fine_tune"]}
    assert {str(path / "model.fitsmall") for path in begun} > tuned
    assert len(tuned) == 2


def test_without_fine_tuning_weights_stay(swept: Path) -> None:
    for path in swept.glob("runs/*/*/*/result.json"):
        folder, result = path.parent, json.loads(path.read_text())
        if result["compression"] == "80 % zeros, 4 bits" and not result["fine_tune"]:
            config = (folder / "config.yaml").read_text()
            assert "within_budget.FrozenWeights" in config
            dense, compressed = load(result["init"]), load(folder / "model.fitsmall")
            for name, weight in dense.items():
                if name.endswith("weight"):
                    zero = compressed[name] == 0
                    assert weight[zero].abs().mean() < weight[~zero].abs().mean()
                    error = (compressed[name] - weight)[~zero].abs().max()
                    assert error < 0.5 * weight.abs().max()
                else:
                    assert same_bits(compressed[name], weight)


def test_a_finished_study_is_not_done_again(swept: Path) -> None:
    times = {path: path.stat().st_mtime for path in swept.glob("runs/**/*") if path.is_file()}
    compressions = "compression=none,bits4,zeros80_bits4"
    done = study(swept, "seed=0", SIZES, compressions, "fine_tune=true,false").end()
    assert done.returncode == 0, done.stderr
    assert "10 jobs in" in done.stdout
    assert "10 of them finished before" in done.stdout
    for path, changed in times.items():
        if path.name not in ("multirun.yaml", "summary.json"):
            assert path.stat().st_mtime == changed, path


def test_a_job_that_fails_sinks_no_other(tmp_path: Path) -> None:
    sizes = "model.net.widths=[64,8,10],[63,8,10]"
    done = study(tmp_path, "seed=0", sizes, "compression=none").end()
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
    # It is no failure of another sweep in this folder.
    done = study(tmp_path, "seed=0", "model.net.widths=[64,8,10]", "compression=none").end()
    assert done.returncode == 0, done.stderr


def test_a_study_that_is_stopped_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = [
        "seed=0",
        "model.net.widths=[64,8,10]",
        "compression=none,zeros80_bits4",
        "budget.steps=600",
        "observers.resume.train_time_interval={_target_: datetime.timedelta, seconds: 0.3}",
    ]
    for folder in (whole, killed):
        folder.mkdir()
    run = study(killed, *words)
    while not list(killed.glob("runs/dense/*/resume-*.ckpt")):
        assert run.runs()
        time.sleep(0.05)
    run.send(signal.SIGKILL)
    run.end()
    assert not results(killed)
    (saved,) = killed.glob("runs/dense/*/resume-*.ckpt")
    step = int(torch.load(saved, weights_only=False)["global_step"])
    assert 0 < step < 600
    # Then once more, between two jobs or within the next one, by Ctrl-C.
    run = study(killed, *words)
    # The file is there before it says of which size it is.
    while not any('"size"' in path.read_text() for path in killed.glob("runs/*/*/*/result.json")):
        assert run.runs()
        time.sleep(0.05)
    run.send(signal.SIGINT)
    done = run.end()
    assert done.returncode != 0
    assert "stopped with 1 of 3 jobs finished: the same command goes on from here" in done.stdout
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


def test_observers_make_different_runs(tmp_path: Path) -> None:
    words = ["seed=0", "model.net.widths=[64,8,10]", "compression=none"]
    done = study(tmp_path, *words, "observers.checkpoint.coder=context,huffman").end()
    assert done.returncode == 0, done.stderr
    assert "2 jobs in" in done.stdout
    assert {result["coder"] for result in results(tmp_path)} == {"context", "huffman"}


def test_numbered_folders_are_those_of_this_sweep(tmp_path: Path) -> None:
    """What another sweep has left in a folder is none of its own results."""
    words = ["trainer.max_epochs=2", "reference=false", "trainer.enable_progress_bar=false"]
    for sparsities, first in (("0.5,0.6", 0), ("0.6,0.7", 0), ("0.6,0.7", 2)):
        values = f"callbacks.prune.sparsity={sparsities}"
        done = Command("train", "-m", *words, "hydra.sweep.dir=here", values, folder=tmp_path).end()
        assert done.returncode == 0, done.stderr
        assert f"2 jobs in here, {first} of them finished before" in done.stdout
        for number, sparsity in enumerate(sparsities.split(",")):
            result = json.loads((tmp_path / "here" / str(number) / "result.json").read_text())
            assert f"callbacks.prune.sparsity={sparsity}" in result["overrides"]
            said = f" of 2: callbacks.prune.sparsity={sparsity}: " in done.stdout
            assert said == (first == 0)


def test_a_search_learns_and_goes_on(tmp_path: Path) -> None:
    experiment = "search_compression"
    words = ["hydra/sweeper=search", "model.net.widths=[64,16,10]", "hydra.sweeper.trials=4"]
    done = study(tmp_path, *words, experiment=experiment).end()
    assert done.returncode == 0, done.stderr
    assert "4 trials in" in done.stdout
    found = results(tmp_path)
    assert len(found) == 4
    assert len({result["compression"] for result in found}) == 4
    front = re.findall(r"^([\d.]+), (\S+): callbacks.prune.sparsity=", done.stdout, re.MULTILINE)
    points = {(r["error_validation"], r["bytes"]) for r in found}
    best = {
        (error, size)
        for error, size in points
        if not any(e <= error and b <= size and (e, b) != (error, size) for e, b in points)
    }
    assert len(front) == len(best)
    done = study(tmp_path, *words[:-1], "hydra.sweeper.trials=6", experiment=experiment).end()
    assert done.returncode == 0, done.stderr
    assert "6 trials in" in done.stdout
    assert "4 of them finished before" in done.stdout
    assert len(results(tmp_path)) == 6
    message = "has other settings, and error_validation, bytes as objectives: go on with the same"
    for other in ("hydra.sweeper.objectives=[error_validation,ratio]", "budget.steps=90"):
        done = study(tmp_path, *words, other, experiment=experiment).end()
        assert done.returncode == 2
        assert message in done.stderr
    report = Command("report", "runs/search_compression/digits_mlp", folder=tmp_path).end()
    assert report.returncode == 0, report.stderr


def test_objectives_are_numbers_of_the_result() -> None:
    search = Search(objectives=["error_validation", "size"])
    message = "objectives: size is no number of result.json, which has error_validation, bytes"
    with pytest.raises(HydraException, match=message):
        search._values({"error_validation": 0.1, "size": "64-8-10", "bytes": 9})


def test_the_documented_study_of_an_own_network_runs(tmp_path: Path) -> None:
    for name, text in re.findall(r"```yaml\n# (\S+)\n(.*?)```", DOCS.read_text(), re.DOTALL):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "mine.py").write_text(MINE)
    words = ["--config-dir", "configs", "experiment=mine", "seed=0", "budget.steps=30"]
    words += ["budget.scale=1", "model.width=4,64", "compression=none,zeros80_bits4"]
    done = Command("train", "-m", *words, "fine_tune=true", folder=tmp_path).end()
    assert done.returncode == 0, done.stderr
    sizes = [(r["size"], r["compression"]) for r in results(tmp_path)]
    ways = ("none", "80 % zeros, 4 bits")
    assert sorted(sizes) == sorted((f"width {n}", way) for n in (4, 64) for way in ways)
    assert all(f"{number} of 4" in done.stdout for number in range(1, 5))


def started(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A study as a user starts it: processes of launchers begin and end with the interpreter."""
    command = [str(Path(sys.executable).with_name("fitsmall")), "train", "-m"]
    options = [word for word in words if word.startswith("--")]
    overrides = [word for word in words if word not in options]
    command += [*options, "experiment=train_big_then_compress", *STUDY, *overrides]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_other_launchers_do_the_same(launcher: str, swept: Path, tmp_path: Path) -> None:
    several = "hydra.launcher.n_jobs=2" if launcher == "joblib" else "hydra.launcher.timeout_min=9"
    words = ["seed=0", "model.net.widths=[64,8,10]", "compression=bits4", "fine_tune=true,false"]
    done = started(tmp_path, *words, f"hydra/launcher={launcher}", several)
    assert done.returncode == 0, done.stderr
    assert "2 of 2" in done.stdout
    found, expected = (
        {
            (r["compression"], r["fine_tune"]): (r["error"], r["bytes"])
            for r in results(folder)
            if r["size"] == "64-8-10"
        }
        for folder in (tmp_path, swept)
    )
    assert len(found) == 2
    assert found.items() <= expected.items()


def test_a_cluster_gets_a_task_and_a_gpu_for_each_process() -> None:
    words = ["hydra/launcher=cluster", "hydra.launcher.partition=p", "trainer.devices=2"]
    with initialize_config_module("fitsmall.configs", version_base="1.3"):
        config = compose("train", words, return_hydra_config=True)
    launcher = config.hydra.launcher
    assert get_object(launcher._target_).__name__ == "SlurmLauncher"
    assert (launcher.tasks_per_node, launcher.gpus_per_node, launcher.partition) == (2, 2, "p")


@pytest.mark.parametrize(
    "launcher",
    [
        "basic",
        pytest.param("joblib", marks=pytest.mark.slow),
        pytest.param("submitit_local", marks=pytest.mark.slow),
    ],
)
def test_every_job_of_a_sweep_has_its_own_processes(
    launcher: str, swept: Path, tmp_path: Path
) -> None:
    (tmp_path / "own" / "trainer").mkdir(parents=True)
    two = "defaults: [default]\ndevices: 2\nstrategy: ddp\n"
    (tmp_path / "own" / "trainer" / "two.yaml").write_text(two)
    words = ["--config-dir=own", f"hydra/launcher={launcher}", "trainer=two"]
    words += ["seed=0", "model.net.widths=[64,8,10]", "compression=none,bits4", "fine_tune=true"]
    done = started(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    alone = {
        r["compression"]: r
        for r in results(swept)
        if r["size"] == "64-8-10" and r["compression"] in ("none", "4 bits")
    }
    found = results(tmp_path)
    assert len(found) == 2
    for result in found:
        other = alone[result["compression"]]
        # Both processes together do what one does.
        assert result["flops_per_step"] == other["flops_per_step"]
        assert result["error"] == pytest.approx(other["error"], abs=0.1)
        assert result["steps"] == 80
    # The second process of each job has worked in the folder of the job.
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "dense",
        "train_big_then_compress",
    }


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ({}, "one of flops, seconds and steps"),
        ({"flops": 1e9, "steps": 10}, "one of flops, seconds and steps"),
        ({"seconds": -1.0}, "positive"),
        ({"steps": 10, "dense": 1.0}, "budget.dense"),
        ({"steps": 10, "validations": 0}, "budget.calibration and budget.validations are 1 or"),
    ],
)
def test_a_budget_is_one_amount(amounts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**amounts)


def test_a_budget_buys_steps() -> None:
    pace = StepCost(flops=1e6, seconds=0.5)
    assert Budget(steps=7).steps_at(pace) == 7
    assert Budget(flops=2e7).steps_at(pace) == 20
    assert Budget(seconds=30).steps_at(pace) == 60
    with pytest.raises(ValueError, match="pays for 1 steps: one costs 1e"):
        Budget(flops=1.5e6).steps_at(pace)
    with pytest.raises(ValueError, match=r"can be counted: give budget.steps or budget.seconds"):
        Budget(flops=1.5e6).steps_at(StepCost(flops=0.0, seconds=0.5))


def shared(path: Path, made: list[str], name: str, wait: float = 0.3) -> str:
    """What several jobs need: whoever makes it takes a while, and signs it."""

    def make() -> str:
        made.append(name)
        time.sleep(wait)
        write_text(path, made[0])
        return made[0]

    return make_once(path, lambda: path.read_text() if path.is_file() else None, make)


def test_what_jobs_share_is_made_by_one_at_a_time(tmp_path: Path) -> None:
    made: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda name: shared(tmp_path / "shared", made, name), "abcd")]
    assert found == 4 * made
    assert len(made) == 1


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "FITSMALL_JOB"])
def test_further_processes_of_a_job_wait_for_the_first_of_their_own(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = tmp_path / "shared", ["another"]
    monkeypatch.setenv(variable, "6")
    write_text(path.with_suffix(".begun"), process_group_id())
    monkeypatch.setenv(variable, "7")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(shared, path, made, "second")
        time.sleep(0.3)
        assert made == ["another"]  # a job that has begun is none of its own
        write_text(path.with_suffix(".begun"), process_group_id())
        assert second.result() == "another"
        assert made == ["another", "second"]
        # The first has found that it was made before; the second does not make it alone.
        assert pool.submit(shared, path, made, "second").result() == "another"
        assert len(made) == 2


@pytest.mark.parametrize("accumulated", [1, 4])
def test_seconds_are_those_of_optimizer_steps(accumulated: int) -> None:
    class Slow(BoringModel):
        def training_step(self, batch: Any, index: int) -> Any:
            time.sleep(0.02)
            return super().training_step(batch, index)

    watch = StepTimer()
    trainer = pl.Trainer(
        max_steps=6,
        accumulate_grad_batches=accumulated,
        callbacks=[watch],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    trainer.fit(Slow())
    assert len(watch.times) == 6
    assert watch.median_seconds() >= 0.02 * accumulated


def test_operations_are_counted_by_layer() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Flatten(), nn.Linear(36, 5, bias=False))
    net[0].weight.data[0] = 0
    net[2].weight.data[:, :18] = 0
    images, (first, *_, last) = torch.ones(3, 2, 5, 5), net
    convolution, linear = 2 * 3 * 9 * 4 * 18, 2 * 3 * 36 * 5
    expected = (convolution + linear, 0.75 * convolution + 0.5 * linear)
    assert count_operations(net, lambda: net(images)) == expected
    # It does not matter by which way the layers are run.
    assert count_operations(net, lambda: last(first(images).flatten(1))) == expected
    query = torch.ones(1, 2, 10, 8, requires_grad=True)
    with operation_counter() as counter:
        nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert counter.get_total_flops() == 2 * (2 * 2 * 10 * 10 * 8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("training", [True, False])
def test_operations_within_a_fast_kernel_are_counted(training: bool) -> None:
    batch, steps, width, heads, hidden = 2, 10, 8, 2, 16
    x = torch.ones(batch, steps, width)
    layer = nn.TransformerEncoderLayer(width, heads, hidden, batch_first=True).train(training)
    projections = 2 * batch * steps * width * 4 * width
    attention = 2 * 2 * batch * steps * steps * width
    perceptron = 2 * 2 * batch * steps * width * hidden
    lstm = nn.LSTM(width, hidden, batch_first=True).train(training)
    gates = 2 * batch * steps * (width + hidden) * 4 * hidden
    with torch.no_grad():
        total, needed = count_operations(layer, lambda: layer(x))
        assert total == needed == projections + attention + perceptron
        assert count_operations(lstm, lambda: lstm(x)) == (gates, gates)
