"""The command ``fitsmall``: train and compress a network; inspect, unpack, export, time it."""

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
from fitsmall.experiments.cli.suggestions import suggest

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.nn import Module

__all__ = ["main"]

# Commands import what they need when they run, so that help and completion do not load torch.

# Errors that a user can correct. Any other one is a bug, and shows its traceback.
_USER_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    FloatingPointError,  # training has diverged
    ImportError,
    OSError,
    ValueError,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``fitsmall``; after a mistake of the user, print one line and exit with status 2.

    Args:
        arguments: Words after ``fitsmall``; by default those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    wants_traceback = bool(os.environ.get("HYDRA_FULL_ERROR"))
    if words[:1] in (["train"], ["compress"], ["suggest"], ["complete"]):
        _import_from_working_directory()
    try:
        if words[:1] == ["train"]:
            _train(words[1:])
        elif words[:1] == ["compress"]:
            _compress(words[1:])
        elif words[:1] == ["suggest"]:
            _suggest(words[1:])
        elif words == ["complete"]:  # asked by the shell
            (commands,) = (a for a in _parser()._actions if a.choices)
            complete(list(commands.choices or ()))
        else:
            options = _parser().parse_args(words or ["--help"])
            options.run(options)
    except BrokenPipeError:  # the reader of the pipe has ended, for example `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if wants_traceback or not _is_user_error(error):
            raise
        from fitsmall.compressors.naming import printable

        print(f"fitsmall: {printable(_one_line(error, words))}", file=sys.stderr)
        print("Set HYDRA_FULL_ERROR=1 in the environment for the traceback.", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fitsmall",
        usage="fitsmall [-h] [--version] COMMAND ...",
        description="Compress neural networks during training.",
        epilog="fitsmall COMMAND --help describes a command; that of train lists all settings.",
    )
    parser.add_argument("--version", action="version", version=f"fitsmall {version('fitsmall')}")
    # The width of the metavar keeps long names and their descriptions on one line.
    commands = parser.add_subparsers(
        prog="fitsmall", title="commands", required=True, metavar=f"{'COMMAND':12}"
    )
    # Only for the list of commands: Hydra reads the words after these.
    commands.add_parser("train", help="train and compress a network, or a sweep of networks")
    commands.add_parser("compress", help="compress a trained network to a target")
    commands.add_parser("suggest", help="show what a trained network loses at several sizes")
    new = commands.add_parser("new", help="start a project with your own network and data")
    new.add_argument("folder", type=Path, metavar="PROJECT", help="folder to create")
    new.set_defaults(run=_new)
    completion = commands.add_parser("completion", help="print a shell's completion script")
    completion.add_argument("shell", choices=list(SCRIPTS))
    completion.set_defaults(run=lambda options: print(SCRIPTS[options.shell], end=""))
    table = commands.add_parser("inspect", help="show the bytes of each tensor in a file")
    table.add_argument("file", type=Path, metavar="FILE", help="compressed file")
    table.add_argument("--limit", type=int, help="refuse tensors of more bytes in memory")
    table.set_defaults(run=_inspect)
    unpack = commands.add_parser("decompress", help="restore the weights from a file")
    unpack.add_argument("file", type=Path, metavar="FILE", help="compressed file")
    unpack.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="safetensors file to write (default: FILE with the suffix .safetensors)",
    )
    unpack.add_argument("--limit", type=int, help="refuse tensors of more bytes in memory")
    unpack.set_defaults(run=_decompress)
    export = commands.add_parser("export", help="export a quantized run to an integer network")
    export.add_argument("folder", type=Path, metavar="RUN", help="folder of a run")
    export.add_argument("--format", choices=["onnx"], default="onnx")
    export.add_argument("--opset", type=int, default=18, help="ONNX operator set (default: 18)")
    export.add_argument(
        "--weight-bits", type=int, default=8, help="most bits of a weight in the file (default: 8)"
    )
    export.add_argument(
        "--engines",
        nargs="+",
        metavar="ENGINE",
        help="engines that must agree (default: onnxruntime OpenVINO)",
    )
    export.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="file to write (default: RUN/model.onnx)"
    )
    _add_trust(export)
    export.set_defaults(run=_export)
    ranks = commands.add_parser("ranks", help="show the rank that each layer of a run needs")
    ranks.add_argument("folder", type=Path, metavar="RUN", help="folder of a run")
    ranks.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        help="squared error of a layer's outputs, as a fraction of their variance (default: 0.1)",
    )
    ranks.add_argument(
        "--images", type=int, default=512, help="number of training images (default: 512)"
    )
    _add_trust(ranks)
    ranks.set_defaults(run=_ranks)
    report = commands.add_parser("report", help="compare the sizes and compressions of a sweep")
    report.add_argument("folders", type=Path, nargs="+", metavar="RUNS", help="folder of a sweep")
    report.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="folder to write (default: RUNS/report)"
    )
    report.set_defaults(run=_report)
    dashboard = commands.add_parser("dashboard", help="save a view of a sweep's runs at W&B")
    dashboard.add_argument("folder", type=Path, metavar="RUNS", help="folder of a sweep or a run")
    dashboard.add_argument("--entity", help="user or team at W&B (default: yours)")
    dashboard.set_defaults(run=_dashboard)
    bench = commands.add_parser("bench", help="time an exported run in each engine (Linux)")
    bench.add_argument("file", type=Path, metavar="FILE", help="exported RUN/model.onnx")
    bench.add_argument(
        "--sparse",
        action="store_true",
        help="time kernels that skip zeros instead, layer by layer; FILE may be RUN/model.fitsmall",
    )
    bench.add_argument("--batch", type=int, default=8, help="examples in a batch (default: 8)")
    bench.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    bench.add_argument("--rounds", type=int, default=15, help="turns of each engine (default: 15)")
    _add_trust(bench)
    bench.set_defaults(run=_bench)
    return parser


