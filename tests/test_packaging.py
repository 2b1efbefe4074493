"""The package is what the tree says it is, and its layers do not know the ones above them."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("callbacks", "compressors", "configs", "experiments")
# Folders that are used from a checkout only.
UNPACKED = {"experiments/benchmarks", "experiments/zoo"}


def packages() -> dict[str, str]:
    """Folder of each package of the wheel."""
    folders = [
        str(path.parent.relative_to(ROOT))
        for top in TOPS
        for path in sorted((ROOT / top).rglob("__init__.py"))
    ]
    found = {f"fitsmall.{folder.replace('/', '.')}": folder for folder in folders}
    found["hydra_plugins.fitsmall"] = found.pop("fitsmall.experiments.sweepers")
    return {package: folder for package, folder in found.items() if folder not in UNPACKED}


FOLDERS = packages()

# Modules that a layer may not import, not even within a function.
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


def module_files() -> dict[str, Path]:
    """File of each module, those that are not in the wheel included."""
    files = {}
    unpacked = {f"fitsmall.{folder.replace('/', '.')}": folder for folder in UNPACKED}
    for package, folder in {**FOLDERS, **unpacked}.items():
        for path in (ROOT / folder).glob("*.py"):
            files[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return files


MODULES = module_files()


@cache
def imports(path: Path, lazy: bool = True) -> frozenset[str]:
    """Names that a file imports; with ``lazy``, also those that its functions import."""
    found = set()
    for node in statements(ast.parse(path.read_text()), lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def statements(tree: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from statements(node, lazy)


def imported_modules(path: Path, lazy: bool) -> set[str]:
    """Modules of this project that a file imports."""
    # `from package import name` imports a module of the package, or the package itself.
    names = ((name, name.rpartition(".")[0]) for name in imports(path, lazy))
    return {next(n for n in pair if n in MODULES) for pair in names if {*pair} & MODULES.keys()}


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_a_layer_imports_nothing_from_above(layer: str) -> None:
    for path in (ROOT / layer).rglob("*.py"):
        for name in imports(path):
            for forbidden in FORBIDDEN[layer]:
                assert name != forbidden, path
                assert not name.startswith(f"{forbidden}."), path


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for type checkers count, those within functions do not."""
    graph = {name: imported_modules(path, lazy=False) for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 200
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_nothing_in_the_wheel_imports_what_is_not_in_it() -> None:
    for name, path in MODULES.items():
        if str(path.parent.relative_to(ROOT)) not in UNPACKED:
            for imported in imported_modules(path, lazy=True):
                for folder in UNPACKED:
                    assert not imported.startswith(f"fitsmall.{folder.replace('/', '.')}"), name


def test_every_module_has_a_name_that_says_something() -> None:
    for name in MODULES:
        last = name.rpartition(".")[2]
        assert last not in {"utils", "util", "helpers", "helper", "misc", "common", "manager"}, name
        assert not last.startswith("base_"), name
        assert not last.endswith(("_utils", "_helpers", "_manager")), name


def test_compressors_load_without_lightning_and_hydra() -> None:
    """Training included; with a plain loop they need not even be installed."""
    code = (
        "import sys, fitsmall.compressors\n"
        "for name in ('lightning', 'hydra', 'omegaconf', 'wandb'):\n"
        "    sys.modules[name] = None  # importing it fails\n"
        "import fitsmall.compressors.training, fitsmall.compressors.export.onnx\n"
        "print(sorted(name for name in ('lightning', 'hydra') if sys.modules[name]))"
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
