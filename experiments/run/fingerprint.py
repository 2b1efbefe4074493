"""What a run is, by everything that decides what comes out of it, and whether it has come out."""

import copy
import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

__all__ = ["digest", "fingerprint", "finished", "record", "write"]

# Where a run writes, and what it shows while it trains.
_ASIDE = {"hydra", "folder", "cache", "group", "logger"}
_ASIDE_OF = {
    "observers": {"note", "resume"},
    "trainer": {
        "default_root_dir",
        "enable_progress_bar",
        "enable_model_summary",
        "log_every_n_steps",
    },
}


def fingerprint(config: DictConfig) -> str:
    """Twelve hexadecimal digits that are equal for two runs if, and nearly only if, their resolved
    configurations are, apart from where they write and log.

    Example:
        >>> a = OmegaConf.create({"seed": 0, "folder": "here", "trainer": {"max_epochs": 3}})
        >>> b = OmegaConf.create({"seed": 0, "folder": "there", "trainer": {"max_epochs": 3}})
        >>> fingerprint(a) == fingerprint(b) != fingerprint(OmegaConf.create({"seed": 1}))
        True
    """
    config = copy.deepcopy(config)
    OmegaConf.set_struct(config, False)
    for name in _ASIDE & config.keys():
        config[name] = None
    for group, names in _ASIDE_OF.items():
        for name in names & (config.get(group) or {}).keys():
            config[group][name] = None
    known = {str(name): _plain(config, name) for name in config if name not in _ASIDE}
    # Settings of methods that are not in use decide nothing.
    methods = known.get("callbacks") or {}
    known["callbacks"] = {name: node for name, node in methods.items() if "_target_" in node}
    if not known["callbacks"]:
        known.pop("fine_tune", None)
    text = json.dumps([version("fitsmall"), known], sort_keys=True, default=str)
    return digest(text)


def finished(config: DictConfig) -> dict[str, Any] | None:
    """What ``result.json`` says, if a run of this very configuration has ended in its folder."""
    path = Path(config.folder) / "result.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result.get("fingerprint") == fingerprint(config) else None


def record(path: Path, value: Any) -> None:
    """Write a value as JSON, as a whole or not at all."""
    write(path, json.dumps(value, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Write a text as a whole or not at all: who reads it, or kills this process, does not wait."""
    scratch = path.with_suffix(f".{os.getpid()}.new")
    scratch.write_text(text)
    scratch.replace(path)


def digest(text: object) -> str:
    """Twelve hexadecimal digits of the SHA-256 of a text.

    Example:
        >>> digest("runs/first")
        '4a80f22e3d63'
    """
    return hashlib.sha256(str(text).encode()).hexdigest()[:12]


def _plain(config: DictConfig, name: Any) -> Any:
    node = config._get_node(name)
    if not isinstance(node, DictConfig | ListConfig):
        return config[name]
    try:
        return OmegaConf.to_container(node, resolve=True)
    except InterpolationResolutionError:  # of Hydra's own values, which only a running job has
        return OmegaConf.to_container(node, resolve=False)
