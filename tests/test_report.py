"""The analysis of runs whose numbers are known, and the report that shows it."""

import csv
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fitsmall.experiments.cli.main import main
from fitsmall.experiments.study.analysis import Study, compression_costs
from fitsmall.experiments.study.conclusions import checklist, conclusions
from fitsmall.experiments.study.points import compare, read_results
from fitsmall.experiments.study.report_files import write_report
from fitsmall.experiments.study.tables import study_tables

SIZES = {"tiny": 1_000, "small": 4_000, "medium": 16_000, "large": 64_000, "huge": 256_000}
RATIOS = {"none": 1.0, "8 bits": 4.0, "80 % zeros, 4 bits": 16.0, "random zeros": 16.0}


def write(
    folder: Path, error: Any, seeds: int = 3, metric: str = "error", flops: float = 1e9
) -> None:
    """A run of every size and compression, whose error is a function of size, ratio and seed."""
    budget = {"flops": flops, "seconds": None, "steps": None, "scale": 1.0, "validations": 4}
    for size, dense in SIZES.items():
        for compression, ratio in RATIOS.items():
            for seed in range(seeds):
                run = folder / f"{size}-{compression}-{seed}-{flops:g}"
                run.mkdir(parents=True)
                value = error(size, compression, seed)
                result = {
                    "fingerprint": run.name,
                    "metric": metric,
                    "size": size,
                    "compression": compression,
                    "fine_tune": compression not in ("none", "8 bits"),
                    "seed": seed,
                    "error": value,
                    "error_validation": value + 0.001,
                    "bytes": dense / ratio,
                    "bytes_dense": dense,
                    "ratio": ratio,
                    "steps": 100,
                    "steps_before": 50,
                    "seconds": 1.0,
                    "provenance": {
                        "machine": "Processor",
                        "software": "fitsmall 0.1.0, torch 2.13.0",
                        "date": f"2026-11-{27 + seed}",
                    },
                    "flops_per_step": dense * 100.0,
                    "operations": 1e6,
                    "operations_needed": 1e6 if ratio < 16 else 2e5,
                    "budget": budget,
                    "init": str(folder / f"{size}-none-{seed}-{flops:g}" / "model.fitsmall"),
                    "overrides": [f"seed={seed}", "model.net.widths=[64,10]"],
                    "layers": {"net.fc1.weight": {"weights": 100, "bytes": 400 / ratio}},
                }
                (run / "result.json").write_text(json.dumps(result))
                # Large networks learn faster.
                fast = list(SIZES).index(size)
                rows = [f"{25 * n - 1},{value + (4 - n) * 0.1 / (1 + fast)}" for n in range(1, 5)]
                (run / "metrics.csv").write_text("\n".join([f"step,val/{metric}", *rows]) + "\n")


def larger_is_better(size: str, compression: str, seed: int) -> float:
    base = 0.2 - 0.03 * list(SIZES).index(size)
    loss = {"none": 0.0, "8 bits": 0.0005, "80 % zeros, 4 bits": 0.005, "random zeros": 0.3}
    return base + loss[compression] + 0.001 * seed


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write(tmp_path / "runs", larger_is_better)
    return tmp_path / "runs"


def test_large_networks_own_what_they_own(runs: Path) -> None:
    study = Study(read_results(runs))
    assert study.sizes == list(SIZES)
    assert study.seeds == 3
    claims = study.claims()
    assert [claim.bytes for claim in claims] == [*SIZES.values()]
    for claim in claims[:-1]:
        assert claim.owner.mean("bytes_dense") >= 4 * claim.bytes
        assert claim.large is not None
        assert claim.large.mean("bytes") <= 1.02 * claim.bytes
        against = claim.compare_with(claim.dense)
        assert against is not None
        assert against.verdict == "holds"
    assert claims[-1].large is None  # none is larger
    sixteen = claims[2]
    assert (sixteen.owner.size, sixteen.dense and sixteen.dense.size) == ("huge", "medium")
    assert sixteen.compare_with(sixteen.dense).mean == pytest.approx(0.06 - 0.005)  # type: ignore[union-attr]
    assert sixteen.small is not None
    assert sixteen.small.size == "medium"
    first, second = conclusions(study)
    assert "beats the best dense one of at most as many bytes at 4 of 4" in first
    assert "smaller" in second


