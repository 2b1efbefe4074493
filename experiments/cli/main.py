"""The command ``fitsmall``: train with compression; inspect, unpack, export, time the result."""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException

from fitsmall.experiments.cli.completion import SCRIPTS, complete
from fitsmall.experiments.cli.nearest import nearest

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

__all__ = ["main"]

# What a command needs it imports when it runs: help and completion do not wait for torch.

# What a user can mend; anything else is a bug and shows its traceback.
_MISTAKES = (
    HydraException,
    OmegaConfBaseException,
    FloatingPointError,  # training has diverged
    ImportError,
    OSError,
    ValueError,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``fitsmall`` with these arguments, by default the process's own."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    traceback = bool(os.environ.get("HYDRA_FULL_ERROR"))
    _find_modules_here()
    try:
        if words[:1] == ["train"]:
            _train(words[1:])
        elif words == ["complete"]:  # asked by the shell
            (commands,) = (a for a in _parser()._actions if a.choices)
            complete(list(commands.choices or ()))
        else:
            options = _parser().parse_args(words or ["--help"])
            options.run(options)
    except BrokenPipeError:  # the reader of a pipe, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        mistake = isinstance(error, (*_MISTAKES, MisconfigurationException))
        if traceback or not mistake:
            raise
        print(f"fitsmall: {_one_line(error, words)}", file=sys.stderr)
        print("HYDRA_FULL_ERROR=1 in the environment shows where.", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fitsmall",
        description="Compress neural networks while they train.",
        epilog="fitsmall train --help lists models, data, methods and all settings.",
    )
    parser.add_argument("--version", action="version", version=f"fitsmall {version('fitsmall')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    # Never reached: Hydra reads what stands behind `train`.
    commands.add_parser("train", help="train, compress, measure, draw")
    new = commands.add_parser("new", help="begin a project with a network of your own")
    new.add_argument("folder", type=Path, metavar="PROJECT", help="folder to make")
    new.set_defaults(run=_new)
    completion = commands.add_parser("completion", help="print what a shell needs for completion")
    completion.add_argument("shell", choices=list(SCRIPTS))
    completion.set_defaults(run=lambda options: print(SCRIPTS[options.shell], end=""))
    table = commands.add_parser("inspect", help="show where the bytes of a compressed file go")
    table.add_argument("file", type=Path, metavar="FILE")
    table.add_argument("--limit", type=int, help="most bytes that its tensors may take")
    table.set_defaults(run=_inspect)
    unpack = commands.add_parser("decompress", help="write a compressed file's weights out")
    unpack.add_argument("file", type=Path, metavar="FILE")
    unpack.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="safetensors file to write (default: FILE's name with .safetensors)",
    )
    unpack.add_argument("--limit", type=int, help="most bytes that its tensors may take")
    unpack.set_defaults(run=_decompress)
    export = commands.add_parser("export", help="write a quantized run as ONNX with integers")
    export.add_argument("folder", type=Path, metavar="RUN", help="directory of a run")
    export.add_argument("--format", choices=["onnx"], default="onnx")
    export.add_argument("--opset", type=int, default=18, help="version of ONNX's operators")
    export.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="file to write (default: RUN/model.onnx)"
    )
    export.set_defaults(run=_export)
    ranks = commands.add_parser("ranks", help="show how many dimensions each layer of a run needs")
    ranks.add_argument("folder", type=Path, metavar="RUN", help="directory of a run")
    ranks.add_argument(
        "--tolerance", type=float, default=0.1, help="error of a layer's outputs, as a fraction"
    )
    ranks.add_argument("--images", type=int, default=512, help="training images that it is shown")
    ranks.set_defaults(run=_ranks)
    report = commands.add_parser("report", help="show what a sweep of sizes and compressions says")
    report.add_argument("folders", type=Path, nargs="+", metavar="RUNS", help="folder of a sweep")
    report.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="folder to write (default: RUNS/report)"
    )
    report.set_defaults(run=_report)
    dashboard = commands.add_parser("dashboard", help="save a view of a sweep's runs at W&B")
    dashboard.add_argument("folder", type=Path, metavar="RUNS", help="folder of a sweep, or a run")
    dashboard.add_argument("--entity", help="user or team at W&B (default: yours)")
    dashboard.set_defaults(run=_dashboard)
    bench = commands.add_parser("bench", help="time an exported run in each engine, on Linux")
    bench.add_argument("file", type=Path, metavar="FILE", help="RUN/model.onnx")
    bench.add_argument("--batch", type=int, default=8, help="examples that run at once")
    bench.add_argument("--threads", type=int, default=1, help="threads that compute")
    bench.add_argument("--rounds", type=int, default=15, help="times that each engine has a turn")
    bench.set_defaults(run=_bench)
    return parser


def _find_modules_here() -> None:
    """Let configurations name modules of the folder that the command is given in, also in the
    processes that it starts."""
    here = os.getcwd()
    if here in sys.path:
        return
    sys.path.append(here)
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{known}{os.pathsep}{here}" if known else here


