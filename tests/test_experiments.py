"""The command line, the configurations, and what a run leaves behind, on real digits."""

import gzip
import hashlib
import inspect
import json
import os
import struct
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from lightning.pytorch import Callback
from omegaconf import DictConfig
from safetensors.torch import load_file

import pressfit.configs
from pressfit.callbacks import Method, Plan
from pressfit.compressors import load, same_bits
from pressfit.experiments import data
from pressfit.experiments.cli import main
from pressfit.experiments.data import Augment, Batches, Digits, Mnist, Split
from pressfit.experiments.figures import curve
from pressfit.experiments.models import LeNet5, LeNet300
from pressfit.experiments.summary import summarize

CONFIGS = Path(pressfit.configs.__file__).parent
QUICK = ["trainer.max_epochs=12", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]


def pressfit_(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from pressfit.experiments.cli import main; main()", *words]
    environment = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a short run, from the command line."""
    folder = tmp_path_factory.mktemp("sweep")
    run = pressfit_(
        "train",
        "-m",
        "experiment=deep_compression",
        "seed=0,1",
        f"hydra.sweep.dir={folder}",
        *QUICK,
    )
    assert run.returncode == 0, run.stderr
    (folder / "stdout").write_text(run.stdout)
    return folder


def test_a_run_leaves_everything_behind(sweep: Path) -> None:
    folder = sweep / "0"
    result = json.loads((folder / "result.json").read_text())
    assert 0 < result["error_dense"] < result["error"] < 0.5
    assert result["bytes"] == (folder / "model.pressfit").stat().st_size
    assert result["ratio"] == pytest.approx(result["bytes_dense"] / result["bytes"])
    assert result["seed"] == 0
    assert result["seconds"] > 0
    layers = result["layers"]
    assert layers["net.fc1.weight"]["weights"] == 64 * 300
    assert sum(layer["bytes"] for layer in layers.values()) + result["overhead"] == result["bytes"]
    assert sum(layer["bytes_dense"] for layer in layers.values()) == result["bytes_dense"]
    for layer in layers.values():
        assert layer.keys() >= {"weights", "kept", "value_bits", "position_bits"}
    assert (folder / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["seed"] == config["seed"] == 0
    sizes = [size for size, _ in curve(folder / "metrics.csv")]
    assert len(sizes) == 12
    assert sizes[-1] == pytest.approx(result["bytes"], rel=0.01)


def test_a_run_is_reproducible_from_its_overrides(sweep: Path, tmp_path: Path) -> None:
    first = json.loads((sweep / "1" / "result.json").read_text())
    again = pressfit_("train", *first["overrides"], "reference=false", f"hydra.run.dir={tmp_path}")
    assert again.returncode == 0, again.stderr
    ours, theirs = load(tmp_path / "model.pressfit"), load(sweep / "1" / "model.pressfit")
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "result.json").read_text())["error"] == first["error"]


def test_a_sweep_ends_in_mean_and_spread(sweep: Path) -> None:
    (group,) = json.loads((sweep / "summary.json").read_text())
    runs = [json.loads((sweep / str(i) / "result.json").read_text()) for i in range(2)]
    assert group["seeds"] == [0, 1]
    assert "seed=0" not in group["overrides"]
    for measure in ("error", "error_dense", "bytes", "ratio", "seconds"):
        a, b = (run[measure] for run in runs)
        assert group[measure]["mean"] == pytest.approx((a + b) / 2)
        assert group[measure]["std"] == pytest.approx(abs(a - b) / 2**0.5)
    assert "±" in (sweep / "stdout").read_text()


def test_summaries_group_by_everything_but_the_seed(tmp_path: Path) -> None:
    for number, (seed, clusters, error) in enumerate([(0, 4, 0.1), (1, 4, 0.3), (0, 8, 0.5)]):
        (tmp_path / str(number)).mkdir()
        result: dict[str, Any] = {"seed": seed, "error": error, "error_dense": None}
        result |= {"bytes": 10, "ratio": 1.0, "seconds": 2.0}
        result["overrides"] = [f"clusters={clusters}", f"seed={seed}"]
        (tmp_path / str(number) / "result.json").write_text(json.dumps(result))
    first, second = summarize(tmp_path)
    assert first["overrides"] == ["clusters=4"]
    assert first["error"] == {"mean": pytest.approx(0.2), "std": pytest.approx(0.02**0.5)}
    assert first["error_dense"] is None
    assert second["error"] == {"mean": 0.5, "std": 0.0}


def test_inspect_and_decompress(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep / "0" / "model.pressfit"
    main(["inspect", str(file)])
    table = capsys.readouterr().out
    for part in ("net.fc1.weight", "position bits", "P+Q+context", f"{file.stat().st_size:,}"):
        assert part in table
    output = tmp_path / "weights.safetensors"
    main(["decompress", str(file), "-o", str(output)])
    assert str(output) in capsys.readouterr().out
    weights = load_file(output)
    assert all(same_bits(weights[name], tensor) for name, tensor in load(file).items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "nowhere.pressfit"], "nowhere.pressfit"),
        (["inspect", __file__], "is not a pressfit file"),
        (["train", "data=mnistt"], "data/mnistt"),
        (["train", "callbacks.prune.sparsity=95", *QUICK], "a fraction in [0, 1], got 95"),
        (["train", "callbacks=[share,prune]", *QUICK], "list GradualPruning first"),
        (["train", "callbacks@observers=[monitor]", *QUICK], "none writes the file"),
        (["train", "trainer.max_epoch=3"], "max_epoch"),
        (["train", "model=lenet5", *QUICK], "choose data=mnist"),
    ],
)
def test_mistakes_get_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    directory = [f"hydra.run.dir={tmp_path}"] if words[0] == "train" else []
    run = pressfit_(*words, *directory)
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_help_helps() -> None:
    top = pressfit_("--help")
    assert all(word in top.stdout for word in ("train", "inspect", "decompress"))
    below = pressfit_("train", "--help")
    for part in (
        "experiment=deep_compression",
        "callbacks: checkpoint, ema, guard, monitor",
        "data: digits, mnist",
    ):
        assert part in below.stdout
    assert top.returncode == below.returncode == 0


def test_a_users_own_configuration_and_module(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "from pressfit.experiments.classifier import Classifier\n"
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
    run = pressfit_(*words, f"hydra.run.dir={tmp_path / 'run'}", PYTHONPATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["layers"]["net.1.weight"]["weights"] == 25 * 64


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("pressfit.configs", version_base="1.3"):
        words = [*overrides, "hydra.runtime.output_dir=out"]
        config = compose("train", words, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return config


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


EXPERIMENTS = [[], *([f"experiment={name}"] for name in names("experiment"))]
MODELS = [name for name in names("model") if name != "classifier"]


@pytest.mark.parametrize(
    ("experiment", "model", "ablation"),
    [
        *product(EXPERIMENTS, MODELS, ["nothing"]),
        *product([["experiment=deep_compression"]], ["lenet300"], names("ablation")),
    ],
)
def test_every_experiment_composes_and_builds(
    experiment: list[str], model: str, ablation: str
) -> None:
    images = "digits" if model == "mlp" else "mnist"
    config = composed(*experiment, f"model={model}", f"data={images}", f"ablation={ablation}")
    module = instantiate(config.model, _convert_="all")
    callbacks = [
        instantiate(node, _convert_="all")
        for node in [*config.callbacks.values(), *config.observers.values()]
        if "_target_" in node
    ]
    assert all(isinstance(callback, Callback) for callback in callbacks)
    methods = [callback for callback in callbacks if isinstance(callback, Method)]
    assert "steps" in str(Plan(methods, module, horizon=1000))
    instantiate(config.data, _convert_="all")
    instantiate(config.trainer, callbacks=callbacks, logger=False, default_root_dir=".")


@pytest.mark.parametrize("group", ["callbacks", "data", "logger", "trainer"])
def test_every_option_is_one_of_its_class(group: str) -> None:
    for name in names(group):
        node = yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text())
        node = node.get("data", node) if group == "data" else node
        node = node if "_target_" in node else next(iter(node.values()))
        if node["_target_"] == "lightning.pytorch.loggers.WandbLogger":
            continue  # an extra
        target = get_object(node.pop("_target_"))
        known = inspect.signature(target).parameters
        unknown = node.keys() - known.keys()
        assert not unknown or any(p.kind is p.VAR_KEYWORD for p in known.values()), (name, unknown)


def test_the_papers_networks_have_the_papers_sizes() -> None:
    assert sum(p.numel() for p in LeNet300().parameters()) == 266_610
    assert sum(p.numel() for p in LeNet5().parameters()) == 431_080
    images = torch.rand(3, 1, 28, 28)
    assert LeNet300()(images).shape == LeNet5()(images).shape == (3, 10)


def test_digits_are_split_without_overlap() -> None:
    digits = Digits(batch_size=64, held_out=270)
    digits.setup("fit")
    parts = [digits.train_dataloader(), digits.val_dataloader(), digits.test_dataloader()]
    assert [len(part.split.labels) for part in parts] == [1167, 270, 360]
    seen = [
        {hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in part.split.images}
        for part in parts
    ]
    # A few of the 1,797 images are equal pixel for pixel.
    assert len(seen[0] | seen[1] | seen[2]) > 1780
    assert torch.equal(Digits.load()[1].labels, Digits.load()[1].labels)


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    split = Split(torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1), torch.arange(20))

    def labels(seed: int, epoch: int) -> list[list[int]]:
        return [batch.tolist() for _, batch in Batches(split, 6, seed, lambda: epoch)]

    assert labels(0, 3) == labels(0, 3)
    assert labels(0, 3) != labels(0, 4)
    assert labels(0, 3) != labels(1, 3)
    assert [len(batch) for batch in labels(0, 3)] == [6, 6, 6]
    images, order = next(iter(Batches(split, 20, 0)))
    assert torch.equal(images.flatten() * 255, order.float())


def test_augmentation_moves_an_image_by_whole_pixels() -> None:
    class OnePixel(Augment):
        def __call__(self, images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
            torch.rand = lambda count, generator: torch.ones(count)  # type: ignore[assignment]
            try:
                return super().__call__(images, random)
            finally:
                torch.rand = original  # type: ignore[assignment]

    original = torch.rand
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 4, 4] = 1.0
    moved = OnePixel(shift=1.0)(image, torch.Generator())
    assert moved[0, 0, 3, 3] == pytest.approx(1.0, abs=1e-5)
    assert moved.sum() == pytest.approx(1.0, abs=1e-4)


def test_augmentation_ends_before_the_training_does() -> None:
    split = Split(torch.full((4, 1, 8, 8), 200, dtype=torch.uint8), torch.arange(4))

    def images(epoch: int) -> torch.Tensor:
        batches = Batches(split, 4, 0, lambda: epoch, Augment(shift=3.0), until=2)
        return next(iter(batches))[0]

    assert not torch.equal(images(1), images(2))
    assert torch.equal(images(2), torch.full((4, 1, 8, 8), 200 / 255))


def idx(array: torch.Tensor) -> bytes:
    head = struct.pack(">HBB", 0, 8, array.dim())
    return head + struct.pack(f">{array.dim()}i", *array.shape) + array.numpy().tobytes()


def test_mnist_is_read_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(2 * 3 * 3, dtype=torch.uint8).view(2, 3, 3)
    labels = torch.tensor([7, 1], dtype=torch.uint8)
    (tmp_path / "mnist").mkdir()
    digests = {}
    for name in data._MNIST:
        content = idx(images if "images" in name else labels)
        digests[name] = hashlib.md5(content).hexdigest()
        (tmp_path / "mnist" / name).write_bytes(gzip.compress(content))
    monkeypatch.setenv("PRESSFIT_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="is not the original MNIST file"):
        Mnist.load()
    monkeypatch.setattr(data, "_MNIST", digests)
    train, test = Mnist.load()
    assert torch.equal(train.images[:, 0], images)
    assert test.labels.tolist() == [7, 1]


def test_mnist_that_cannot_be_had_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise OSError("no network")

    monkeypatch.setenv("PRESSFIT_DATA", str(tmp_path))
    monkeypatch.setattr(data, "_beside", list)
    monkeypatch.setattr(data.pooch, "retrieve", refuse)
    with pytest.raises(OSError, match=r"no network.*name its parent in PRESSFIT_DATA"):
        Mnist.load()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def test_mnist_is_downloaded_once_and_damage_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, cache = tmp_path / "served", tmp_path / "cache"
    served.mkdir()
    digests = {}
    for name in data._MNIST:
        content = idx(torch.zeros(2, 3, 3, dtype=torch.uint8))
        digests[name] = hashlib.md5(content).hexdigest()
        (served / name).write_bytes(gzip.compress(content)[:-9])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served)))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("PRESSFIT_DATA", raising=False)
    monkeypatch.setattr(data, "_beside", list)
    monkeypatch.setattr(data, "_MNIST", digests)
    monkeypatch.setattr(data, "_MIRRORS", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(data.pooch, "os_cache", lambda _: cache)
    with pytest.raises(OSError, match="is damaged"):
        Mnist.load()
    for path in served.iterdir():
        path.write_bytes(gzip.compress(idx(torch.zeros(2, 3, 3, dtype=torch.uint8))))
    assert Mnist.load()[0].images.shape == (2, 1, 3, 3)
    server.shutdown()
    assert Mnist.load()[1].images.shape == (2, 1, 3, 3)  # from the cache


@pytest.mark.slow
def test_the_recipe_reaches_its_bar_on_mnist(tmp_path: Path) -> None:
    """Deep Compression needs 27 KB for 1.58 %; chosen and measured on held-out images."""
    try:
        Mnist.load()
    except OSError as error:
        pytest.skip(str(error))
    words = ["experiment=deep_compression", "data=mnist", "model=lenet300", "reference=false"]
    run = pressfit_("train", *words, "evaluate_on=val", f"hydra.run.dir={tmp_path}")
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["bytes"] < 5000
    assert result["error"] < 0.0158
