"""Export to ONNX: integers that an engine runs, and that agree with the module."""

import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from exporting import GENERATOR, operators, quantized, worst
from onnx import numpy_helper
from torch import Tensor, nn

from fitsmall.callbacks import QuantizationAwareTraining
from fitsmall.compressors import Quantize, compress
from fitsmall.compressors.export.agreement import Agreement, agreement_of, sensitivity
from fitsmall.compressors.export.engines import ENGINES, Run, session
from fitsmall.compressors.export.onnx import export_onnx
from fitsmall.compressors.export.tracing import Arguments, outputs_of
from fitsmall.compressors.surgery.quantizers import attach_quantizer
from fitsmall.experiments.cli.main import main
from fitsmall.experiments.models.networks import ResNet
from training import IMAGES, Net, fit


class Up(nn.Module):
    """A transposed convolution, a norm after what two layers read, and one without factors."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(8, affine=False)
        self.up = nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 1)
        self.norm3 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm2(self.up(torch.relu(self.norm1(self.down(x))))))
        y = self.last(x)
        return self.norm3(y) + y


def test_a_residual_network_is_all_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32, generator=GENERATOR)
    net = quantized(ResNet(), (images,), 4)
    found = export_onnx(net, tmp_path / "net.onnx", images)
    kinds = operators(tmp_path / "net.onnx")
    assert len(found.integer) == kinds.count("Conv") + kinds.count("Gemm") == 20
    assert found.floating == ()
    assert kinds.count("DequantizeLinear") == 2 * kinds.count("QuantizeLinear") == 40
    assert "BatchNormalization" not in kinds
    assert worst(found).equal >= 0.99
    assert worst(found).difference < 1e-5
    assert found.bytes < 1.25 * 269_722


def test_norms_are_folded_where_nothing_else_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 3, 8, 8, generator=GENERATOR)
    found = export_onnx(quantized(Up(), (images,), 8), tmp_path / "up.onnx", images)
    kinds = operators(tmp_path / "up.onnx")
    assert found.integer == ("down", "up", "last")
    assert kinds.count("BatchNormalization") == 1
    assert worst(found).difference < 0.05


def test_what_was_trained_is_exported(tmp_path: Path) -> None:
    method = QuantizationAwareTraining(4, 4, overrides={"head": 8})
    module = fit(tmp_path, method, max_epochs=8)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = export_onnx(module, tmp_path / "net.onnx", IMAGES)
    assert found.integer == ("body.0", "head")
    assert worst(found).equal >= 0.99
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


def test_a_run_is_exported_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["callbacks=[quantize]", "callbacks.quantize.weight_bits=7", "reference=false"]
    words += ["trainer.max_epochs=2", "trainer.enable_progress_bar=false", "hydra.run.dir=run"]
    main(["train", *words])
    main(["export", "run", "--weight-bits", "7", "--engines", "onnxruntime", "OpenVINO"])
    told = capsys.readouterr().out
    assert "integer layers: 3 (net.fc1, net.fc2, net.fc3)" in told
    for engine in ("onnxruntime", "OpenVINO"):
        assert f"{engine} against the module: outputs differ by 0.0" in told
    assert told.count("of 360 examples") == told.count("100.00 % of their predictions are") == 2
    assert operators(tmp_path / "run" / "model.onnx").count("QuantizeLinear") == 3


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="Net has no layer with integer weights and quantized inputs to export: train",
    ):
        export_onnx(Net(), tmp_path / "net.onnx", IMAGES)
    module: Any = fit(tmp_path, QuantizationAwareTraining(start=0.0), max_epochs=1)
    with pytest.raises(ValueError, match="opset 9 has no scales for each channel: choose 13 or"):
        export_onnx(module, tmp_path / "net.onnx", IMAGES, opset=9)


def test_a_file_that_disagrees_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fit(tmp_path, QuantizationAwareTraining(), max_epochs=4)
    with monkeypatch.context() as patch:
        patch.setattr(
            "fitsmall.compressors.export.folding._fold", lambda layer, _: layer.bias.add_(9.0)
        )
        with pytest.raises(ValueError, match="was not written, since folding batch-norm"):
            export_onnx(module, tmp_path / "net.onnx", IMAGES)
    module.head.register_forward_hook(lambda _, inputs, output: output * float("nan"))
    with pytest.raises(ValueError, match="was not written, since"):
        export_onnx(module, tmp_path / "net.onnx", IMAGES)
    assert not (tmp_path / "net.onnx").exists()


class Odd(nn.Module):
    """Norms that cannot be folded: over another dimension, called twice, without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.norm1 = nn.BatchNorm1d(4)
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm2 = nn.BatchNorm2d(3)
        self.norm3 = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.linear(input=x)).unsqueeze(1)
        x = self.norm2(self.conv1(x))
        return self.norm3(self.norm2(self.conv2(x)))


def test_norms_that_cannot_be_folded_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4, 6, generator=GENERATOR)
    found = export_onnx(quantized(Odd(), (x,), 8), tmp_path / "odd.onnx", x)
    assert found.integer == ("linear", "conv1", "conv2")
    assert worst(found).difference < 0.05


