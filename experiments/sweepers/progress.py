"""The progress of a sweep: each job writes a file to its folder, and one display reads them all."""

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

from fitsmall.experiments.run.folder import PROGRESS_FILE
from fitsmall.experiments.run.metric_format import describe_metric, format_metric

__all__ = ["Progress"]

_MAX_AGE = 120  # seconds; the job of an older file was killed
_POLL = 0.5  # seconds


class Progress:
    """Show a line for each running job and one for the sweep; print one for each job that ends.

    It only reads files of :class:`~fitsmall.experiments.run.progress_note.ProgressNote`, so jobs
    may run in other processes or on other machines.

    Args:
        jobs: Label of each job, by its folder.
        finished: Folders of jobs that had finished before the sweep.
        console: Where to print.
    """

    def __init__(
        self,
        jobs: Mapping[Path, str],
        finished: Collection[Path] = (),
        console: Console | None = None,
    ) -> None:
        # The stream of now: jobs in this process redirect sys.stdout while they run.
        self.jobs, self.console = dict(jobs), console or Console(file=sys.stdout)
        self.finished, self.count_before = set(finished), len(finished)
        self.failed: set[Path] = set()
        self.start_time = time.time()
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
        self._report_ended()
        self._live.stop()
        if _is_interrupt(error):
            self.console.print(
                f"stopped with {len(self.finished)} of {len(self.jobs)} jobs finished: run the "
                "same command to continue",
                markup=False,
            )

    def table(self) -> Table:
        """A row for each running job, and one for the whole sweep."""
        table = Table.grid(padding=(0, 2))
        for folder, label in self.jobs.items():
            note = _read_json(folder / PROGRESS_FILE)
            if folder in self.finished or not note or time.time() - note["time"] > _MAX_AGE:
                continue
            bar = ProgressBar(note["steps"], note["step"], width=20)
            table.add_row(escape(label), bar, note["phase"], f"{_duration(note['left'])} left")
        count, total, left = len(self.finished), len(self.jobs), self.seconds_left()
        failed = f", {len(self.failed)} failed" if self.failed else ""
        table.add_row(
            f"[bold]{count} of {total} jobs[/bold]{failed}",
            ProgressBar(total, count, width=20),
            f"for {_duration(time.time() - self.start_time)}",
            f"{_duration(left)} left" if left else "",
        )
        return table

    def seconds_left(self) -> float | None:
        """Seconds until the sweep ends, from the mean time of the jobs that ended in it."""
        ended = len(self.finished) + len(self.failed) - self.count_before
        open_jobs = len(self.jobs) - len(self.finished) - len(self.failed)
        return (time.time() - self.start_time) / ended * open_jobs if ended else None

    def _watch(self) -> None:
        while not self._stop.wait(_POLL):
            self._report_ended()

    def _report_ended(self) -> None:
        for folder, label in self.jobs.items():
            if folder in self.finished or folder in self.failed:
                continue
            if result := self._result(folder):
                self.finished.add(folder)
                metric = result["metric"]
                self._print(
                    f"{label}: {format_metric(metric, result['error'])} {describe_metric(metric)} "
                    f"in {result['bytes']:,} bytes"
                )
            elif self._is_new(error := folder / "error.txt"):
                self.failed.add(folder)
                last = error.read_text().strip().splitlines()[-1]
                self._print(f"{label}: failed: {last}; {error} has the traceback")

    def _result(self, folder: Path) -> dict[str, Any] | None:
        path = folder / "result.json"
        # A job with a budget writes its result twice; it has ended when its note is removed.
        ended = self._is_new(path) and not (folder / PROGRESS_FILE).exists()
        return _read_json(path) if ended else None

    def _is_new(self, path: Path) -> bool:
        """True if the file exists and was written during this sweep."""
        return path.is_file() and path.stat().st_mtime >= self.start_time

    def _print(self, line: str) -> None:
        count = f"{len(self.finished) + len(self.failed)} of {len(self.jobs)}"
        left = self.seconds_left()
        rest = f"; {_duration(left)} left" if left else ""
        self.console.print(f"{count}: {line}{rest}", markup=False, highlight=False, soft_wrap=True)


def _is_interrupt(error: BaseException | None) -> bool:
    """True if an error began with Ctrl-C or the like.

    An interrupt within OmegaConf's code may be replaced there by an error that follows from it.
    """
    while error is not None and isinstance(error, Exception):
        error = error.__context__
    return error is not None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):  # it does not exist, or is being written
        return None
    return value


def _duration(seconds: float) -> str:
    """A duration in words.

    Example:
        >>> _duration(7), _duration(194), _duration(7300)
        ('7 s', '3 min', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