def test_a_claim_that_does_not_hold_is_told(tmp_path: Path) -> None:
    def smaller_is_better(size: str, compression: str, seed: int) -> float:
        return larger_is_better(size, compression, seed) + 0.06 * list(SIZES).index(size)

    write(tmp_path, smaller_is_better)
    (first, _) = conclusions(Study(read_results(tmp_path)))
    assert "at 0 of 4 budgets of bytes, loses at 4, and cannot be told from it at 0" in first


def test_noise_decides_nothing(tmp_path: Path) -> None:
    def noise(size: str, compression: str, seed: int) -> float:
        return 0.2 + 0.05 * ((seed * 7 + len(size) * 3 + len(compression)) % 5)

    write(tmp_path, noise)
    (first, _) = conclusions(Study(read_results(tmp_path)))
    assert "and cannot be told from it at" in first
    undecided = int(first.rpartition(" at ")[2].rstrip("."))
    assert undecided >= 3


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    write(tmp_path, larger_is_better, seeds=1)
    study = Study(read_results(tmp_path))
    comparisons = [claim.compare_with(claim.dense) for claim in study.claims()]
    assert {comparison.verdict for comparison in comparisons if comparison} == {"undecided"}
    assert ("several seeds, with intervals: 1", False) in checklist(study)


def test_between_few_networks_there_are_other_limits(tmp_path: Path) -> None:
    write(tmp_path, larger_is_better)
    results = read_results(tmp_path)
    few = Study(r for r in results if r["size"] in ("tiny", "large", "huge")).claims()
    assert [claim.bytes for claim in few] == [1_000, 8_000, 64_000, 128_000, 256_000]
    # No dense network has 8,000 bytes, and that of 1,000 would be too easy a rival.
    assert [claim.dense is None for claim in few] == [False, True, False, True, False]
    near = {"tiny": 1_000, "small": 1_002}
    for result in results:
        result["bytes"] = near.get(result["size"], 0)
    close = [r for r in results if r["size"] in near and r["compression"] == "none"]
    assert Study(close).byte_limits() == [1_000, 1_001, 1_002]


def test_a_run_that_diverged_is_left_out_and_listed(tmp_path: Path) -> None:
    def diverges(size: str, compression: str, seed: int) -> float:
        lost = (size, compression, seed) == ("small", "8 bits", 1)
        return math.nan if lost else larger_is_better(size, compression, seed)

    write(tmp_path, diverges)
    study = Study(read_results(tmp_path))
    assert study.diverged == [str(tmp_path / "small-8 bits-1-1e+09")]
    assert study.seeds == 2
    assert str(tmp_path / "small-8 bits-1-1e+09") in conclusions(study)[0]


def test_other_settings_are_not_taken_for_the_same(runs: Path) -> None:
    results = read_results(runs)
    assert len(Study(results + results).points) == 20  # a run that is found twice is one run
    other = results[0] | {"fingerprint": "of another learning rate", "folder": "elsewhere"}
    with pytest.raises(ValueError, match=r"elsewhere have the same size, .* hydra.sweep.dir"):
        Study([*results, other])


