"""The files of a run's folder. They are replaced as a whole, so that no reader sees half of one."""

import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fitsmall.experiments.run.fingerprint import fingerprint

__all__ = ["PROGRESS_FILE", "find_result", "read_result", "write_json", "write_text"]

PROGRESS_FILE = "progress.json"


def find_result(config: DictConfig) -> dict[str, Any] | None:
    """Content of ``result.json``, if a run with this configuration has ended in its folder.

    Returns:
        The result, or None if there is none or its fingerprint differs.
    """
    path = Path(config.folder) / "result.json"
    if not path.is_file():
        return None
    result = read_result(path)
    return result if result.get("fingerprint") == fingerprint(config) else None


def read_result(path: Path) -> dict[str, Any]:
    """Content of a ``result.json``, whose texts have no control characters.

    Raises:
        ValueError: It is damaged.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and run again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no result of a run: remove it")  # noqa: TRY004  as above
    cleaned: dict[str, Any] = _printable(content)
    return cleaned


def _printable(value: Any) -> Any:
    from fitsmall.compressors.naming import printable  # loads torch, which sweepers do without

    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_printable(each) for each in value]
    if isinstance(value, dict):
        return {printable(key): _printable(each) for key, each in value.items()}
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, by :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a process that reads it meanwhile, or a kill, finds the old
    content or the new one."""
    temporary = path.with_suffix(f".{os.getpid()}.new")
    temporary.write_text(text)
    temporary.replace(path)
