"""Faults planted one at a time in the code that trains, and how many of them the tests notice.

pip install -e '.[mutation]'; python -m fitsmall.experiments.benchmarks.mutants
    [--sample 200] [--seed 0] [--processes 2] [--paths compressors/training callbacks ...]

A mutant is the code with one place changed by an operator of mutmut: ``<`` becomes ``<=``, ``and``
becomes ``or``, 1 becomes 2, an argument becomes None or is left out. The tests run once without
any fault, to learn which of them reach which line. Then each sampled mutant meets those that reach
its statement, the fastest first, until one fails: that kills it. Survivors are printed.

Strings, error messages, annotations, decorators and imports are not mutated.
"""

import argparse
import difflib
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from random import Random
from types import CodeType
from typing import Any, NamedTuple

import coverage
import libcst as cst
import numba
import pytest
import torch
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators
from rich.console import Console
from rich.table import Table

__all__ = ["Mutant", "Reach", "main", "mutants"]

ROOT = Path(__file__).resolve().parents[2]
PATHS = (Path("compressors/training"), Path("compressors/training/methods"), Path("callbacks"))
# Tests that train in this process, and neither start others nor download.
TESTS = [
    ROOT / "tests" / f"test_{name}.py"
    for name in (
        "callbacks",
        "centroids",
        "criteria_allocation_schedules",
        "doctests",
        "guarantees",
        "mistakes",
        "quantization",
        "ranks",
        "sharding",
        "structures",
        "surgery",
        "surroundings",
        "trainers",
        "training",
        "widths",
    )
]
PATIENCE = 4  # times the seconds that tests take without a fault
STARTING = 15.0  # seconds that a process may take until its first test
LONGEST = 1800.0  # seconds that a file of tests may take
FATES = ("killed", "timed out", "survived")

# ---------------------------------------------------------------------------------- the mutants


class Mutant(NamedTuple):
    """A file with a change in one place.

    Args:
        path: The file, relative to the repository.
        operator: Name of mutmut's operator.
        scopes: Lines of what contains the place: statement, ..., function, class, file.
        tree: Syntax tree of the file.
        node: Node of the tree in that place.
        changed: What the node becomes.
    """

    path: Path
    operator: str
    scopes: tuple[range, ...]
    tree: cst.Module
    node: cst.CSTNode
    changed: cst.CSTNode

    @property
    def code(self) -> str:
        """The whole file with the change."""
        tree: Any = self.tree.deep_replace(self.node, self.changed)
        return str(tree.code)

    @property
    def diff(self) -> str:
        """The lines that differ."""
        before, after = self.tree.code.splitlines(), self.code.splitlines()
        _, _, *lines = difflib.unified_diff(before, after, n=0, lineterm="")
        return "\n".join(lines)


def mutants(path: Path) -> Iterator[Mutant]:
    """Yield all mutants of a file that mutmut has operators for."""
    wrapper = MetadataWrapper(cst.parse_module((ROOT / path).read_text()))
    positions = wrapper.resolve(PositionProvider)
    for node, scopes in _nodes(wrapper.module, positions, ()):
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                name = operator.__name__.removeprefix("operator_")
                for changed in operator(node):
                    yield Mutant(path, name, scopes, wrapper.module, node, changed)


def _nodes(
    node: cst.CSTNode, positions: Mapping[cst.CSTNode, Any], scopes: tuple[range, ...]
) -> Iterator[tuple[cst.CSTNode, tuple[range, ...]]]:
    """Yield the nodes whose change can change behaviour, each with the lines of its scopes."""
    if _is_wording(node):
        return
    if isinstance(node, cst.Module | cst.BaseCompoundStatement | cst.SimpleStatementLine):
        where = positions[node]
        scopes = range(where.start.line, where.end.line + 1), *scopes
    yield node, scopes
    for child in node.children:
        yield from _nodes(child, positions, scopes)


def _is_wording(node: cst.CSTNode) -> bool:
    """Return whether a node is text, or says something about code without doing anything."""
    match node:
        case cst.Call(func=cst.Name(value="inform" | "warn")):
            return True
        case cst.Assign(targets=[cst.AssignTarget(target=cst.Name(value="__all__"))]):
            return True
    kinds = (cst.BaseString, cst.Raise, cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom)
    return isinstance(node, kinds)


