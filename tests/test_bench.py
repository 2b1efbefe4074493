"""The table of engines: what runs is timed, what is missing is named."""

import re
from pathlib import Path

import pytest
import torch

from fitsmall.compressors import Quantize, compress, load, save
from fitsmall.compressors.export.onnx import export_onnx
from fitsmall.compressors.surgery.quantizers import attach_quantizer
from fitsmall.experiments.cli import sparse_bench
from fitsmall.experiments.cli.main import main
from fitsmall.experiments.models.networks import MLP

CONFIG = """
model: {_target_: fitsmall.experiments.models.networks.MLP, widths: [64, 30, 10]}
data: {_target_: fitsmall.experiments.data.images.Digits, batch_size: 64, held_out: 270}
"""

Rows = dict[tuple[str, str], list[str]]

ROWS = [
    ("eager", "fp32"),
    ("compiled", "fp32"),
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("OpenVINO", "fp32"),
    ("OpenVINO", "int8"),
]
if "bf16" in Path("/proc/cpuinfo").read_text():
    ROWS.insert(-1, ("OpenVINO", "bf16"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run, with what it exported."""
    torch.manual_seed(0)
    net, images = MLP([64, 30, 10]), torch.rand(32, 1, 8, 8)
    quantizers = [attach_quantizer(layer, bits=8) for layer in net]
    for quantizer in quantizers:
        quantizer.observing = True
    net(images)
    for quantizer in quantizers:
        quantizer.commit()
        quantizer.observing, quantizer.active = False, True
    compress(net, {"*": Quantize(7)})
    save(tmp_path / "model.fitsmall", net.state_dict())
    (tmp_path / "config.yaml").write_text(CONFIG)
    export_onnx(net, tmp_path / "model.onnx", images)
    return tmp_path


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Rows, str]:
    """The numbers of each engine and precision in the table, and all that was printed."""
    main(words)
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")] for line in printed.splitlines()]
    return {(row[0], row[1]): row[2:] for row in rows if len(row) > 1}, printed


def test_every_engine_is_timed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "model.onnx"
    found, _ = told(["bench", str(file), "--batch", "4", "--rounds", "2"], capsys)
    assert [*found] == ROWS
    for (_, precision), (latency, rate, _, size, ratio, _) in found.items():
        assert float(rate.replace(",", "")) == pytest.approx(4000 / float(latency), rel=0.5)
        if precision == "int8":
            assert size == f"{file.stat().st_size:,}"
        else:
            assert int(size.replace(",", "")) > 4 * (64 * 30 + 30 * 10)
        assert precision != "fp32" or ratio == "1.00"
    assert found["eager", "fp32"][-1] == "1.00"


@pytest.mark.slow
def test_an_engine_that_is_missing_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Where the processes of the rows look first.
    (run / "openvino.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(run)
    found, printed = told(["bench", str(run / "model.onnx"), "--rounds", "1"], capsys)
    assert [*found] == ROWS
    missing = [row for row, numbers in found.items() if numbers[0] == "failed"]
    assert missing == [row for row in ROWS if row[0] == "OpenVINO"]
    assert "OpenVINO is missing: pip install -e '.[openvino]'" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("model.onnx", "write it by fitsmall export RUN"),
        ("config.yaml", "FILE must be in the folder of its run"),
        ("model.fitsmall", "FILE must be in the folder of its run"),
    ],
)
def test_what_a_run_must_hold(
    missing: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in {"model.onnx", "config.yaml", "model.fitsmall"} - {missing}:
        (tmp_path / name).touch()
    with pytest.raises(SystemExit):
        main(["bench", str(tmp_path / "model.onnx")])
    assert f"fitsmall: {tmp_path / missing} is no file: {remedy}" in capsys.readouterr().err


def test_numbers_are_positive(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", str(run / "model.onnx"), "--rounds", "0"])
    assert "batch, threads and rounds must be 1 or more; got 8, 1 and 0" in capsys.readouterr().err


def test_zeros_that_are_skipped_are_timed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run without an exported file, against OpenVINO in float32 and in integers."""
    state = load(run / "model.fitsmall")
    state["fc1.weight"][:] = 0
    save(run / "model.fitsmall", state)
    words = ["bench", "--sparse", str(run / "model.fitsmall"), "--batch", "128", "--rounds", "2"]
    _, printed = told(words, capsys)
    head, first, second, total, _, *rivals = printed.splitlines()
    assert re.fullmatch(
        r"layer +weight +zeros +input +dense, ms +CSR, ms +BSR 4x1, ms +kernel", head
    )
    assert re.match(r"fc1 +30x64 +100\.0% +128x64( +0\.\d{3}){2}", first)
    assert second.startswith("fc2    10x30")
    assert "times as fast; threads: 1" in total
    names = ["torch, dense", "torch, accelerated", "OpenVINO, float32", "OpenVINO, int8"]
    assert [line.split("  ")[0].strip() for line in rivals] == names
    assert all(re.search(r" ms; accelerated is \d+\.\d\d times as fast", line) for line in rivals)
    assert "1.00 times as fast (1.00 to 1.00)" in rivals[1]

    def missing(*_: object) -> None:
        raise ImportError("OpenVINO is missing: install it")

    for write in ("write_onnx", "_write_integers"):
        monkeypatch.setattr(sparse_bench, write, missing)
    assert "OpenVINO, int8: not measured. OpenVINO is missing: install it" in told(words, capsys)[1]
    with pytest.raises(SystemExit):
        main([*words, "--threads", "0"])
    assert "threads and rounds must be 1 or more; got 128, 0 and 2" in capsys.readouterr().err
