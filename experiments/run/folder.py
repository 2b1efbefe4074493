"""The files of a run's folder. They are replaced as a whole, so that no reader sees half of one."""

import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fitsmall.experiments.run.fingerprint import fingerprint

__all__ = ["PROGRESS_FILE", "find_result", "write_json", "write_text"]

PROGRESS_FILE = "progress.json"


def find_result(config: DictConfig) -> dict[str, Any] | None:
    """Content of ``result.json``, if a run with this configuration has ended in its folder.

    Returns:
        The result, or None if there is none or its fingerprint differs.
    """
    path = Path(config.folder) / "result.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result.get("fingerprint") == fingerprint(config) else None


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, by :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a process that reads it meanwhile, or a kill, finds the old
    content or the new one."""
    temporary = path.with_suffix(f".{os.getpid()}.new")
    temporary.write_text(text)
    temporary.replace(path)
