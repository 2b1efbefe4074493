"""Every configuration composes, and every object that it describes can be built."""

import inspect
from itertools import product
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from lightning.pytorch import Callback
from omegaconf import DictConfig

import fitsmall.configs
from fitsmall.compressors.training import Plan, Stage

CONFIGS = Path(fitsmall.configs.__file__).parent


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("fitsmall.configs", version_base="1.3"):
        words = [*overrides, "hydra.runtime.output_dir=out"]
        config = compose("train", words, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return config


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


EXPERIMENTS = [[], *([f"experiment={name}"] for name in names("experiment"))]
DATA = {
    "mlp": "digits",
    "cnn": "digits",
    "lenet300": "mnist",
    "lenet5": "mnist",
    "transformer": "stdlib",
}
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
    data = DATA.get(model, "cifar10")
    config = composed(*experiment, f"model={model}", f"data={data}", f"ablation={ablation}")
    module = instantiate(config.model, _convert_="all")
    callbacks = [
        instantiate(node, _convert_="all")
        for node in [*config.get("callbacks", {}).values(), *config.observers.values()]
        if "_target_" in node
    ]
    assert all(isinstance(callback, Callback) for callback in callbacks)
    methods = [callback for callback in callbacks if isinstance(callback, Stage)]
    if methods:
        assert "steps" in str(Plan(methods, module, horizon=1000))
    instantiate(config.data, _convert_="all")
    instantiate(config.trainer, callbacks=callbacks, logger=False, default_root_dir=".")


@pytest.mark.parametrize("compression", names("compression"))
def test_every_compression_composes_and_plans(compression: str) -> None:
    config = composed("experiment=train_big_then_compress", f"compression={compression}")
    assert (compression == "none") == (config.compression == "none")
    methods = [instantiate(n, _convert_="all") for n in (config.get("callbacks") or {}).values()]
    if methods:
        module = instantiate(config.model, _convert_="all")
        assert "steps" in str(Plan(methods, module, horizon=config.budget.calibration))


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
