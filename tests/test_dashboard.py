"""What W&B is told, read back from the file that it writes offline."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

wandb_proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")


pytestmark = pytest.mark.xdist_group("dashboard")


def records(path: Path) -> Iterator[Any]:
    """The records of a run's file, which is a log of LevelDB's: blocks of 32 KiB, in which every
    part of a record has a checksum, a length and a kind (whole, first, middle, last)."""
    data, block, record = path.read_bytes(), 32_768, b""
    place = 7  # behind the file's own header
    while place + 7 <= len(data):
        left = block - place % block
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield wandb_proto.Record.FromString(record)
            record = b""


def items(updates: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in updates}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A sweep of one run, offline."""
    folder = tmp_path_factory.mktemp("wandb")
    command = [str(Path(sys.executable).with_name("fitsmall")), "train", "-m"]
    command += ["experiment=deep_compression", "logger=[csv,wandb]", "trainer.max_epochs=6"]
    command += ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "reference=false"]
    command += ["hydra.sweep.dir=curves", "seed=3"]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("curves/0/wandb/offline-run-*/*.wandb")
    return folder / "curves" / "0", list(records(file))


def test_the_run_belongs_to_its_sweep(run: tuple[Path, list[Any]]) -> None:
    (started,) = {
        (record.run.run_group, record.run.project)
        for record in run[1]
        if record.WhichOneof("record_type") == "run"
    }
    assert started == ("curves", "fitsmall")


def test_the_configuration_is_complete(run: tuple[Path, list[Any]]) -> None:
    folder, found = run
    config: dict[str, Any] = {}
    for record in found:
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            config |= items((record.run.config if kind == "run" else record.config).update)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert {key: config.get(key) for key in saved} == saved


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


def test_curves_are_error_over_steps_and_against_bytes(run: tuple[Path, list[Any]]) -> None:
    rows = [
        items(record.history.item)
        for record in run[1]
        if record.WhichOneof("record_type") == "history"
    ]
    steps = [row["trainer/global_step"] for row in rows if "val/error" in row]
    assert len(steps) == 6
    assert steps == sorted(steps)
    pairs = [
        (row["compression/bytes"], row["compression/val/error"])
        for row in rows
        if "compression/val/error" in row
    ]
    assert len(pairs) == 6
    assert pairs[-1][0] < pairs[0][0] / 10
    sparsity = [
        row["compression/sparsity/net.fc1.weight"] for row in rows if "compression/ratio" in row
    ]
    assert sparsity[-1] > 0.9


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


def test_a_view_of_runs_that_were_not_sent_names_the_remedy(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("fitsmall")), "dashboard", str(tmp_path)]
    done = subprocess.run([*command, "--entity", "me"], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "has no run that was sent to W&B: train with 'logger=[csv,wandb]'" in done.stderr