def _add_trust(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="package that a run which was not made here may call; see docs/safety.md",
    )


def _import_from_working_directory() -> None:
    """Let configurations name modules of the working directory, in this process and in those that
    it starts."""
    folder = os.getcwd()
    if folder in sys.path:
        return
    sys.path.append(folder)
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{inherited}{os.pathsep}{folder}" if inherited else folder


def _new(options: argparse.Namespace) -> None:
    folder: Path = options.folder
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a folder that does not exist")
    shutil.copytree(Path(__file__).with_name("project"), folder, dirs_exist_ok=True)
    (folder / "network.txt").rename(folder / "network.py")
    print(f"{folder} is ready; its README.md has more. Train with\n")
    print(f"    cd {folder}")
    print("    fitsmall train --config-dir configs experiment=mine")


def _train(overrides: list[str]) -> None:
    from hydra.core.plugins import Plugins
    from hydra_plugins.fitsmall.grids import Grids
    from hydra_plugins.fitsmall.search import Search

    from fitsmall.experiments.run.job import main as train

    # Hydra finds plugins by itself, but not those of an editable installation.
    for sweeper in (Grids, Search):
        Plugins.instance().register(sweeper)
    _run_job(train, overrides)


def _run_job(job: "Callable[[], object]", overrides: list[str]) -> None:
    """Run a job whose configuration Hydra makes of these words."""
    sys.argv = [sys.argv[0], *overrides]
    # With it Hydra raises errors; without, it prints a report of its own and exits.
    before = os.environ.get("HYDRA_FULL_ERROR", "")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        job()
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before


def _compress(words: list[str]) -> None:
    """Fine-tune a trained network to a target; end with status 1 if the target was missed."""
    from fitsmall.experiments.cli.compress import HELP, folder_of, missed, training_words

    if not words or {"-h", "--help"} & {*words}:
        print(HELP)
        return
    overrides = training_words(words)
    _train(overrides)
    if missed(folder_of(overrides)):
        sys.exit(1)


def _suggest(words: list[str]) -> None:
    from fitsmall.experiments.cli.compress import SUGGEST_HELP, suggest_words

    if not words or {"-h", "--help"} & {*words}:
        print(SUGGEST_HELP)
        return
    overrides = suggest_words(words)
    from fitsmall.experiments.run.suggest import main as suggest_sizes

    _run_job(suggest_sizes, overrides)


def _inspect(options: argparse.Namespace) -> None:
    from fitsmall.compressors import inspect

    print(inspect(options.file, options.limit).table())


def _decompress(options: argparse.Namespace) -> None:
    from fitsmall.experiments.cli.decompress import decompress

    print(decompress(options.file, options.output, options.limit))


def _export(options: argparse.Namespace) -> None:
    from fitsmall.compressors.export.engines import ENGINES
    from fitsmall.compressors.export.onnx import export_onnx

    module, images = _load_run(options.folder, options.trust)
    output = options.output or options.folder / "model.onnx"
    engines = options.engines or tuple(ENGINES)
    found = export_onnx(module, output, images, options.opset, options.weight_bits, engines)
    print(found.table())


