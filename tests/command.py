"""The command line in processes that fork from one that has imported torch and Lightning."""

import os
import signal
import sys
from multiprocessing import get_context
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from unittest.mock import patch

from fitsmall.experiments.cli.main import main

_SERVER = get_context("forkserver")
_SERVER.set_forkserver_preload(["preload"])


class Command:
    """Run ``fitsmall`` in a process that starts now.

    Args:
        words: Words after ``fitsmall``.
        folder: Working directory.
        environment: Variables on top of those of this process.
    """

    def __init__(self, *words: str, folder: Path | None = None, **environment: str) -> None:
        self._printed = TemporaryDirectory()
        environment = {**os.environ, "COLUMNS": "200", **environment}
        arguments = (words, folder or Path.cwd(), environment, Path(self._printed.name))
        # The server looks for preload.py in its own path, which is not that of this process.
        with patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):
            ensure_running()
        self._process = _SERVER.Process(target=_run, args=arguments)
        self._process.start()

    def runs(self) -> bool:
        """True until it ends."""
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def end(self) -> CompletedProcess[str]:
        """Wait until it ends."""
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        output, errors = (Path(self._printed.name, name).read_text() for name in _STREAMS)
        return CompletedProcess([], code, output, errors)


_STREAMS = {"stdout": 1, "stderr": 2}


def _run(words: tuple[str, ...], folder: Path, environment: dict[str, str], printed: Path) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for name, number in _STREAMS.items():
        os.dup2(os.open(printed / name, os.O_WRONLY | os.O_CREAT), number)
    # A process in the background of a shell ignores Ctrl-C, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [str(Path(sys.executable).with_name("fitsmall"))]
    main(words)