class Pair(nn.Module):
    """Two inputs of different shapes, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(3, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.right(y), self.left(x)


def test_inputs_and_outputs_keep_their_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 6, generator=GENERATOR), torch.randn(16, 3, generator=GENERATOR)
    net = quantized(Pair(), (x, y), 8)
    found = export_onnx(net, tmp_path / "pair.onnx", (x, y))
    assert worst(found).difference < 0.01
    for engine in ENGINES:
        right, left = session(engine, tmp_path / "pair.onnx", threads=1)((x[:3], y[:3]))
        assert (right.shape, left.shape) == ((3, 4), (3, 5))


def test_the_remedy_for_an_engine_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 6, generator=GENERATOR)
    net = quantized(nn.Sequential(nn.Linear(6, 6)), (x,), 8)
    compress(net, Quantize(8))
    run, path = ENGINES["OpenVINO"][0], tmp_path / "net.onnx"

    def saturating(file: str, *settings: Any) -> Run:
        inner = run(file, *settings)
        weights = [numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer]
        if max(abs(w.astype(int)).max() for w in weights if w.dtype == "int8") <= 63:
            return inner
        return lambda inputs: [y.clamp_max(0.1) for y in inner(inputs)]

    monkeypatch.setitem(ENGINES, "OpenVINO", (saturating, "openvino"))
    monkeypatch.setattr("fitsmall.compressors.export.onnx.has_vnni", lambda: True)
    with pytest.raises(ValueError, match=r"OpenVINO outputs differ .*pass engines=\['onnxruntime'"):
        export_onnx(net, path, x)
    assert export_onnx(net, path, x, engines=["onnxruntime"]).agreement.keys() == {"onnxruntime"}
    monkeypatch.setattr("fitsmall.compressors.export.onnx.has_vnni", lambda: False)
    with pytest.raises(
        ValueError, match=r"no VNNI, .* export with weight_bits=7 \(--weight-bits 7"
    ):
        export_onnx(net, path, x)
    found = export_onnx(net, path, x, weight_bits=7)
    assert 1e-4 < worst(found).difference < 0.02
    monkeypatch.setattr("fitsmall.compressors.export.onnx.sensitivity", lambda *_: 1.0)
    assert worst(export_onnx(net, path, x)).difference > 0.2


def test_a_network_is_as_sensitive_as_its_rounding() -> None:
    x = torch.tensor([[0.0, 1.0], [0.5, 1.0]])  # of the levels 0, 1/3, 2/3 and 1
    net = nn.Sequential(nn.Linear(2, 1, bias=False))
    nn.init.ones_(net[0].weight)
    quantizer = attach_quantizer(net[0], 2)
    quantizer.log_scale.fill_(1 / 3).log_()
    quantizer.active = True
    arguments = Arguments.of(x)
    with torch.no_grad():
        expected = outputs_of(net, arguments)
        assert sensitivity(net, Arguments.of(x[:1]), [expected[0][:1]]) == 0.0
        assert sensitivity(net, arguments, expected) == pytest.approx(0.2)


def test_differences_are_compared_by_scale_and_predictions_by_margin() -> None:
    inf = float("inf")
    mine = torch.tensor([[4.0, 0.0, -inf], [0.5, 0.4, -inf]])
    found = agreement_of([mine, mine > 0], [mine + torch.tensor([[0.0], [0.2]]), mine > 0])
    assert found == Agreement(pytest.approx(0.05), 1.0, 1, 2)
    swapped = agreement_of([mine], [mine[:, [1, 0, 2]]])
    assert (swapped.difference, swapped.decided) == (1.0, 0)
    assert str(swapped).endswith("of 2 examples 0 have a margin above that")


def test_weights_of_seven_bits_never_saturate(tmp_path: Path) -> None:
    # Two products of 8 bits, 2 * 127 * 255, are more than the 16 bits in which processors without
    # VNNI add them.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 16, bias=False))
    net[0].weight.data.copy_(0.1 * net[0].weight.sign())
    x = 0.9 + 0.1 * torch.rand(16, 64, generator=GENERATOR)
    found = export_onnx(quantized(net, (x,), 8), tmp_path / "net.onnx", x)
    assert worst(found).difference < 1e-3


def test_an_engine_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fit(tmp_path, QuantizationAwareTraining(), max_epochs=4)
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = export_onnx(module, tmp_path / "net.onnx", IMAGES)
    assert found.agreement.keys() == {"onnxruntime"}
    told = found.table()
    assert "\nOpenVINO: not verified, pip install -e '.[openvino]'" in told
    with pytest.raises(ImportError, match=r"OpenVINO is missing: pip install -e '\.\[openvino"):
        session("OpenVINO", tmp_path / "net.onnx", threads=1)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_engine_cannot_read_is_an_error(engine: str, tmp_path: Path) -> None:
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])
    value = onnx.helper.make_tensor_value_info
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph([node], "net", [value("x", kind, [1])], [value("y", kind, [1])])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=rf"(?s)^{engine} cannot read .*NoSuchOperator"):
        session(engine, tmp_path / "net.onnx", threads=1)
