"""Engines that run an ONNX file on the CPU."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fitsmall.compressors.extras import install_command

__all__ = ["ENGINES", "Run", "session"]

Run = Callable[[Sequence[Tensor]], list[Tensor]]


def session(
    engine: str,
    path: str | os.PathLike[str],
    threads: int,
    exact: bool = True,
    names: Sequence[str] | None = None,
) -> Run:
    """Load an ONNX file into an engine, and return a function from inputs to outputs.

    Args:
        engine: One of :data:`ENGINES`.
        path: The file.
        threads: Number of threads.
        exact: Whether floats stay float32; otherwise OpenVINO rounds them to bfloat16 if the
            processor has instructions for it, which is its default.
        names: Names of the inputs in the graph, in the order in which the function takes them; by
            default they are in the order of the graph.

    Raises:
        ImportError: The engine is not installed.
        ValueError: The engine cannot read the file, its opset or an operator.
    """
    make, extra = ENGINES[engine]
    try:
        return make(os.fspath(path), threads, exact, names)
    except ImportError as error:
        raise ImportError(f"{engine} is missing: {install_command(extra)}") from error
    except Exception as error:  # each engine has its own classes
        raise ValueError(f"{engine} cannot read {path}: {error}") from error


def _onnxruntime(path: str, threads: int, exact: bool, names: Sequence[str] | None) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    loaded = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    read = [node.name for node in loaded.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [torch.from_numpy(y) for y in loaded.run(None, _by_name(inputs, names, read))]

    return run


def _openvino(path: str, threads: int, exact: bool, names: Sequence[str] | None) -> Run:
    import openvino

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    if exact:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    model = openvino.Core().compile_model(path, "CPU", settings)
    read, request = [node.any_name for node in model.inputs], model.create_infer_request()

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        outputs = request.infer(_by_name(inputs, names, read))
        return [torch.from_numpy(y) for y in outputs.values()]

    return run


def _by_name(
    inputs: Sequence[Tensor], names: Sequence[str] | None, read: Sequence[str]
) -> dict[str, Any]:
    """Return the array of each input that a graph reads; engines drop those that have no use."""
    named = dict(zip(names or read, inputs, strict=True))
    return {name: named[name].numpy() for name in read}


# By name: the function that loads a file, and the extra of fitsmall that installs the engine.
ENGINES: dict[str, tuple[Callable[[str, int, bool, Sequence[str] | None], Run], str]] = {
    "onnxruntime": (_onnxruntime, "onnx"),
    "OpenVINO": (_openvino, "openvino"),
}
