"""The pages name what exists: tests, modules, commands, links, private names of libraries."""

import csv
import importlib.util
import re
from pathlib import Path

import pytest

from fitsmall.callbacks import lightning_internals
from fitsmall.compressors import torch_internals
from fitsmall.experiments.cli import main
from fitsmall.experiments.study.before_after import draw_before_after, read_marks

TESTS = Path(__file__).parent
ROOT = TESTS.parent
DOCS = ROOT / "docs"
PROJECT = ROOT / "experiments" / "cli" / "project"
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *DOCS.glob("tutorials/*.md")]
TEXTS = {page: page.read_text() for page in PAGES}


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_every_test_that_is_named_exists() -> None:
    defined = {
        path.name: set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
        for path in TESTS.glob("test_*.py")
    }
    file, named = "", set()
    for word in re.findall(r"`((?:test_\w+\.py)?::test_\w+)", TEXTS[DOCS / "guarantees.md"]):
        module, _, name = word.partition("::")
        file = module or file
        assert name in defined[file], word
        named.add((file, name))
    assert len(named) > 40
    unnamed = {
        name for name in defined["test_guarantees.py"] if ("test_guarantees.py", name) not in named
    }
    assert not unnamed, f"guarantees that the page does not list: {unnamed}"


def test_every_file_that_is_named_exists(page: Path) -> None:
    """Paths in code spans begin with a folder of this repository, or of a project that begins."""
    pattern = r"`((?:compressors|callbacks|experiments|configs|docs|tests)/[\w/.]*)`"
    for name in re.findall(pattern, TEXTS[page]):
        assert any((root / name).exists() for root in (ROOT, PROJECT)), name


def test_every_module_that_is_named_exists(page: Path) -> None:
    for name in re.findall(r"python -m (fitsmall[\w.]+)", TEXTS[page]):
        assert importlib.util.find_spec(name.rstrip(".")), name


def test_every_object_that_is_named_exists(page: Path) -> None:
    for name in set(re.findall(r"\bfitsmall(?:\.\w+)+", TEXTS[page])):
        if name.endswith(".fitsmall"):
            continue
        try:
            importable = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            importable = None
        if importable is None:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


def test_every_command_that_is_named_exists(page: Path) -> None:
    """Commands stand in indented lines, in blocks for a shell, and in code spans."""
    text = TEXTS[page]
    shell = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    named = re.findall(r"(?:^ {4,}|`)fitsmall ([a-z]+)", text, re.MULTILINE)
    named += re.findall(r"^fitsmall ([a-z]+)", shell, re.MULTILINE)
    (commands,) = (action for action in main._parser()._actions if action.choices)
    for command in named:
        assert command in [*(commands.choices or ())], command


def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked.read_text()), target


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_nothing_tells_to_install_a_stranger_s_package(page: Path) -> None:
    """The name is not published: extras are installed from a checkout."""
    assert not re.search(r"pip install[^`\n]*\bfitsmall", TEXTS[page])


def test_words_are_plain(page: Path) -> None:
    """One reads a sentence once: `after` and not `behind`, `again` and not `anew`."""
    prose = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    assert not re.findall(
        r"\b(?:behind|anew|beside|besides|thereby|whereby)\b", prose, re.IGNORECASE
    )


def test_the_one_shot_snippet_has_its_warning(page: Path) -> None:
    """Without data it ruins a trained network, unless it is fine-tuned."""
    text = TEXTS[page]
    for found in re.finditer(r"^ *compress\((?!.*data=)", text, re.MULTILINE):
        assert "86.6" in text[max(0, found.start() - 1000) : found.end() + 1000]


def test_the_readme_is_short() -> None:
    lines = TEXTS[ROOT / "README.md"].splitlines()
    assert len(lines) < 150
    for line in lines:
        assert len(line) <= (200 if line.startswith("|") else 140), line


def test_the_private_names_of_libraries_are_listed() -> None:
    text = TEXTS[DOCS / "compatibility.md"]
    listed = set(re.findall(r"^\| `([\w.]+)` \| (\w.+) \|$", text, re.MULTILINE))
    used = {
        (f"{private.holder.rpartition(':')[2]}.{private.name}", private.feature)
        for library in (torch_internals, lightning_internals)
        for private in library.PRIVATE
    }
    assert listed == used
    for library in (torch_internals, lightning_internals):
        assert library.TESTED in text


def test_the_picture_is_of_the_committed_runs(tmp_path: Path) -> None:
    with open(DOCS / "results" / "digits_mlp" / "points.csv", newline="") as file:
        pairs = read_marks(csv.DictReader(file), "80 % zeros, 4 bits", "2,000 steps")
    assert len(pairs) == 7
    before, after = pairs[-1]
    assert before.bytes / after.bytes == pytest.approx(20.8, abs=0.1)
    draw_before_after(pairs, "80 % zeros, 4 bits", "Seven networks", tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").stat().st_size > 10_000
