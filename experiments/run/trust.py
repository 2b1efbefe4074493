"""Which classes the configuration of a run's folder may name: such a folder is data, not code.

Runs that were made here are remembered by the SHA-256 of their ``config.yaml``, in
``$XDG_STATE_HOME/fitsmall/runs`` (``~/.local/state`` by default), where no folder that somebody
sends can write. Of all other runs only networks, optimizers and data sets of fitsmall and torch are
made, and classes of packages that the user names.
"""

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

__all__ = ["load_config", "remember"]

# Modules whose classes do nothing but compute, whatever their arguments are.
_KNOWN = (
    "fitsmall.experiments.data.",
    "fitsmall.experiments.models.",
    "torch.nn.modules.",
    "torch.optim.",
)


def remember(folder: Path) -> None:
    """Remember that the run in a folder was made here."""
    path = _memory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(f"{_identity(folder)}\n")
    except OSError:  # without a memory the user has to name packages
        return


def load_config(folder: Path, trusted: Collection[str] = ()) -> DictConfig:
    """Load the configuration of a run, all of it resolved.

    Args:
        folder: Folder of the run.
        trusted: Packages whose classes and functions may be called as well.

    Raises:
        ValueError: The run was not made here, and names something else.
    """
    config = OmegaConf.load(folder / "config.yaml")
    assert isinstance(config, DictConfig)
    plain = {name: OmegaConf.to_container(config[name], resolve=True) for name in ("model", "data")}
    if not _made_here(folder):
        for target in _targets(plain):
            if str(target).partition(".")[0] not in trusted and not _is_known(target):
                package = str(target).partition(".")[0]
                raise ValueError(
                    f"{folder / 'config.yaml'} names {str(target)!r}, which is code, and the run "
                    f"was not made here: if you know whose code it is, add --trust {package}"
                )
    return OmegaConf.create(plain)


def _is_known(target: object) -> bool:
    """Whether a name is that of a class which fitsmall or torch define.

    Example:
        >>> _is_known("torch.optim.SGD"), _is_known("os.system"), _is_known("torch.nn.os.system")
        (True, False, False)
    """
    if not isinstance(target, str) or not target.startswith((*_KNOWN, "torch.nn.")):
        return False
    try:
        found = get_object(target)
    except Exception:  # noqa: BLE001  the name of nothing
        return False
    return isinstance(found, type) and f"{found.__module__}.".startswith(_KNOWN)


def _targets(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        node = list(node.values())
    for each in node if isinstance(node, list) else ():
        yield from _targets(each)


def _memory() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "fitsmall" / "runs"


def _identity(folder: Path) -> str:
    return hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest()


def _made_here(folder: Path) -> bool:
    path = _memory()
    return path.is_file() and _identity(folder) in path.read_text().split()
