"""The curves of every logger are those of metrics.csv."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.xdist_group("dashboard")

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
    """A run that all loggers hear of."""
    loggers = ["csv", *filter(find_spec, ("tensorboard", "mlflow"))]
    folder = tmp_path_factory.mktemp("loggers")
    command = [str(Path(sys.executable).with_name("fitsmall")), "train"]
    command += [f"logger=[{','.join(loggers)}]", "trainer.max_epochs=4", "group=curves"]
    command += ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "reference=false"]
    command += ["hydra.run.dir=runs/first"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Curve]:
    rows = list(csv.DictReader((folder / "runs" / "first" / "metrics.csv").open()))
    curves = {
        name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in NAMES
    }
    assert [len(curve) for curve in curves.values()] == [4, 4, 4, 4, 1]
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


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="no tensorboard")
def test_tensorboard_has_the_curves(folder: Path, expected: dict[str, Curve]) -> None:
    command = [sys.executable, "-c", READER, str(folder / "runs" / "first"), *NAMES]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert same({name: [(step, value) for step, value in found[name]] for name in NAMES}, expected)


def test_mlflow_has_the_curves_and_the_configuration(
    folder: Path, expected: dict[str, Curve]
) -> None:
    MlflowClient = pytest.importorskip("mlflow").MlflowClient  # noqa: N806

    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fitsmall")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert Path(run.info.run_name).name == "first"
    assert run.data.tags["group"] == "curves"
    saved: dict[str, Any] = yaml.safe_load((folder / "runs" / "first" / "config.yaml").read_text())
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