def plant(mutant: Mutant, folder: Path) -> None:
    """Let this process import the mutant instead of its file."""
    if "numba" in mutant.code:  # whose cache knows a function by its file's time, not by its code
        numba.config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]
    mutated, read = compile(mutant.code, ROOT / mutant.path, "exec"), SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, name: str) -> CodeType | None:
        return mutated if Path(loader.path) == ROOT / mutant.path else read(loader, name)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign,assignment]


# ------------------------------------------------------------------------------------ the tests


class Reach:
    """The lines that each test reaches.

    Attributes:
        seconds: Seconds that each test takes.
        lines: Tests that reach a line, by file and number.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.lines: dict[Path, dict[int, set[str]]] = {}

    def update(self, other: "Reach") -> None:
        """Add what is known of other tests."""
        self.seconds.update(other.seconds)
        for path, lines in other.lines.items():
            mine = self.lines.setdefault(path, {})
            for line, tests in lines.items():
                mine[line] = mine.get(line, set()) | tests

    def tests(self, mutant: Mutant) -> set[str]:
        """Return the tests that reach the narrowest scope of a mutant that any test reaches."""
        lines = self.lines.get(mutant.path, {})
        for scope in mutant.scopes:
            if tests := {test for line in scope for test in lines.get(line, ())}:
                return tests
        return set()


class Measurement:
    """A plugin of pytest that measures what tests reach of some files."""

    def __init__(self, files: Iterable[Path]) -> None:
        include = [str(ROOT / file) for file in files]
        self.coverage = coverage.Coverage(data_file=None, include=include)
        self.seconds = defaultdict[str, float](float)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.coverage.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration

    def reach(self) -> Reach:
        """Return what was measured, but for lines that only importing a file reaches."""
        reach, data = Reach(), self.coverage.get_data()
        reach.seconds.update(self.seconds)
        for file in data.measured_files():
            reach.lines[Path(file).relative_to(ROOT)] = {
                line: {test for test in tests if test}
                for line, tests in data.contexts_by_lineno(file).items()
            }
        return reach


class Selection:
    """A plugin of pytest that runs some tests only, the fastest first."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.seconds = seconds

    @pytest.hookimpl(tryfirst=True)  # pytest then brings together what shares a fixture
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        mine = [item for item in items if item.nodeid in self.seconds]
        items[:] = sorted(mine, key=lambda item: self.seconds[item.nodeid])


def run_tests(files: Iterable[Path], folder: Path, plugin: object) -> int:
    """Run tests until one fails, and return pytest's exit status."""
    options = ["--quiet", "--exitfirst", "--tb=short", "-p", "no:cacheprovider"]
    options += ["-c", str(ROOT / "pyproject.toml"), "--basetemp", str(folder / "tests")]
    options += ["--noconftest"]  # which sorts tests, for several processes
    return int(pytest.main([*options, *map(str, files)], plugins=[plugin]))


def forget_modules() -> None:
    """Forget the modules of this repository, so that they are imported again."""
    parts = tuple(str(ROOT / part) for part in ("callbacks", "compressors", "experiments", "tests"))
    for name, module in [*sys.modules.items()]:
        ours = str(getattr(module, "__file__", "")).startswith(parts)
        # The namespace package, too: it has the modules below it as attributes.
        if name == "fitsmall" or (ours and name not in ("__main__", __name__)):
            del sys.modules[name]


# -------------------------------------------------------------------------------- the processes


class Job(NamedTuple):
    """Work for a process of its own.

    Args:
        subject: What the work is about.
        work: Works in the job's folder and returns an exit status.
        folder: Folder to be made for it; the file ``output`` in it gets what is printed.
        seconds: Seconds after which it is killed.
    """

    subject: Any
    work: Callable[[Path], int]
    folder: Path
    seconds: float


def run_jobs(jobs: Iterable[Job], processes: int) -> Iterator[tuple[Job, int]]:
    """Run jobs in forks of this process, which has imported what takes long to import.

    Yields:
        Each job when it ends, with its exit status, or minus the signal that killed it.
    """
    running: dict[int, Job] = {}

    def wait() -> tuple[Job, int]:
        process, status = os.wait()
        return running.pop(process), os.waitstatus_to_exitcode(status)

    for job in jobs:
        if len(running) == processes:
            yield wait()
        running[_fork(job)] = job
    while running:
        yield wait()


