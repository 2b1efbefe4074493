"""The package is what the tree says it is, and its layers do not know the ones above them."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Folders that are measured and tested from a checkout only.
UNPACKED = {"experiments/benchmarks"}


def packages() -> dict[str, str]:
    """Where each package of the wheel is in the tree."""
    tops = ("callbacks", "compressors", "configs", "experiments")
    folders = [
        str(path.parent.relative_to(ROOT))
        for top in tops
        for path in sorted((ROOT / top).rglob("__init__.py"))
    ]
    found = {f"fitsmall.{folder.replace('/', '.')}": folder for folder in folders}
    found["hydra_plugins.fitsmall"] = found.pop("fitsmall.experiments.sweepers")
    return {package: folder for package, folder in found.items() if folder not in UNPACKED}


FOLDERS = packages()

# What each layer may not import, at any depth of a function.
FORBIDDEN = {
    "compressors": (
        "lightning",
        "hydra",
        "omegaconf",
        "wandb",
        "fitsmall.callbacks",
        "fitsmall.experiments",
    ),
    "callbacks": ("hydra", "omegaconf", "wandb", "fitsmall.experiments"),
}


def imports(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text()))
    found = set()
    for node in tree:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_a_layer_imports_nothing_from_above(layer: str) -> None:
    for path in (ROOT / layer).rglob("*.py"):
        for name in imports(path):
            for forbidden in FORBIDDEN[layer]:
                assert name != forbidden, path
                assert not name.startswith(f"{forbidden}."), path


def test_compressors_load_without_lightning_and_hydra() -> None:
    code = (
        "import sys, fitsmall.compressors\n"
        "print(sorted({'lightning', 'hydra', 'omegaconf', 'wandb'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_sweepers_load_without_torch() -> None:
    """Hydra imports the plugins of every package for every command, whatever it is for."""
    code = (
        "import sys, hydra_plugins.fitsmall.grids, hydra_plugins.fitsmall.search\n"
        "print(sorted({'torch', 'lightning', 'matplotlib', 'optuna'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_package_list_is_the_tree() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == FOLDERS
    assert set(settings["packages"]) == FOLDERS.keys()
    for package, folder in FOLDERS.items():
        if package.count(".") == 1:
            assert (ROOT / ".typing" / package.replace(".", "/")).resolve() == ROOT / folder
    # A folder without an __init__.py would vanish from the wheel without a word.
    for top in ("callbacks", "compressors", "experiments"):
        for path in (ROOT / top).rglob("*.py"):
            assert str(path.parent.relative_to(ROOT)) in {*FOLDERS.values(), *UNPACKED}


def test_the_wheel_holds_every_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    patterns = ("*.py", "*.html", "**/*.yaml", "project/*.*", "py.typed")
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder)}"
        for package, folder in FOLDERS.items()
        for pattern in patterns
        for path in (ROOT / folder).glob(pattern)
    }
    assert packed == expected
