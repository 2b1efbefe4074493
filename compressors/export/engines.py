"""Engines that run an ONNX file on the CPU."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fitsmall.compressors.extras import install_command

__all__ = ["ENGINES", "Run", "session"]

Run = Callable[[Sequence[Tensor]], list[Tensor]]


def session(engine: str, path: str | os.PathLike[str], threads: int, exact: bool = True) -> Run:
    """Load an ONNX file into an engine, and return a function from inputs to outputs.

    Args:
        engine: One of :data:`ENGINES`.
        path: The file.
        threads: Number of threads.
        exact: Whether floats stay float32; otherwise OpenVINO rounds them to bfloat16 if the
            processor has instructions for it, which is its default.

    Raises:
        ImportError: The engine is not installed.
        ValueError: The engine cannot read the file, its opset or an operator.
    """
    make, extra = ENGINES[engine]
    try:
        return make(os.fspath(path), threads, exact)
    except ImportError as error:
        raise ImportError(f"{engine} is missing: {install_command(extra)}") from error
    except Exception as error:  # each engine has its own classes
        raise ValueError(f"{engine} cannot read {path}: {error}") from error


def _onnxruntime(path: str, threads: int, exact: bool) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    loaded = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in loaded.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(y) for y in loaded.run(None, feed)]

    return run


def _openvino(path: str, threads: int, exact: bool) -> Run:
    import openvino

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    if exact:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        outputs = request.infer([x.numpy() for x in inputs])
        return [torch.from_numpy(y) for y in outputs.values()]

    return run


# By name: the function that loads a file, and the extra of fitsmall that installs the engine.
ENGINES: dict[str, tuple[Callable[[str, int, bool], Run], str]] = {
    "onnxruntime": (_onnxruntime, "onnx"),
    "OpenVINO": (_openvino, "openvino"),
}