def test_without_a_dense_network_there_is_a_report(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in runs.glob("*-none-*/result.json"):
        path.unlink()
    write_report([runs], runs.parent / "report")
    assert "of 0 budgets of bytes" in capsys.readouterr().out


def test_differences_are_paired_by_seed() -> None:
    # Seeds differ by far more than networks do.
    one, better, other = ({0: 0.1, 1: 0.5, 2: 0.9}, {0: 0.11, 1: 0.51, 2: 0.91}, {0: 0.9, 2: 0.1})
    for rival, verdict in ((better, "holds"), (other, "undecided")):
        comparison = compare(one, rival)
        assert comparison is not None
        assert comparison.verdict == verdict
    assert compare(one, {7: 0.5}) is None


def test_costs_and_steps_are_by_size(runs: Path) -> None:
    study = Study(read_results(runs))
    found = compression_costs(study.points, "tuned")["80 % zeros, 4 bits"]
    assert found.keys() == SIZES.keys()
    assert found["tiny"] == pytest.approx(dict.fromkeys(range(3), 0.005))
    target, steps = study.steps_to_common_error()
    assert target == pytest.approx(0.202)
    assert steps["tiny"] == dict.fromkeys(range(3), 100.0)
    assert steps["huge"] == dict.fromkeys(range(3), 25.0)


def test_large_networks_need_fewer_steps(runs: Path) -> None:
    (table,) = (
        s for s in study_tables(Study(read_results(runs))) if s.title.startswith("Steps to")
    )
    last = dict(zip(table.head, table.rows[-1], strict=True))
    assert (last["size"], last["steps"]) == ("huge", "25")
    assert last["fewer than tiny by"] == "75 ± 0 holds"


def test_the_length_of_training_has_a_verdict(runs: Path) -> None:
    def longer_costs_more(size: str, compression: str, seed: int) -> float:
        error = larger_is_better(size, compression, seed)
        return error - 0.0004 * (compression == "8 bits" and size == "huge") + 0.1

    write(runs / "short", longer_costs_more, flops=2.5e8)
    (table,) = (
        s for s in study_tables(Study(read_results(runs))) if s.title.startswith("Does the cost")
    )
    found = {row[0]: row[1:] for row in table.rows}
    assert table.head[1:3] == ["dense, 0.25", "dense"]
    costs = found["huge: 8 bits"][2:]
    assert costs == ["0.01 ± 0.00", "0.05 ± 0.00", "0.04 ± 0.00 costs more"]
    assert len(found) == len(SIZES)


def test_other_budgets_are_controls(runs: Path) -> None:
    write(runs / "short", larger_is_better, seeds=1, flops=2.5e8)
    study = Study(read_results(runs))
    assert study.budget["flops"] == 1e9
    ((budget, points),) = study.controls
    assert budget["flops"] == 2.5e8
    assert len(points) == len(SIZES) * len(RATIOS)


def test_the_checklist_is_met(runs: Path) -> None:
    found = dict(checklist(Study(read_results(runs))))
    assert found.pop("five operating points or more: 2 ratios") is False
    assert all(found.values())


def test_a_report_is_complete(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(runs)])
    printed = capsys.readouterr().out
    for words in ("Who owns each number of bytes", "holds", "at 4 of 4", "report.html"):
        assert words in printed
    folder = runs / "report"
    with open(folder / "points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(SIZES) * len(RATIOS) * 3
    (row,) = (r for r in rows if (r["size"], r["compression"], r["seed"]) == ("tiny", "none", "0"))
    assert float(row["error"]) == pytest.approx(0.2)
    assert (folder / "envelope.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert ET.parse(folder / "envelope.svg").getroot().tag.endswith("svg")
    document = (folder / "report.md").read_text()
    assert document.startswith("- A network of 4 times the bytes or more")
    assert (
        "20 points, 60 runs under a budget of 1e+09 flops, at least 3 of each. Run on Processor "
        "with fitsmall 0.1.0, torch 2.13.0; 27 November 2026 to 29 November 2026."
    ) in document
    assert "| tiny: dense | 3 | 1,000 | 1.0 |" in document
    assert "- [x] random pruning as the floor" in document
    page = (folder / "report.html").read_text()
    assert "fitsmall train seed=0 &#x27;model.net.widths=[64,10]&#x27;" in page
    # Nothing is fetched from anywhere.
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.(?!data:)", page)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "does not exist: name the folder of a sweep"),
        (lambda folder: folder.mkdir(), "no finished run that belongs to a budget"),
        (
            lambda folder: (
                write(folder / "a", larger_is_better),
                write(folder / "b", larger_is_better, metric="bits_per_byte"),
            ),
            "runs have different metrics: bits_per_byte, error",
        ),
    ],
)
def test_mistakes_are_named(
    make: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "runs")
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "runs")])
    assert message in capsys.readouterr().err