def _fork(job: Job) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        signal.alarm(int(job.seconds))
        job.folder.mkdir()
        output = os.open(job.folder / "output", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, sys.stdout.fileno())
        os.dup2(output, sys.stderr.fileno())
        status = job.work(job.folder)
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def measure(files: Sequence[Path], folder: Path, processes: int) -> Reach:
    """Run all tests without any fault, and return which lines of some files they reach.

    Raises:
        RuntimeError: A test fails.
    """

    def work(test: Path, folder: Path) -> int:
        measurement = Measurement(files)
        with measurement.coverage.collect():
            status = run_tests([test], folder, measurement)
        (folder / "reach").write_bytes(pickle.dumps(measurement.reach()))
        return status

    jobs = (Job(test, partial(work, test), folder / test.stem, LONGEST) for test in TESTS)
    whole = Reach()
    for job, status in run_jobs(jobs, processes):
        if status:
            raise RuntimeError(f"without any fault:\n{(job.folder / 'output').read_text()}")
        whole.update(pickle.loads((job.folder / "reach").read_bytes()))
    return whole


def meet(
    sample: Iterable[Mutant], reach: Reach, folder: Path, processes: int
) -> Iterator[tuple[Mutant, str]]:
    """Let mutants meet the tests that reach them, and yield each with its fate."""

    def work(mutant: Mutant, seconds: Mapping[str, float], folder: Path) -> int:
        plant(mutant, folder)
        files = {ROOT / test.partition("::")[0] for test in seconds}
        return run_tests(sorted(files), folder, Selection(seconds)) if files else 0

    def jobs() -> Iterator[Job]:
        for number, mutant in enumerate(sample):
            seconds = {test: reach.seconds[test] for test in reach.tests(mutant)}
            limit = PATIENCE * (STARTING + sum(seconds.values()))
            yield Job(mutant, partial(work, mutant, seconds), folder / str(number), limit)

    for job, status in run_jobs(jobs(), processes):
        yield job.subject, {0: "survived", -signal.SIGALRM: "timed out"}.get(status, "killed")
        shutil.rmtree(job.folder)


# ----------------------------------------------------------------------------------- the report


def tally(title: str, fates: Iterable[tuple[str, str]]) -> Table:
    """Return a table of the fates of mutants, by group and of all together."""
    groups: dict[str, Counter[str]] = {}
    everyone = Counter[str]()
    for group, fate in sorted(fates):
        groups.setdefault(group, Counter())[fate] += 1
        everyone[fate] += 1
    table = Table(title, "mutants", *FATES, "dead %")
    for group, counts in (groups | {"all": everyone}).items():
        dead = 1 - counts["survived"] / counts.total()
        table.add_row(
            group, str(counts.total()), *(str(counts[fate]) for fate in FATES), f"{100 * dead:.1f}"
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--paths", type=Path, nargs="+", default=PATHS, help="folders or files")
    options = parser.parse_args(arguments)
    files = [
        file.relative_to(ROOT)
        for path in options.paths
        for file in ([ROOT / path] if path.suffix else sorted((ROOT / path).glob("*.py")))
    ]
    found = [mutant for file in files for mutant in mutants(file)]
    sample = Random(options.seed).sample(found, min(options.sample, len(found)))
    torch.set_num_threads(1)  # a fork of a process with several may hang
    pytest.main(["--collect-only", "-qq", *map(str, TESTS)])  # imports all that tests need
    forget_modules()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.monotonic()
        reach = measure(files, folder, options.processes)
        middle = time.monotonic()
        print(f"{len(reach.seconds)} tests pass in {middle - start:.0f} s", flush=True)
        fates = []
        for mutant, fate in meet(sample, reach, folder, options.processes):
            fates.append((mutant, fate))
            print(f"{len(fates)}/{len(sample)} {fate} {mutant.path} {mutant.operator}", flush=True)
            if fate == "survived":
                print(mutant.diff, flush=True)
        end = time.monotonic()
    console = Console()
    console.print(tally("file", ((str(mutant.path), fate) for mutant, fate in fates)))
    console.print(tally("operator", ((mutant.operator, fate) for mutant, fate in fates)))
    each = (end - middle) / len(sample)
    print(f"{len(sample)} of {len(found):,} mutants, seed {options.seed}: {each:.1f} s each")


if __name__ == "__main__":
    main()
