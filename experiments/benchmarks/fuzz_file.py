"""Fuzzing of the readers of compressed files: damaged, spliced and forged files by the million.

python -m fitsmall.experiments.benchmarks.fuzz_file [--inputs 1000000] [--seed 1]

With ``pip install -e '.[fuzz]'`` coverage of the readers guides the choice of files to damage
further. Nearly all files have a valid checksum. Whatever a file contains, each of ``load``,
``inspect``, ``restore`` and ``decompress`` must end within a second and half a millisecond for
each byte of the file, with tensors or with a ValueError of one line that names the file. It may
take four times the memory that it was allowed, and 64 MiB to work in (Linux's VmHWM). The first
file that breaks a rule ends the campaign, is kept in the working directory, and makes the exit
status 1.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from ctypes import Structure, c_double, c_long
from inspect import getmembers, isclass, isfunction
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fitsmall.compressors import inspect, load, restore
from fitsmall.compressors.file import coding, reader, report, schema
from fitsmall.compressors.file.reader import MIN_LIMIT, entries
from fitsmall.compressors.surgery.kinds import SURGERIES
from fitsmall.experiments.benchmarks.forged_files import LONGEST, greedy, mutate, seeds
from fitsmall.experiments.cli.decompress import decompress
from fitsmall.experiments.cli.process_memory import peak_memory, reset_peak_memory

__all__ = ["accepts", "main"]

SECONDS, SECONDS_PER_BYTE = 1.0, 0.0005  # of one reader
HANG = 60  # seconds after which a process is taken to hang
LIMIT = 2**18  # bytes that the tensors of a hostile file may take
WORKING = 2**26  # bytes that a reader may take on top of four times the limit
GREEDY = 500  # bytes of a greedy one


class _Holder(nn.Module):
    """A module that any tensors fit."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.tensors

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.tensors = dict(state_dict)


def accepts(path: Path, limit: int | None = LIMIT) -> bool:
    """Whether the directory, the tensors and the report of a file can be read, and the tensors be
    put into a module, and into another file.

    Raises:
        RuntimeError: A refusal is anything but a ValueError of one line that names the file, or
            reading takes too long.
    """
    found: dict[str, Tensor] = {}

    def put_back() -> None:
        # A module of another class has the layers that surgery changes; this one has none.
        plain = found and not any(kind.own_tensors(found) for kind in SURGERIES)
        restore(_Holder(found) if plain else nn.Linear(2, 2), path)

    readers: tuple[Callable[[], object], ...] = (
        lambda: entries(path),
        lambda: found.update(load(path, limit)),
        lambda: inspect(path, limit).table(),
        put_back,
        lambda: decompress(path, path.with_name("unpacked"), limit),
    )
    accepted = []
    for read in readers:
        start = time.process_time()
        try:
            read()
            accepted.append(True)
        except Exception as error:
            message = str(error)
            if type(error) is not ValueError or str(path) not in message or "\n" in message:
                raise RuntimeError(f"refused by {error!r}") from error
            accepted.append(False)
        seconds = time.process_time() - start
        if seconds > SECONDS + SECONDS_PER_BYTE * path.stat().st_size:
            raise RuntimeError(f"reading took {seconds:.1f} seconds of the processor")
    return all(accepted[:3])


class Tally(Structure):
    """Results of the attacking process, in shared memory."""

    inputs: int
    accepted: int
    seconds: float
    memory: int
    started: float
    _fields_ = (
        ("inputs", c_long),
        ("accepted", c_long),
        ("seconds", c_double),
        ("memory", c_long),
        ("started", c_double),
    )

    def attack(self, path: Path, limit: int | None = LIMIT) -> None:
        """Read the file.

        Raises:
            RuntimeError: That takes too long, or too much memory.
        """
        self.started = time.monotonic()
        before = reset_peak_memory()
        start = time.perf_counter()
        accepted = accepts(path, limit)
        seconds = time.perf_counter() - start
        memory = peak_memory() - before
        self.inputs += 1
        self.accepted += accepted
        self.seconds = max(self.seconds, seconds)
        self.memory = max(self.memory, memory)
        if memory > 4 * (limit or MIN_LIMIT) + WORKING:
            raise RuntimeError(f"reading took {memory:,} bytes of memory")


def _campaign(folder: Path, inputs: int, seed: int, tallies: Sequence[Tally]) -> None:
    """Attack with greedy files under the default limit, then with hostile ones."""
    path = folder / "input"
    for number, honest in enumerate(seeds()):  # compiles
        path.write_bytes(honest)
        (folder / "seeds" / str(number)).write_bytes(honest)
        if not accepts(path):
            raise RuntimeError("an honest file is refused")
    for file in greedy(GREEDY):
        path.write_bytes(file)
        tallies[0].attack(path, limit=None)
    try:
        import atheris  # an extra of its own
    except ImportError:
        dice = Random(seed)
        for _ in range(inputs):
            path.write_bytes(mutate(dice.choice(seeds()), dice)[:LONGEST])
            tallies[1].attack(path)
        return
    for module in (schema, reader, coding, report):
        for owner in (module, *(found for _, found in getmembers(module, isclass))):
            for _, function in getmembers(owner, isfunction):
                if function.__module__ == module.__name__:
                    atheris.instrument_func(function)

    def attack(file: bytes) -> None:
        path.write_bytes(file)
        tallies[1].attack(path)

    def mutator(file: bytes, longest: int, seed: int) -> bytes:
        return mutate(file, Random(seed))[:longest]

    flags = (f"-runs={inputs}", f"-seed={seed}", f"-max_len={LONGEST}", f"-timeout={HANG}")
    arguments = [sys.argv[0], *flags, f"-artifact_prefix={folder}/", str(folder / "seeds")]
    atheris.Setup(arguments, attack, custom_mutator=mutator)
    atheris.Fuzz()  # ends the process


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    context = get_context("spawn")
    tallies = context.Array(Tally, 2, lock=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "seeds").mkdir()
        # A process of its own, since a file might kill it.
        attack = (folder, options.inputs, options.seed, tallies)
        child = context.Process(target=_campaign, args=attack)
        child.start()
        while child.is_alive():
            child.join(HANG)
            last = max(tally.started for tally in tallies)
            if last and child.is_alive() and time.monotonic() - last > HANG:
                child.kill()
        table = Table("files", "inputs", "accepted", "refused", "slowest s", "memory MB")
        titles = (f"greedy, {GREEDY} bytes, default limit", f"hostile, limit {LIMIT:,} bytes")
        for title, tally in zip(titles, tallies, strict=True):
            counts = (tally.inputs, tally.accepted, tally.inputs - tally.accepted)
            table.add_row(
                title,
                *(f"{count:,}" for count in counts),
                f"{tally.seconds:.3f}",
                f"{tally.memory / 1e6:.1f}",
            )
        Console().print(table)
        if child.exitcode:
            hostile = Path("hostile.fitsmall").resolve()
            shutil.copy(folder / "input", hostile)
            print(f"A rule is broken by {hostile}")
            sys.exit(1)


if __name__ == "__main__":
    main()
