"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import fitsmall.callbacks
import fitsmall.compressors
import fitsmall.experiments

MODULES = [
    module.name
    for package in (fitsmall.compressors, fitsmall.callbacks, fitsmall.experiments)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:  # of an extra that is not installed
        if str(error.name).startswith("fitsmall"):
            raise
        pytest.skip(f"{error.name} is not installed")
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0
