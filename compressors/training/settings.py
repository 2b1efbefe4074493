"""The settings of a stage in a checkpoint, and what happens to those that differ on resuming."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fitsmall.compressors.naming import name_of
from fitsmall.compressors.training.messages import inform
from fitsmall.compressors.training.stage import Stage

__all__ = ["settings_of", "take_settings"]


def settings_of(stage: Stage) -> dict[str, Any]:
    """Return the arguments of a stage's constructor that it keeps as attributes, as plain values.

    Example:
        >>> from fitsmall.compressors.training import WeightSharing
        >>> settings = settings_of(WeightSharing(8))
        >>> settings["clusters"], settings["schedule"], settings["exclude"]
        (8, 'LinearRamp()', [])
    """
    names = inspect.signature(type(stage).__init__).parameters
    return {name: _plain(getattr(stage, name)) for name in names if hasattr(stage, name)}


def _plain(value: Any) -> Any:
    """Return numbers, text, lists and dicts as they are, and other objects as text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not hasattr(value, "_fields"):
        return [_plain(each) for each in value]
    if inspect.isroutine(value):
        return name_of(value)
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def take_settings(stage: Stage, saved: Mapping[str, Any]) -> None:
    """Log the settings that a stage takes over those of a checkpoint, or refuse them.

    A setting that only one of the two has is of another version, and left alone.

    Args:
        stage: The stage, whose clock was resumed.
        saved: State of the stage in the checkpoint.

    Raises:
        ValueError: The stage cannot take a setting any more.
    """
    before, now, name = saved.get("settings", {}), settings_of(stage), type(stage).__name__
    different = {
        setting: f"{setting}={before[setting]!r} -> {value!r}"
        for setting, value in now.items()
        if setting in before and before[setting] != value
    }
    if saved["chosen_at"] is None:
        taken, why = different.keys() - stage.fixed, "has changed the module"
    elif stage.clock.now < stage.window.last:
        taken, why = set(stage.followed), "has begun"
    else:
        taken, why = set(), "has made its last choice"
    if refused := [text for setting, text in different.items() if setting not in taken]:
        raise ValueError(
            f"{name}: the checkpoint has other settings, {', '.join(refused)}, and the stage "
            f"{why}: resume with the first value; or load the checkpoint's state_dict into the "
            "module, and train without ckpt_path, so that every stage begins again"
        )
    if different:
        inform(f"{name}: resumed with other settings: {', '.join(different.values())}")