def _new(options: argparse.Namespace) -> None:
    folder: Path = options.folder
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a folder that is not there yet")
    shutil.copytree(Path(__file__).with_name("project"), folder, dirs_exist_ok=True)
    (folder / "network.txt").rename(folder / "network.py")
    print(f"{folder} is made; its README.md says the same:\n")
    print(f"    cd {folder}")
    print("    fitsmall train --config-dir configs experiment=mine")


def _train(overrides: list[str]) -> None:
    from hydra.core.plugins import Plugins
    from hydra_plugins.fitsmall.grids import Grids
    from hydra_plugins.fitsmall.search import Search

    from fitsmall.experiments.run.train import main as train

    # Hydra finds what is installed as a copy by itself; an editable installation it overlooks.
    for sweeper in (Grids, Search):
        Plugins.instance().register(sweeper)
    sys.argv = [sys.argv[0], *overrides]
    # So that Hydra raises what went wrong instead of printing a report of its own.
    before = os.environ.get("HYDRA_FULL_ERROR", "")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        train()
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before


def _inspect(options: argparse.Namespace) -> None:
    from fitsmall.compressors import inspect

    print(inspect(options.file, options.limit).table())


def _decompress(options: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    from fitsmall.compressors import load

    tensors = load(options.file, options.limit)
    output = options.output or options.file.with_suffix(".safetensors")
    save_file(tensors, output)
    size = output.stat().st_size
    print(f"{output}: {len(tensors)} tensors, {size:,} bytes")


def _export(options: argparse.Namespace) -> None:
    from fitsmall.compressors.export.onnx import export_onnx

    module, images = _restored(options.folder)
    output = options.output or options.folder / "model.onnx"
    print(export_onnx(module, output, images, options.opset).table(len(images)))


def _bench(options: argparse.Namespace) -> None:
    from rich.console import Console

    from fitsmall.experiments.run.inference import bench

    file = options.file
    for path, remedy in (
        (file, "fitsmall export RUN writes it"),
        (file.parent / "config.yaml", "FILE is in the directory of its run"),
        (file.parent / "model.fitsmall", "FILE is in the directory of its run"),
    ):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: {remedy}")
    module, images = _restored(file.parent)
    table = bench(file, module, images, options.batch, options.threads, options.rounds)
    Console().print(table)


def _ranks(options: argparse.Namespace) -> None:
    from rich.console import Console

    from fitsmall.experiments.run.dimensions import ranks

    if options.images < 2:
        raise ValueError(f"images are fitted on one half, so 2 at least, and got {options.images}")
    module, images = _restored(options.folder, "train", options.images)
    Console().print(ranks(module, images, options.tolerance, options.folder / "ranks.png"))


def _report(options: argparse.Namespace) -> None:
    try:
        from fitsmall.experiments.study.tables import report
    except ModuleNotFoundError as error:
        from fitsmall.compressors.extras import install_command

        raise ImportError(f"{error}: {install_command('report')}") from error

    report(options.folders, options.output or options.folders[0] / "report")


def _dashboard(options: argparse.Namespace) -> None:
    try:
        import wandb

        from fitsmall.experiments.study.workspace import workspace
    except ModuleNotFoundError as error:
        from fitsmall.compressors.extras import install_command

        raise ImportError(f"{error}: {install_command('wandb')}") from error

    try:
        entity = options.entity or wandb.Api().default_entity
        if entity is None:
            raise ValueError("your account at W&B has no entity of its own: name one by --entity")
        view: Any = workspace(options.folder, entity)
        print(view.save().url)
    except wandb.Error as error:
        raise ValueError(f"W&B: {error}") from error


def _restored(folder: Path, part: str = "test", most: int | None = None) -> "tuple[Module, Tensor]":
    """The module of a run's directory, and a batch of the images that it is tested on, or as many
    as are wanted of those that it was trained on."""
    import torch
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from fitsmall.compressors import restore

    config = OmegaConf.load(folder / "config.yaml")
    module = instantiate(config.model, _convert_="all")
    restore(module, folder / "model.fitsmall")
    data = instantiate(config.data, _convert_="all")
    data.setup("test")
    loader = data.test_dataloader() if part == "test" else data.train_dataloader()
    batches: list[torch.Tensor] = []
    for batch in loader:
        if isinstance(batch, torch.Tensor) or len(batch) != 2:
            raise ValueError(
                f"the batches of {config.data._target_} are no pairs of inputs and targets, which "
                "this command takes the inputs of"
            )
        batches.append(batch[0])
        if part == "test" or (most is not None and sum(map(len, batches)) >= most):
            break
    return module, torch.cat(batches)[:most]


def _one_line(error: Exception, words: list[str]) -> str:
    # Hydra names the call that failed; what went wrong is in the cause.
    if isinstance(error, InstantiationException) and error.__cause__:
        return " ".join(str(error.__cause__).split())
    message = str(error).partition("Config search path")[0]
    if words[:1] == ["train"] and (hint := nearest(message, words[1:])):
        own = message.partition("To append")[0].partition("Available options")[0]
        message = own.strip().rstrip(".") + hint
    return " ".join(message.split())