def test_the_page_works_in_a_browser(runs: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium")
    path = write_report([runs], runs / "report", Console(quiet=True))
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        view = browser.new_page(viewport={"width": 1200, "height": 900})
        problems: list[str] = []
        asked: list[str] = []
        view.on("console", lambda message: problems.append(message.text))
        view.on("pageerror", lambda error: problems.append(str(error)))
        view.on("request", lambda request: asked.append(request.url))
        view.goto(path.as_uri())
        view.wait_for_selector("#pareto .points path")
        assert not problems
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        # A point tells what it is.
        number = "document.getElementById('pareto').data[2].customdata.findIndex("
        number += "([name]) => name === 'tiny: dense')"
        hovered = f"[{{curveNumber: 2, pointNumber: {number}}}]"
        view.evaluate(f"Plotly.Fx.hover('pareto', {hovered})")
        view.wait_for_selector("#pareto .hoverlayer text")
        hover = view.text_content("#pareto .hoverlayer")
        assert "tiny: dense" in hover
        assert "20.10 %" in hover
        # The filter leaves what has all words, in the chart and in the tables.
        count = "document.querySelectorAll('#pareto .points path').length"
        assert view.evaluate(count) == len(SIZES) * len(RATIOS)
        view.fill("#filter", "huge zeros")
        view.wait_for_function(f"{count} == 2")
        rows = view.eval_on_selector_all(
            "tbody tr", "rows => rows.filter(row => !row.hidden).map(row => row.textContent)"
        )
        assert rows
        assert all("huge" in row and "zeros" in row for row in rows)
        view.fill("#filter", "")
        view.wait_for_function(f"{count} == {len(SIZES) * len(RATIOS)}")
        # A phone scrolls in one direction only, and paper has all of it.
        view.set_viewport_size({"width": 390, "height": 800})
        view.wait_for_function("document.documentElement.scrollWidth <= 390")
        view.wait_for_function("document.querySelector('#pareto .main-svg').clientWidth <= 390")
        assert len(view.pdf()) > 10_000
        assert not problems
        browser.close()


def test_names_are_names_wherever_they_come_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not markup, mathematics, formulas or commands to a terminal; damaged results are named."""
    odd = {
        "tiny": "=1+1",
        "small": "[red]$\\frac$ <img src=x>",
        "medium": "esc\x1b[31m\nape",
    }
    runs = tmp_path / "runs"
    write(runs, larger_is_better, seeds=2)
    for path in runs.rglob("result.json"):
        result = json.loads(path.read_text())
        result["size"] = odd.get(result["size"], result["size"])
        path.write_text(json.dumps(result))
    damaged = [runs / name / "result.json" for name in ("cut", "empty", "list")]
    for path, content in zip(damaged, ('{"size": "ti', "", "[1]"), strict=True):
        path.parent.mkdir()
        path.write_text(content)
    console = Console(record=True, width=300, force_terminal=False)
    page = write_report([runs], tmp_path / "report", console)
    told = capsys.readouterr().err
    for path in damaged:
        assert f"left out: {path} is " in told
    printed, html = console.export_text(), page.read_text()
    document = (tmp_path / "report" / "report.md").read_text()
    with open(tmp_path / "report" / "points.csv", newline="") as file:
        sizes = {row["size"] for row in csv.DictReader(file)}
    assert sizes == {"'=1+1", odd["small"], "esc\\x1b[31m\\nape", "large", "huge"}
    for text in (printed, html, document):
        assert "\x1b" not in text
    assert odd["small"] in printed
    assert "<img" not in html
    assert "\\u003cimg" not in html
    assert r"\[red]\$\\frac\$ \<img src=x>" in document
    svg = (tmp_path / "report" / "envelope.svg").read_text()
    assert svg.count("<!-- [red]") == 1  # a comment with the text, drawn as it is
