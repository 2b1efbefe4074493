"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import pressfit.callbacks
import pressfit.compressors
import pressfit.experiments

MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (pressfit.compressors, pressfit.callbacks, pressfit.experiments)
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0
