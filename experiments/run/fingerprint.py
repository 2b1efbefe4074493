"""The identity of a run: a hash of all settings that decide its result."""

import copy
import hashlib
import json
from importlib.metadata import version
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

__all__ = ["digest", "fingerprint"]

# Settings of where a run writes and of what it prints: they do not change its result.
_IGNORED = {"hydra", "folder", "cache", "group", "logger"}
_IGNORED_IN_GROUP = {
    "observers": {"note", "resume"},
    "trainer": {
        "default_root_dir",
        "enable_progress_bar",
        "enable_model_summary",
        "log_every_n_steps",
    },
}


def fingerprint(config: DictConfig) -> str:
    """Hash of a configuration, without the settings that only choose where a run writes and logs.

    Two runs with the same fingerprint give the same result, so the second one need not be made.

    Returns:
        Twelve hexadecimal digits.

    Example:
        >>> a = OmegaConf.create({"seed": 0, "folder": "here", "trainer": {"max_epochs": 3}})
        >>> b = OmegaConf.create({"seed": 0, "folder": "there", "trainer": {"max_epochs": 3}})
        >>> fingerprint(a) == fingerprint(b) != fingerprint(OmegaConf.create({"seed": 1}))
        True
    """
    config = copy.deepcopy(config)
    OmegaConf.set_struct(config, False)
    for name in _IGNORED & config.keys():
        config[name] = None
    for group, names in _IGNORED_IN_GROUP.items():
        for name in names & (config.get(group) or {}).keys():
            config[group][name] = None
    settings = {str(name): _resolve(config, name) for name in config if name not in _IGNORED}
    # Settings of a method that is not in use have no effect.
    methods = settings.get("callbacks") or {}
    settings["callbacks"] = {name: node for name, node in methods.items() if "_target_" in node}
    if not settings["callbacks"]:
        settings.pop("fine_tune", None)
    return digest(json.dumps([version("fitsmall"), settings], sort_keys=True, default=str))


def digest(text: object) -> str:
    """The first twelve hexadecimal digits of the SHA-256 of a text.

    Example:
        >>> digest("runs/first")
        '4a80f22e3d63'
    """
    return hashlib.sha256(str(text).encode()).hexdigest()[:12]


def _resolve(config: DictConfig, name: Any) -> Any:
    node = config._get_node(name)
    if not isinstance(node, DictConfig | ListConfig):
        return config[name]
    try:
        return OmegaConf.to_container(node, resolve=True)
    except InterpolationResolutionError:  # a value of Hydra's that only a running job has
        return OmegaConf.to_container(node, resolve=False)
