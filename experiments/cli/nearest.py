"""What a mistyped word of ``fitsmall train`` may have meant."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = ["nearest"]

_KEY = re.compile(r"Could not override '([^']+)'")
_OPTION = re.compile(r"Could not (?:find|load) '([^']+)/([^'/]+)'")


def nearest(message: str, words: list[str]) -> str:
    """The end of Hydra's message on an unknown key or option: the nearest one that exists.

    Args:
        message: What Hydra says.
        words: Overrides of the command line.

    Example:
        >>> nearest("Could not override 'trainer.max_epoch'.", ["trainer.max_epoch=3"])
        ': did you mean trainer.max_epochs?'
        >>> nearest("Could not load 'callbacks/prun'.", ["callbacks=[prun]"])
        ': did you mean callbacks=[prune]? There are checkpoint, ema, guard, learn, monitor, ...'
    """
    if match := _OPTION.search(message):
        group, name = match.groups()
        options = _options(group)
        close = get_close_matches(name, options, 1, 0.5)
        meant = [f"[{o}]" if group in ("callbacks", "logger") else o for o in close]
        question = f": did you mean {group}={meant[0]}? There are " if meant else ": there are "
        return question + ", ".join(options)
    if match := _KEY.search(message):
        key = match.group(1)
        config = _composed([word for word in words if key not in word])
        keys = list(_keys(OmegaConf.to_container(config)))
        group, _, rest_of_key = key.partition(".")
        method = rest_of_key.partition(".")[0]
        if f"{group}.{method}" not in keys and method in _options(group):
            return f": it is a setting of {group}=[{method}], which is not chosen"
        if key in keys:
            known = [k for k in keys if k.rpartition(".")[0] == key]
            return f": there are {', '.join(known)}; others are added by ++{key}.NAME=VALUE"
        siblings = [k for k in keys if k.rpartition(".")[0] == key.rpartition(".")[0]]
        close = get_close_matches(key, siblings, 1, 0.6) or get_close_matches(key, keys, 1, 0.6)
        if close:
            return f": did you mean {close[0]}?"
        return f": there are {', '.join(siblings)}" if siblings else ""
    return ""


def _options(group: str) -> list[str]:
    folder = files("fitsmall.configs").joinpath(*group.split("/"))
    if not folder.is_dir():
        return []
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


def _composed(words: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    words = [word for word in words if "=" in word and not word.startswith(("-", "hydra"))]
    with initialize_config_module("fitsmall.configs", version_base="1.3"):
        try:
            return compose("train", words)
        except (HydraException, OmegaConfBaseException):  # another mistake, or a sweep
            return compose("train")


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")
