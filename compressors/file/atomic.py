"""Files that appear under their name only when they are complete."""

import contextlib
import errno
import glob
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows: scratch files of killed processes stay there
    fcntl = None  # type: ignore[assignment]

__all__ = ["replaced"]


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write in place of another one, which it replaces at the end of the block.

    It is a scratch file in the same folder until then. After an error the scratch file is removed;
    one that a killed process left is removed by the next replacement. A file that is replaced keeps
    its permissions.

    Raises:
        FileNotFoundError: The folder does not exist.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "numbers"
        >>> with replaced(path) as file:
        ...     bytes_written = file.write(b"12")
        ...     path.exists()
        False
        >>> path.read_bytes()
        b'12'
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "There is no folder", str(path.parent))
    _remove_leftovers(path)
    with _scratch(path) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, _permissions(path))
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _scratch(path: Path) -> BinaryIO:
    """A new file, locked until it is closed, as it is when its process is killed."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        file = open(name, "r+b")  # noqa: SIM115  the caller closes it
        try:
            locked = fcntl is None or _lock(file)
        except OSError:
            return file
        # Another process may have taken it for a leftover before it was locked.
        if locked and os.path.exists(name):
            return file
        file.close()


def _remove_leftovers(path: Path) -> None:
    """Remove scratch files of processes that were killed: nobody holds their lock."""
    pattern = f".{glob.escape(path.name)}.{'[a-z0-9_]' * 8}"
    for leftover in path.parent.glob(pattern) if fcntl else ():
        with contextlib.suppress(OSError), open(leftover, "r+b") as file:
            if _lock(file):
                leftover.unlink()


def _lock(file: BinaryIO) -> bool:
    """Lock a file, and return whether that was possible: another process may have locked it.

    Raises:
        OSError: The file system knows no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _permissions(path: Path) -> int:
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
