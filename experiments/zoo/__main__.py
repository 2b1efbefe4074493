"""Run the zoo, and write the table of what works.

pip install -e '.[zoo]'; python -m fitsmall.experiments.zoo [--networks NAME ...]
    [--methods NAME ...] [--processes 2] [--limit 600] [--cells FILE] [--output docs/zoo.md]

Each network runs in a process of its own. A cell *works* if it trains, covers the weights, and its
file gives a fresh network the same outputs bit for bit; it is *refused* if an error came before the
first step, or from the export of what was trained. Everything else is a bug.
"""

import argparse
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from importlib.metadata import version
from pathlib import Path

from fitsmall.experiments.zoo.cells import METHODS, Cell, run_cell
from fitsmall.experiments.zoo.networks import NETWORKS

__all__ = ["main", "report", "table"]

_LIBRARIES = ("torch", "lightning", "timm", "transformers", "torch_geometric", "peft", "openvino")

_PAGE = """# The zoo: which networks work with which methods

`make zoo` trains {networks} networks of {families} families, with random weights and for 10 steps,
with every method.

- *yes*: the method acts on at least 90 % of the weights in matrices, and the file gives a fresh
  network the same outputs, bit for bit. For *export*, onnxruntime and OpenVINO give them, too.
- *yes, 83%*: the method acts on this share. Its plan says so before the first step, and names the
  layers that it leaves out.
- *refused*: an error before the first step, or from the export, names the reason and the remedy.
  They are listed below the table.

Made on {date:%Y-%m-%d} with {versions}, in {minutes:.0f} minutes of one core.

{table}
"""

_MARKS = {"works": "yes", "refused": "refused", "crashed": "**crashed**", "wrong": "**wrong**"}


def run_network(network: str, methods: Sequence[str], limit: float) -> list[Cell]:
    """Run the cells of a network in a process of its own.

    Args:
        network: Name of the network.
        methods: Names of the methods.
        limit: Seconds after which the process is killed.
    """
    command = [sys.executable, "-m", "fitsmall.experiments.zoo", "--child", "--networks", network]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [*command, "--methods", *methods],
            check=False, capture_output=True, text=True, timeout=limit, env=environment,
        )  # fmt: skip
        printed, end = done.stdout, f"exit status {done.returncode}: {done.stderr[-300:]}"
    except subprocess.TimeoutExpired as error:
        printed, end = (error.stdout or b"").decode(), f"took more than {limit:.0f} s"
    lines = (line for line in printed.splitlines() if line.startswith("["))
    cells = [Cell(*json.loads(line)) for line in lines]
    missing = methods[len(cells) :]
    return cells + [Cell(network, method, "crashed", 0.0, end, 0.0) for method in missing]


def table(cells: Sequence[Cell]) -> str:
    """Return a Markdown table of outcomes, and the remarks below it."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    lines = [f"| network | family | {' | '.join(methods)} |", f"|---|---|{'---|' * len(methods)}"]
    for network in dict.fromkeys(cell.network for cell in cells):
        own = {cell.method: cell for cell in cells if cell.network == network}
        marks = [_mark(own[method]) if method in own else "" for method in methods]
        lines.append(f"| {network} | {NETWORKS[network].family} | {' | '.join(marks)} |")
    counts = Counter(cell.outcome for cell in cells)
    lines += ["", ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + "."]
    remarks: dict[str, list[str]] = {}
    for cell in cells:
        if cell.remark:
            first = textwrap.shorten(cell.remark.split("\n")[0], 300, placeholder=" …")
            remarks.setdefault(f"{cell.outcome}, {cell.method}: {first}", []).append(cell.network)
    lines += ["", *(f"- {', '.join(names)}: {remark}" for remark, names in remarks.items())]
    return "\n".join(lines)


def _mark(cell: Cell) -> str:
    """Return an outcome as the table shows it, with the coverage if it is below 90 %."""
    covered = cell.coverage >= 0.9 or cell.outcome != "works"
    return _MARKS[cell.outcome] + ("" if covered else f", {cell.coverage:.0%}")


def report(cells: Sequence[Cell]) -> str:
    """Return the page of the table, with the versions of what made it."""
    return _PAGE.format(
        networks=len({cell.network for cell in cells}),
        families=len({NETWORKS[cell.network].family for cell in cells}),
        date=date.today(),
        versions=", ".join(f"{name} {version(name)}" for name in _LIBRARIES),
        minutes=sum(cell.seconds for cell in cells) / 60,
        table=table(cells),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of a network")
    parser.add_argument("--cells", type=Path, help="file that keeps cells, to go on from")
    parser.add_argument("--output", type=Path, help="file for the table")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        for network in options.networks:
            for method in options.methods:
                print(json.dumps(run_cell(network, method)), flush=True)
        return
    kept: dict[str, list[Cell]] = {}
    if options.cells and options.cells.exists():
        for line in options.cells.read_text().splitlines():
            cell = Cell(*json.loads(line))
            kept.setdefault(cell.network, []).append(cell)
    with ThreadPoolExecutor(options.processes) as pool:
        jobs = {
            pool.submit(run_network, network, options.methods, options.limit)
            for network in options.networks
            if network not in kept
        }
        for job in as_completed(jobs):
            found = job.result()
            kept[found[0].network] = found
            for cell in found:
                print(
                    f"{cell.network} {cell.method}: {cell.outcome} {cell.coverage:.0%} "
                    f"{cell.seconds:.1f} s {cell.remark[:400]}", flush=True,
                )  # fmt: skip
            if options.cells:
                with options.cells.open("a") as file:
                    file.writelines(json.dumps(cell) + "\n" for cell in found)
    cells = [cell for network in options.networks for cell in kept[network]]
    text = report(cells)
    print(text)
    if options.output:
        options.output.write_text(text)
    if any(cell.outcome in ("crashed", "wrong") for cell in cells):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
