"""The page of guarantees names tests that exist, and all that make its claims."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "guarantees.md"


def test_every_test_that_is_named_exists() -> None:
    defined = {
        path.name: set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
        for path in TESTS.glob("test_*.py")
    }
    file, named = "", set()
    for word in re.findall(r"`((?:test_\w+\.py)?::test_\w+)", PAGE.read_text()):
        module, _, name = word.partition("::")
        file = module or file
        assert name in defined[file], word
        named.add((file, name))
    assert len(named) > 40
    unnamed = {
        name for name in defined["test_guarantees.py"] if ("test_guarantees.py", name) not in named
    }
    assert not unnamed, f"guarantees that the page does not list: {unnamed}"
