"""The curves of every logger are those of metrics.csv; W&B gets axes, layers and the file on top.

The records at W&B are read from the file that it writes offline.
"""

import csv
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import Command

# The run below is made once for the tests of one worker.
group = pytest.mark.xdist_group("loggers")

has_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="no wandb")
has_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="no tensorboard")

EPOCHS = 6
NAMES = [
    "val/error",
    "compression/bytes",
    "compression/val/error",
    "compression/sparsity/net.fc1.weight",
    "test/error",
]
Curve = list[tuple[int, float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The only run of a sweep, which all loggers hear of, and W&B offline."""
    folder = tmp_path_factory.mktemp("loggers")
    loggers = ["csv", *filter(find_spec, ("tensorboard", "mlflow", "wandb"))]
    words = ["experiment=deep_compression", f"logger=[{','.join(loggers)}]", "reference=false"]
    words += [f"trainer.max_epochs={EPOCHS}", "trainer.accelerator=cpu", "seed=3"]
    words += ["trainer.enable_progress_bar=false", "hydra.sweep.dir=runs/curves"]
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MLFLOW")]:
            patch.delenv(name)
        wandb = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        done = Command("train", "-m", *words, folder=folder, **wandb).end()
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "curves" / "0"


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Curve]:
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    curves = {
        name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in NAMES
    }
    assert [len(curve) for curve in curves.values()] == [*[EPOCHS] * 4, 1]
    return curves


def same(found: Mapping[str, Curve], expected: dict[str, Curve]) -> bool:
    """Equal to the 32 bits that some of them keep."""
    return all(
        found[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in curve]
        for name, curve in expected.items()
    )


# In a process of its own: a handler of absl's, which it loads, closes what pytest captures.
READER = """
import json, sys
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
found = EventMultiplexer().AddRunsFromDirectory(sys.argv[1]).Reload()
print(json.dumps({name: [(event.step, event.value) for event in found.Scalars("tensorboard", name)]
                  for name in sys.argv[2:]}))
"""


@group
@has_tensorboard
def test_tensorboard_has_the_curves(folder: Path, expected: dict[str, Curve]) -> None:
    command = [sys.executable, "-c", READER, str(folder), *NAMES]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert same({name: [(step, value) for step, value in found[name]] for name in NAMES}, expected)


@group
def test_mlflow_has_the_curves_and_the_configuration(
    folder: Path, expected: dict[str, Curve]
) -> None:
    MlflowClient = pytest.importorskip("mlflow").MlflowClient  # noqa: N806

    client = MlflowClient(f"sqlite:///{folder.parents[1] / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fitsmall")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert Path(run.info.run_name) == folder
    assert run.data.tags["group"] == "curves"
    saved: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    assert run.data.params["callbacks/prune/sparsity"] == str(
        saved["callbacks"]["prune"]["sparsity"]
    )
    assert same(
        {
            name: [
                (point.step, point.value)
                for point in client.get_metric_history(run.info.run_id, name)
            ]
            for name in NAMES
        },
        expected,
    )


def records(path: Path) -> Iterator[Any]:
    """The records of a run's file, which is a log of LevelDB's: blocks of 32 KiB, in which every
    part of a record has a checksum, a length and a kind (whole, first, middle, last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, block, record = path.read_bytes(), 32_768, b""
    place = 7  # after the header of the file
    while place + 7 <= len(data):
        left = block - place % block
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def items(updates: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in updates}


@pytest.fixture(scope="module")
def run(folder: Path) -> tuple[Path, list[Any]]:
    """The run's folder, and its records at W&B."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    return folder, list(records(file))


@group
@has_wandb
def test_the_run_belongs_to_its_sweep(run: tuple[Path, list[Any]]) -> None:
    (started,) = {
        (record.run.run_group, record.run.project)
        for record in run[1]
        if record.WhichOneof("record_type") == "run"
    }
    assert started == ("curves", "fitsmall")


@group
@has_wandb
def test_the_configuration_is_complete(run: tuple[Path, list[Any]]) -> None:
    folder, found = run
    config: dict[str, Any] = {}
    for record in found:
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            config |= items((record.run.config if kind == "run" else record.config).update)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert {key: config.get(key) for key in saved} == saved


@group
@has_wandb
def test_axes_are_declared(run: tuple[Path, list[Any]]) -> None:
    metrics = {
        record.metric.name or record.metric.glob_name: record.metric
        for record in run[1]
        if record.WhichOneof("record_type") == "metric"
    }
    assert metrics["val/error"].step_metric == "trainer/global_step"
    assert metrics["val/error"].summary.min
    assert metrics["compression/val/error"].step_metric == "compression/bytes"
    assert metrics["compression/bytes"].step_metric == "trainer/global_step"


@group
@has_wandb
def test_curves_are_error_over_steps_and_against_bytes(run: tuple[Path, list[Any]]) -> None:
    rows = [
        items(record.history.item)
        for record in run[1]
        if record.WhichOneof("record_type") == "history"
    ]
    steps = [row["trainer/global_step"] for row in rows if "val/error" in row]
    assert len(steps) == EPOCHS
    assert steps == sorted(steps)
    pairs = [
        (row["compression/bytes"], row["compression/val/error"])
        for row in rows
        if "compression/val/error" in row
    ]
    assert len(pairs) == EPOCHS
    assert pairs[-1][0] < pairs[0][0] / 10
    sparsity = [
        row["compression/sparsity/net.fc1.weight"] for row in rows if "compression/ratio" in row
    ]
    assert sparsity[-1] > 0.9


@group
@has_wandb
def test_the_table_and_the_file_are_there(run: tuple[Path, list[Any]]) -> None:
    folder, found = run
    result = json.loads((folder / "result.json").read_text())
    (path,) = folder.glob("wandb/offline-run-*/files/media/table/layers_*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"][:3] == ["layer", "weights", "kept"]
    assert {row[0] for row in table["data"]} == result["layers"].keys()
    artifacts = [
        record.request.log_artifact.artifact
        if record.WhichOneof("record_type") == "request"
        else record.artifact
        for record in found
        if record.WhichOneof("record_type") == "artifact"
        or record.request.WhichOneof("request_type") == "log_artifact"
    ]
    (model,) = (artifact for artifact in artifacts if artifact.type == "model")
    assert json.loads(model.metadata)["bytes"] == result["bytes"]
    (entry,) = model.manifest.contents
    assert entry.path == "model.fitsmall"
    assert entry.size == (folder / "model.fitsmall").stat().st_size
    summary: dict[str, Any] = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            summary |= items(record.summary.update)
    text = json.dumps(summary)
    assert str(result["bytes"]) in text


@group
@has_wandb
def test_the_saved_view_draws_what_the_run_declares(run: tuple[Path, list[Any]]) -> None:
    from fitsmall.experiments.study.workspace import build_workspace

    folder, found = run
    view = build_workspace(folder.parent, entity="someone")._to_model()
    assert (view.entity, view.project) == ("someone", "fitsmall")
    assert view.display_name == "Compression: curves"
    spec = json.loads(view.spec.model_dump_json(by_alias=True))
    sections = spec["section"]["panelBankConfig"]["sections"]
    panels = {panel["config"]["chartTitle"]: panel for s in sections for panel in s["panels"]}
    scatter = panels["Tested error against bytes of the file"]["config"]
    assert (scatter["xAxis"], scatter["yAxis"]) == ("summary:result/bytes", "summary:result/error")
    assert scatter["xAxisLogScale"]
    logged = {
        key
        for record in found
        if record.WhichOneof("record_type") == "history"
        for key in items(record.history.item)
    }
    lines = [
        panel["config"] for panel in panels.values() if panel["viewType"] == "Run History Line Plot"
    ]
    assert len(lines) == 8
    for line in lines:
        assert line["xAxis"] in logged
        regex = line.get("metricRegex")
        assert regex or {*line["metrics"]} <= logged
    (runs,) = spec["section"]["runSets"]
    (kept,) = runs["filters"]["filters"]
    assert kept["key"] == {"section": "run", "name": "group"}
    assert (kept["op"], kept["value"]) == ("=", "curves")


@group
@has_wandb
def test_the_view_of_a_run_has_no_other(run: tuple[Path, list[Any]], tmp_path: Path) -> None:
    from fitsmall.experiments.study.workspace import build_workspace

    folder, _ = run
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"group": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    spec = json.loads(
        build_workspace(tmp_path, "me")._to_model().spec.model_dump_json(by_alias=True)
    )
    (kept,) = spec["section"]["runSets"][0]["filters"]["filters"]
    assert kept["key"] == {"section": "run", "name": "name"}
    assert (kept["op"], kept["value"]) == ("=", config["logger"]["wandb"]["id"])


@has_wandb
def test_a_view_of_runs_that_were_not_sent_names_the_remedy(tmp_path: Path) -> None:
    done = Command("dashboard", str(tmp_path), "--entity", "me").end()
    assert done.returncode == 2
    assert "has no run that was sent to W&B: train with 'logger=[csv,wandb]'" in done.stderr
