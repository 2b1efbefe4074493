"""What the jobs of a sweep are at: each leaves a note in its folder, and one display reads them."""

import json
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from fitsmall.experiments.run.units import shown, words

__all__ = ["NOTE", "Progress"]

NOTE = "progress.json"

_STALE = 120  # seconds after which a note tells of a job that is no more
_POLL = 0.5


class Progress:
    """Shows a line for each running job, and how much is done; prints one for each that has ended.

    It reads files alone, so that it does not matter where and by what the jobs are run.

    Args:
        jobs: What to call each job, by its folder.
        done: Folders of those that have finished before.
        console: Where to show it.
    """

    def __init__(
        self, jobs: Mapping[Path, str], done: Collection[Path] = (), console: Console | None = None
    ) -> None:
        # This very stream: what a job of this process prints goes elsewhere while it runs.
        self.jobs, self.console = dict(jobs), console or Console(file=sys.stdout)
        self.done, self.before = set(done), len(done)
        self.failed: set[Path] = set()
        self.began = time.time()
        self._stop = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._live = Live(
            console=self.console,
            get_renderable=self.table,
            refresh_per_second=2,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        if self.console.is_terminal:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self._live.stop()
        if kind is not None and not issubclass(kind, Exception):
            self.console.print(
                f"stopped with {len(self.done)} of {len(self.jobs)} jobs finished: the same "
                "command goes on from here",
                markup=False,
            )

    def table(self) -> Table:
        """The running jobs and, below them, the sweep as a whole."""
        table = Table.grid(padding=(0, 2))
        for folder, name in self.jobs.items():
            note = _read(folder / NOTE)
            if folder in self.done or not note or time.time() - note["time"] > _STALE:
                continue
            bar = ProgressBar(note["steps"], note["step"], width=20)
            table.add_row(escape(name), bar, note["phase"], f"{_duration(note['left'])} left")
        count, all_, left = len(self.done), len(self.jobs), self.left()
        failed = f", {len(self.failed)} failed" if self.failed else ""
        table.add_row(
            f"[bold]{count} of {all_} jobs[/bold]{failed}",
            ProgressBar(all_, count, width=20),
            f"for {_duration(time.time() - self.began)}",
            f"{_duration(left)} left" if left else "",
        )
        return table

    def left(self) -> float | None:
        """Seconds until the sweep ends, if the jobs to come take as long as those that went."""
        ended = len(self.done) + len(self.failed) - self.before
        to_come = len(self.jobs) - len(self.done) - len(self.failed)
        return (time.time() - self.began) / ended * to_come if ended else None

    def _watch(self) -> None:
        while not self._stop.wait(_POLL):
            self._look()

    def _look(self) -> None:
        for folder, name in self.jobs.items():
            if folder in self.done or folder in self.failed:
                continue
            if result := self._result(folder):
                self.done.add(folder)
                metric = result["metric"]
                self._say(
                    f"{name}: {shown(metric, result['error'])} {words(metric)} in "
                    f"{result['bytes']:,} bytes"
                )
            elif self._new(error := folder / "error.txt"):
                self.failed.add(folder)
                last = error.read_text().strip().splitlines()[-1]
                self._say(f"{name}: failed: {last}; all of it is in {error}")

    def _result(self, folder: Path) -> dict[str, Any] | None:
        path = folder / "result.json"
        # A run that belongs to a budget writes its result twice, the second time with its size.
        return _read(path) if self._new(path) and not (folder / NOTE).exists() else None

    def _new(self, path: Path) -> bool:
        """Whether a file is there that a job has written since, and none of another sweep."""
        return path.is_file() and path.stat().st_mtime >= self.began

    def _say(self, line: str) -> None:
        count = f"{len(self.done) + len(self.failed)} of {len(self.jobs)}"
        left = self.left()
        after = f"; {_duration(left)} left" if left else ""
        said = f"{count}: {line}{after}"
        self.console.print(said, markup=False, highlight=False, soft_wrap=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):  # not there, or being written
        return None
    return found


def _duration(seconds: float) -> str:
    """How long something takes, or what is left of it.

    Example:
        >>> _duration(7), _duration(194), _duration(7300)
        ('7 s', '3 min', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
