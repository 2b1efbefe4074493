"""Suggestions for a mistyped word of ``fitsmall train``."""

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

__all__ = ["suggest"]

_UNKNOWN_KEY = re.compile(r"Could not override '([^']+)'")
_UNKNOWN_OPTION = re.compile(r"Could not (?:find|load) '([^']+)/([^'/]+)'")


def suggest(message: str, overrides: list[str]) -> str:
    """Complete Hydra's message about an unknown key or option with the nearest known one.

    Args:
        message: Hydra's message.
        overrides: Words of the command line.

    Returns:
        Text to put after the message; empty if it is about something else.

    Example:
        >>> suggest("Could not override 'trainer.max_epoch'.", ["trainer.max_epoch=3"])
        ': did you mean trainer.max_epochs?'
        >>> suggest("Could not load 'callbacks/prun'.", ["callbacks=[prun]"])
        ': did you mean callbacks=[prune]? There are channels, checkpoint, compress, ema, ...'
    """
    if match := _UNKNOWN_OPTION.search(message):
        return _suggest_option(*match.groups())
    if match := _UNKNOWN_KEY.search(message):
        return _suggest_key(match[1], overrides)
    return ""


def _suggest_option(group: str, name: str) -> str:
    options = _options(group)
    close = get_close_matches(name, options, 1, 0.5)
    words = [f"[{o}]" if group in ("callbacks", "logger") else o for o in close]
    start = f": did you mean {group}={words[0]}? There are " if words else ": there are "
    return start + ", ".join(options)


def _suggest_key(key: str, overrides: list[str]) -> str:
    config = _compose([word for word in overrides if key not in word])
    keys = list(_keys(OmegaConf.to_container(config)))
    group, _, rest = key.partition(".")
    method = rest.partition(".")[0]
    if f"{group}.{method}" not in keys and method in _options(group):
        return f": it is a setting of {group}=[{method}], which is not chosen"
    if key in keys:
        known = [k for k in keys if k.rpartition(".")[0] == key]
        return f": there are {', '.join(known)}; add others by ++{key}.NAME=VALUE"
    siblings = [k for k in keys if k.rpartition(".")[0] == key.rpartition(".")[0]]
    close = get_close_matches(key, siblings, 1, 0.6) or get_close_matches(key, keys, 1, 0.6)
    if close:
        return f": did you mean {close[0]}?"
    return f": there are {', '.join(siblings)}" if siblings else ""


def _options(group: str) -> list[str]:
    folder = files("fitsmall.configs").joinpath(*group.split("/"))
    if not folder.is_dir():
        return []
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


def _compose(overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    words = [word for word in overrides if "=" in word and not word.startswith(("-", "hydra"))]
    with initialize_config_module("fitsmall.configs", version_base="1.3"):
        try:
            return compose("train", words)
        except (HydraException, OmegaConfBaseException):  # a second mistake, or a sweep
            return compose("train")


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")
