"""The files that runs and sweeps leave, and their summary, on real digits."""

import json
from datetime import date
from pathlib import Path

import pytest
import torch
import yaml
from command import Command
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from safetensors.torch import load_file

from fitsmall.compressors import load, same_bits, save
from fitsmall.compressors.file.report import inspect as report_of
from fitsmall.experiments.cli.main import main
from fitsmall.experiments.data.images import Mnist
from fitsmall.experiments.run.curves import size_curve
from fitsmall.experiments.run.picture import _draw_bytes
from fitsmall.experiments.study.summary import Summary, summarize

# The sweep below is made once for the tests of one worker.
group = pytest.mark.xdist_group("experiments")

EPOCHS = 5
CPU = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
METHODS = "callbacks=[prune,share,share_biases]"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a short run, from the command line."""
    folder = tmp_path_factory.mktemp("sweep")
    words = ["experiment=deep_compression", METHODS, "seed=0,1", f"trainer.max_epochs={EPOCHS}"]
    run = Command("train", "-m", *words, *CPU, f"hydra.sweep.dir={folder}").end()
    assert run.returncode == 0, run.stderr
    (folder / "stdout").write_text(run.stdout)
    return folder


def test_a_picture_of_many_layers_can_be_read(tmp_path: Path) -> None:
    tensors = {f"net.{n}.weight": torch.randn(n, 10) for n in range(1, 61)}
    save(tmp_path / "model.fitsmall", tensors)
    (axes,) = Figure().subplots(1, 1, squeeze=False).flat
    _draw_bytes(axes, report_of(tmp_path / "model.fitsmall"))
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [*map(str, range(42, 61)), "41 others", "header"]


@group
def test_a_run_leaves_all_its_files(sweep: Path) -> None:
    folder = sweep / "0"
    result = json.loads((folder / "result.json").read_text())
    assert 0 < result["error_dense"] < result["error"] < 0.5
    assert result["bytes"] == (folder / "model.fitsmall").stat().st_size
    assert result["ratio"] == pytest.approx(result["bytes_dense"] / result["bytes"])
    assert result["seed"] == 0
    assert result["seconds"] > 0
    made = result["provenance"]
    assert made["machine"]
    assert f"torch {torch.__version__}" in made["software"]
    assert (date.today() - date.fromisoformat(made["date"])).days in (-1, 0, 1)
    layers = result["layers"]
    assert layers["net.fc1.weight"]["weights"] == 64 * 300
    assert sum(layer["bytes"] for layer in layers.values()) + result["overhead"] == result["bytes"]
    assert sum(layer["bytes_dense"] for layer in layers.values()) == result["bytes_dense"]
    for layer in layers.values():
        assert layer.keys() >= {"weights", "kept", "value_bits", "position_bits"}
    assert (folder / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["seed"] == config["seed"] == 0
    sizes = [size for size, _ in size_curve(folder / "metrics.csv")]
    assert len(sizes) == EPOCHS
    assert sizes[-1] == pytest.approx(result["bytes"], rel=0.01)


@group
def test_a_run_is_reproducible_from_its_overrides(sweep: Path, tmp_path: Path) -> None:
    first = json.loads((sweep / "1" / "result.json").read_text())
    words = [*first["overrides"], "reference=false", f"hydra.run.dir={tmp_path}"]
    again = Command("train", *words).end()
    assert again.returncode == 0, again.stderr
    ours, theirs = load(tmp_path / "model.fitsmall"), load(sweep / "1" / "model.fitsmall")
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "result.json").read_text())["error"] == first["error"]


@group
def test_a_sweep_ends_in_mean_and_spread(sweep: Path) -> None:
    (group,) = json.loads((sweep / "summary.json").read_text())
    runs = [json.loads((sweep / str(i) / "result.json").read_text()) for i in range(2)]
    assert group["seeds"] == [0, 1]
    assert "seed=0" not in group["overrides"]
    for measure in ("error", "error_dense", "bytes", "ratio", "seconds"):
        a, b = (run[measure] for run in runs)
        assert group[measure]["mean"] == pytest.approx((a + b) / 2)
        assert group[measure]["std"] == pytest.approx(abs(a - b) / 2**0.5)
    printed = (sweep / "stdout").read_text()
    assert "±" in printed
    assert METHODS in printed.partition("dense %")[0]


def test_summaries_group_by_everything_but_the_seed() -> None:
    first, second = summarize(
        {
            "seed": seed,
            "error": error,
            "error_dense": None,
            "bytes": 10,
            "ratio": 1.0,
            "seconds": 2.0,
            "overrides": [f"clusters={clusters}", f"seed={seed}"],
            "metric": "error",
        }
        for seed, clusters, error in [(0, 4, 0.1), (1, 4, 0.3), (0, 8, 0.5)]
    )
    assert first["overrides"] == ["clusters=4"]
    assert first["error"] == {"mean": pytest.approx(0.2), "std": pytest.approx(0.02**0.5)}
    assert first["error_dense"] is None
    assert second["error"] == {"mean": 0.5, "std": None}


def test_a_summary_is_of_its_own_jobs_in_the_unit_of_their_metric(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, config = Summary(), OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    result = {"metric": "bits_per_byte", "error": 2.345, "error_dense": None, "bytes": 10}
    result |= {"ratio": 1.0, "seconds": 2.0, "seed": 0, "overrides": ["a=1"]}
    for name in ("own", "stale"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result | {"fingerprint": name}))
    summary.jobs = {tmp_path / "own": "own", tmp_path / "stale": "of other settings"}
    summary.on_multirun_end(config)
    (group,) = json.loads((tmp_path / "summary.json").read_text())
    assert (group["seeds"], group["metric"]) == ([0], "bits_per_byte")
    printed = capsys.readouterr().out
    assert "bits per byte" in printed
    assert " 2.345 " in printed  # no percentage, and of one seed no deviation
    # Another sweeper names no jobs: all results count, and so do failures without one.
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "error.txt").write_text("command\n\nValueError: wrong\n")
    summary.jobs = None
    with pytest.raises(SystemExit):
        summary.on_multirun_end(config)
    assert "ValueError: wrong" in capsys.readouterr().err
    (group,) = json.loads((tmp_path / "summary.json").read_text())
    assert group["seeds"] == [0, 0]


@group
def test_inspect_and_decompress(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep / "0" / "model.fitsmall"
    main(["inspect", str(file)])
    table = capsys.readouterr().out
    for part in ("net.fc1.weight", "position bits", "P+Q+context", f"{file.stat().st_size:,}"):
        assert part in table
    output = tmp_path / "weights.safetensors"
    main(["decompress", str(file), "-o", str(output)])
    assert str(output) in capsys.readouterr().out
    weights = load_file(output)
    assert all(same_bits(weights[name], tensor) for name, tensor in load(file).items())


@group
def test_training_starts_from_the_weights_of_a_file(sweep: Path, tmp_path: Path) -> None:
    file = sweep / "0" / "model.fitsmall"
    words = ["model.optimizer.lr=0", "callbacks=[]", "reference=false", "trainer.max_epochs=1"]
    # A checkpoint that a run with other settings has left in the folder is not resumed.
    other = tmp_path / "resume-of-other-settings.ckpt"
    other.write_text("no checkpoint")
    run = Command("train", f"init={file}", *words, *CPU, f"hydra.run.dir={tmp_path}").end()
    assert run.returncode == 0, run.stderr
    assert not other.exists()
    weights = load(tmp_path / "model.fitsmall")
    assert all(same_bits(weights[name], tensor) for name, tensor in load(file).items())


@pytest.mark.slow
def test_the_recipe_reaches_its_bar_on_mnist(tmp_path: Path) -> None:
    """Deep Compression needs 27 KB for 1.58 %; chosen and measured on held-out images."""
    try:
        Mnist.load()
    except OSError as error:
        pytest.skip(str(error))
    words = ["experiment=deep_compression", "data=mnist", "model=lenet300", "reference=false"]
    run = Command("train", *words, "evaluate_on=val", f"hydra.run.dir={tmp_path}").end()
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["bytes"] < 5000
    assert result["error"] < 0.0158
