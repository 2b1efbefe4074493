"""The commands ``fitsmall compress`` and ``fitsmall suggest``: words of Hydra for a checkpoint."""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["HELP", "SUGGEST_HELP", "folder_of", "missed", "suggest_words", "training_words"]

# Settings of Compress, which need no prefix.
_SETTINGS = (
    *("size", "flops", "latency", "engine", "max_drop", "monitor", "mode", "dense"),
    *("methods", "start", "stop", "exclude"),
)
# Words of Hydra after which there is no single run to look at.
_FLAGS = (
    "-m",
    "--multirun",
    "-c",
    "--cfg",
    "-p",
    "--package",
    "--info",
    "--hydra-help",
    "--resolve",
)

HELP = """usage: fitsmall compress CHECKPOINT TARGET ... [SETTING ...]

Fine-tune a trained network until it meets a target, and write the compressed file.

CHECKPOINT is a checkpoint of Lightning or a state dict (.ckpt, .pt), safetensors, or a
.fitsmall file.

Targets
  size=1/20           the file is at most a twentieth of the dense bytes; or size='40 KB'
  max_drop=0.005      the smallest file that loses at most half a point of monitor=val/error
  flops=0.5           half of the multiply-adds
  latency=0.5         half of the time of a forward pass, in engine=openvino

methods=[quantize] leaves out zeros; methods=[ranks] lowers multiply-adds by ranks, not channels.

Settings are those of `fitsmall train`: which network and data, the learning rate, the epochs.

Examples
  fitsmall compress model.ckpt --config-dir configs experiment=mine size=1/20
  fitsmall compress dense.fitsmall data=mnist model=lenet300 max_drop=0.002 trainer.max_epochs=9

The exit status is 1 if a target was missed."""


SUGGEST_HELP = """usage: fitsmall suggest CHECKPOINT [SETTING ...]

Show what a trained network loses at several sizes, and which of its layers are sensitive. Nothing
is trained. A picture and a CSV are in the folder that the last line names.

CHECKPOINT is a checkpoint of Lightning or a state dict (.ckpt, .pt), safetensors, or a
.fitsmall file. Settings are those of `fitsmall train`: which network and data.

Example
  fitsmall suggest dense.fitsmall data=mnist model=lenet300"""


def training_words(words: Sequence[str]) -> list[str]:
    """Return the words of ``fitsmall train`` that compress a checkpoint.

    Args:
        words: The checkpoint, targets, and settings of ``fitsmall train``.

    Raises:
        ValueError: The first word is no checkpoint, or there is no target.

    Example:
        >>> training_words(["a.ckpt", "size=1/20", "hydra.run.dir=b"])[3:]
        ["callbacks.compress.size='1/20'", 'hydra.run.dir=b']
    """
    checkpoint, others = _checkpoint("compress", words, " size=1/20")
    named = {name: word for word in others if (name := word.partition("=")[0]) in _SETTINGS}
    if not {"size", "flops", "latency", "max_drop"} & named.keys():
        raise ValueError(
            "fitsmall compress has no target: name one, such as size=1/20 or max_drop=0.005"
        )
    mapped = [_setting(word) if word in named.values() else word for word in others]
    chosen = ["callbacks=[compress]", "reference=false"]
    return [checkpoint, *chosen, *_folder("compress", mapped)]


def suggest_words(words: Sequence[str]) -> list[str]:
    """Return the words of Hydra that look at a checkpoint.

    Args:
        words: The checkpoint, and settings of ``fitsmall train``.

    Raises:
        ValueError: The first word is no checkpoint.

    Example:
        >>> suggest_words(["a.ckpt", "hydra.run.dir=b"])[1:]
        ['callbacks=[]', 'hydra.run.dir=b']
    """
    checkpoint, others = _checkpoint("suggest", words)
    return [checkpoint, "callbacks=[]", *_folder("suggest", others)]


def folder_of(overrides: Sequence[str]) -> Path:
    """Return the folder of the run that these words train."""
    word = next(word for word in overrides if word.startswith("hydra.run.dir="))
    return Path(word.partition("=")[2].strip("'\""))


def missed(folder: Path) -> bool:
    """Return whether a finished run missed a target."""
    result = json.loads((folder / "result.json").read_text())
    return not result["targets_met"]


def _checkpoint(command: str, words: Sequence[str], more: str = "") -> tuple[str, list[str]]:
    """Return the setting that loads a checkpoint, and the words after it."""
    checkpoint, *others = words
    if "=" in checkpoint or checkpoint.startswith("-"):
        raise ValueError(
            f"fitsmall {command} takes a checkpoint first, as in fitsmall {command} model.ckpt"
            f"{more}, and got {checkpoint}"
        )
    if flags := [word for word in others if word.partition("=")[0] in _FLAGS]:
        raise ValueError(
            f"fitsmall {command} makes one run, and {flags[0]} asks for something else: use "
            "fitsmall train init=CHECKPOINT 'callbacks=[compress]' callbacks.compress.size=1/20"
        )
    quoted = str(Path(checkpoint).resolve()).replace("'", r"\'")
    return f"init='{quoted}'", others


def _folder(command: str, words: Sequence[str]) -> list[str]:
    """Return words that name the folder of the run."""
    if any(word.startswith("hydra.run.dir=") for word in words):
        return [*words]
    return [f"hydra.run.dir=runs/{command}_{time.strftime('%Y-%m-%d_%H-%M-%S')}", *words]


def _setting(word: str) -> str:
    name, _, value = word.partition("=")
    quoted = value
    if name == "size" or not re.fullmatch(r"[\w.+-]*|\[.*\]", value):  # 1/20, or 40 KB
        quoted = repr(value)
    return f"callbacks.compress.{name}={quoted}"