def _bench(options: argparse.Namespace) -> None:
    file = options.file
    written = "fitsmall train writes it" if options.sparse else "write it by fitsmall export RUN"
    for path, remedy in (
        (file, written),
        (file.parent / "config.yaml", "FILE must be in the folder of its run"),
        (file.parent / "model.fitsmall", "FILE must be in the folder of its run"),
    ):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file: {remedy}")
    module, images = _load_run(file.parent, options.trust)
    settings = options.batch, options.threads, options.rounds
    if options.sparse:
        from fitsmall.experiments.cli.sparse_bench import sparse_bench

        print(sparse_bench(module, images, *settings))
        return
    from rich.console import Console

    from fitsmall.experiments.cli.bench import bench

    Console().print(bench(file, module, images, *settings))


def _ranks(options: argparse.Namespace) -> None:
    from rich.console import Console

    from fitsmall.experiments.cli.needed_ranks import rank_table

    if options.images < 2:
        raise ValueError(f"--images is split into two halves: give 2 or more; got {options.images}")
    module, images = _load_run(options.folder, options.trust, "train", options.images)
    Console().print(rank_table(module, images, options.tolerance, options.folder / "ranks.png"))


def _report(options: argparse.Namespace) -> None:
    try:
        from fitsmall.experiments.study.report_files import write_report
    except ModuleNotFoundError as error:
        from fitsmall.compressors.extras import install_command

        raise ImportError(f"{error}: {install_command('report')}") from error

    write_report(options.folders, options.output or options.folders[0] / "report")


def _dashboard(options: argparse.Namespace) -> None:
    try:
        import wandb

        from fitsmall.experiments.study.workspace import build_workspace
    except ModuleNotFoundError as error:
        from fitsmall.compressors.extras import install_command

        raise ImportError(f"{error}: {install_command('wandb')}") from error

    try:
        entity = options.entity or wandb.Api().default_entity
        if entity is None:
            raise ValueError("your W&B account has no default entity: name one by --entity")
        view: Any = build_workspace(options.folder, entity)
        print(view.save().url)
    except wandb.Error as error:
        raise ValueError(f"W&B: {error}") from error


def _load_run(
    folder: Path, trusted: Sequence[str], split: str = "test", limit: int | None = None
) -> "tuple[Module, Tensor]":
    """The restored module of a run, and images: the first test batch, or training images up to a
    limit. Of a run that was not made here, only known classes and trusted packages are called."""
    import torch
    from hydra.utils import instantiate

    from fitsmall.compressors import restore
    from fitsmall.experiments.run.trust import load_config

    config = load_config(folder, trusted)
    _import_from_working_directory()
    module = instantiate(config.model, _convert_="all")
    restore(module, folder / "model.fitsmall")
    data = instantiate(config.data, _convert_="all")
    data.setup("test")
    loader = data.test_dataloader() if split == "test" else data.train_dataloader()
    batches: list[torch.Tensor] = []
    for batch in loader:
        if isinstance(batch, torch.Tensor) or len(batch) != 2:
            raise ValueError(
                f"this command needs batches of (inputs, targets), and {config.data._target_} "
                "gives others"
            )
        batches.append(batch[0])
        if split == "test" or (limit is not None and sum(map(len, batches)) >= limit):
            break
    return module, torch.cat(batches)[:limit]


def _is_user_error(error: Exception) -> bool:
    # Exceptions of Lightning and W&B can only be raised if these were imported.
    others = (
        getattr(sys.modules[module], name)
        for module, name in (
            ("lightning.fabric.utilities.exceptions", "MisconfigurationException"),
            ("wandb.errors", "Error"),  # such as a missing API key
        )
        if module in sys.modules
    )
    return isinstance(error, (*_USER_ERRORS, *others))


def _one_line(error: Exception, words: list[str]) -> str:
    # Hydra's message only names the call that failed, or is empty; the cause has the reason.
    is_vague = isinstance(error, InstantiationException) or not str(error)
    if is_vague and error.__cause__:
        return " ".join(str(error.__cause__).split())
    message = str(error).partition("Config search path")[0]
    takes_settings = words[:1] in (["train"], ["compress"], ["suggest"])
    if takes_settings and (hint := suggest(message, words[1:])):
        own = message.partition("To append")[0].partition("Available options")[0]
        message = own.strip().rstrip(".") + hint
    return " ".join(message.split())
