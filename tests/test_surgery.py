"""Surgery: what training changed is told by the file, and put back whole or not at all."""

import copy
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fitsmall.compressors import (
    Factored,
    Rank,
    TopK,
    Truncate,
    compress,
    factorize,
    inspect,
    load,
    restore,
    save,
    to_plain,
)
from fitsmall.compressors.surgery.kinds import changes, surgeries
from fitsmall.compressors.surgery.protocol import layout_of
from fitsmall.compressors.surgery.quantizers import InputQuantizers
from fitsmall.experiments.cli.process_memory import peak_memory, reset_peak_memory

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 10),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2),
    "conv3d": lambda: nn.Conv3d(4, 6, 3, padding=1),
}


class Named(nn.Module):
    """An honest module with layers called as the two factors are."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(20, 3, bias=False), nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.reduce(x))


class Reads(nn.Module):
    """A module that reads its layers' settings, as Whisper's encoder reads a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) % self.conv.stride[0] == 0
        return self.conv(x)


def changed(net: nn.Module) -> nn.Module:
    """A copy of low rank, with inputs that are quantized."""
    factorize(net, {"0.weight": Rank("channels", 2)})
    InputQuantizers({"0.reduce": 4, "2": 8}).apply(net)
    return net


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 5))


def test_all_surgeries_are_put_back(tmp_path: Path) -> None:
    net, path = changed(plain()), tmp_path / "net.fitsmall"
    save(path, net.state_dict())
    restored = restore(plain(), path)
    assert str(restored) == str(net)
    assert torch.equal(restored(torch.ones(3, 12)), net(torch.ones(3, 12)))
    # Also into a module that is changed already.
    assert restore(restored, path) is restored
    assert [type(surgery).__name__ for surgery in surgeries(layout_of(net.state_dict()))] == [
        "Factorization",
        "InputQuantizers",
    ]
    report = inspect(path)
    assert "changed layers: 0: rank 2 (channels); 0.reduce: inputs" in report.table()
    assert report.changed == tuple(changes(layout_of(net.state_dict())))


def test_a_network_and_the_module_that_wraps_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As LightningModules wrap networks; all surgeries included."""

    def wrapped(net: nn.Module) -> nn.Module:
        wrapper = nn.Module()
        wrapper.model = nn.Module()
        wrapper.model.net = net
        return wrapper

    caplog.set_level("INFO", "fitsmall")
    net, outer, inner = changed(plain()), tmp_path / "outer", tmp_path / "inner"
    save(inner, net.state_dict())
    save(outer, wrapped(net).state_dict())
    bare, around = restore(plain(), outer), restore(wrapped(plain()), inner)
    assert "wraps Sequential as 'model.net'" in caplog.messages[0]
    assert "has one in 'model.net'" in caplog.messages[1]
    for restored in (bare, around.model.net):
        assert str(restored) == str(net)
        assert torch.equal(restored(torch.ones(3, 12)), net(torch.ones(3, 12)))
    # What fits only in part is refused, and leaves the module as it is.
    mixed = wrapped(plain())
    mixed.other = nn.Linear(2, 2)
    before = mixed.other.weight.clone()
    with pytest.raises(ValueError, match="does not fit Module"):
        restore(mixed, inner)
    assert torch.equal(mixed.other.weight, before)


def test_other_libraries_get_plain_weights(tmp_path: Path) -> None:
    """Hugging Face's save_pretrained loses what is changed, and says so unless it gets them."""

    class Pretrained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, padding=1)
            self.body = plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.conv(x).mean((2, 3)).repeat(1, 2))

        def save_pretrained(self, path: Path, state_dict: dict[str, Tensor] | None = None) -> None:
            torch.save(state_dict or self.state_dict(), path)

    net, path, images = Pretrained(), tmp_path / "net.pt", torch.randn(3, 4, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.save_pretrained(path)
        factorize(net, {"conv.weight": Rank("separable", 3), "body.0.weight": Rank("channels", 2)})
        net.save_pretrained(path, state_dict=to_plain(net))
        net.state_dict()
    other = Pretrained()
    other.load_state_dict(torch.load(path))
    torch.testing.assert_close(other(images), net(images))
    InputQuantizers({"body.0.reduce": 4, "body.2": 8}).apply(net)
    net.body[2].input_quantizer.active = True
    with pytest.warns(UserWarning, match=r"does not round inputs, .* 1 layers .*\(body\.2\)"):
        other.load_state_dict(to_plain(net))
    torch.testing.assert_close(other.conv(images), net.conv(images))
    for changed_one in (net, copy.deepcopy(net).body):
        with pytest.warns(UserWarning, match="layers of low rank initialised again; use save"):
            Pretrained.save_pretrained(changed_one, path)


def test_files_without_marks_are_put_back(tmp_path: Path) -> None:
    """Files of the project's first name told of factors and quantizers by other names."""
    net, path = changed(plain()), tmp_path / "net.pressfit"
    old = {
        name.replace("log_scale", "log_step"): tensor
        for name, tensor in net.state_dict().items()
        if not name.endswith("factor_form")
    }
    save(path, old)
    restored = restore(plain(), path)
    assert str(restored) == str(net)
    assert torch.equal(restored(torch.ones(3, 12)), net(torch.ones(3, 12)))


def test_sums_and_products_are_put_back(tmp_path: Path) -> None:
    net, path = plain(), tmp_path / "net.fitsmall"
    codes = compress(net, {"0": Truncate(2) + TopK(0.9), "2": Truncate(3)})
    save(path, {**net.state_dict(), **codes})
    restored = restore(plain(), path)
    for name, tensor in net.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor)


def test_honest_names_are_no_factors(tmp_path: Path) -> None:
    net, path = nn.Sequential(Named()), tmp_path / "net.fitsmall"
    save(path, net.state_dict())
    assert not surgeries(layout_of(net.state_dict()))
    assert inspect(path).bytes_dense == sum(t.nbytes for t in net.state_dict().values())
    restored = restore(nn.Sequential(Named()), path)
    assert torch.equal(restored(torch.ones(20)), net(torch.ones(20)))


def test_a_buffer_of_that_name_is_no_mark(tmp_path: Path) -> None:
    net, path = nn.Sequential(nn.Linear(3, 2)), tmp_path / "net.fitsmall"
    net[0].register_buffer("factor_form", torch.ones(2))
    save(path, net.state_dict())
    assert inspect(path).changed == ()
    restored = nn.Sequential(nn.Linear(3, 2))
    restored[0].register_buffer("factor_form", torch.zeros(2))
    assert torch.equal(restore(restored, path)[0].factor_form, torch.ones(2))


def test_modules_that_no_file_can_be_put_into(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"count": 1}

    path = tmp_path / "net.fitsmall"
    save(path, nn.Linear(3, 2).state_dict())
    with pytest.raises(TypeError, match="_extra_state of Extra is a dict, and a file"):
        restore(Extra(3, 2), path)
    with pytest.raises(ValueError, match="is not initialised: run the module once"):
        restore(nn.LazyLinear(2), path)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_a_replaced_layer_answers_to_what_others_read(make: Callable[[], nn.Module]) -> None:
    layer = make()
    net = nn.Sequential(layer)
    factorize(net, {"0.weight": Rank("channels", 2)})
    assert isinstance(net[0], Factored)
    for name, value in vars(layer).items():
        if not name.startswith("_"):
            assert getattr(net[0], name) == value, name


def test_a_module_may_read_the_settings_of_a_replaced_layer() -> None:
    net = Reads()
    factorize(net, {"conv.weight": Rank("channels", 2)})
    assert net(torch.ones(2, 4, 8)).shape == (2, 6, 4)


# Files that lie.


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


STATE = {name: tensor.clone() for name, tensor in changed(plain()).state_dict().items()}
LIES: dict[str, tuple[dict[str, Tensor], str]] = {
    "no second factor": (without(STATE, "0.expand.weight"), "no layer '0.reduce'"),
    "a rank that is no rank": (
        STATE | {"0.reduce.weight": torch.ones(11, 12), "0.expand.weight": torch.ones(10, 11)},
        "0 can have a rank from 1 to 10, and not 11",
    ),
    "no rank at all": (
        STATE | {"0.reduce.weight": torch.ones(0, 12), "0.expand.weight": torch.ones(10, 0)},
        "0 can have a rank from 1 to 10, and not 0",
    ),
    "factors of another layer": (
        STATE | {"0.reduce.weight": torch.ones(2, 13)},
        r"0.reduce.weight has shape \(2, 13\), the module wants \(2, 12\)",
    ),
    "a form of another layer": (
        STATE | {"0.expand.weight": torch.ones(10, 2, 3, 1), "0.reduce.weight": torch.ones(2, 12)},
        "no layer '0' that can be factored in the form 'separable'",
    ),
    "a mark of another form": (
        STATE | {"0.factor_form": torch.tensor(1, dtype=torch.uint8)},
        "0.factor_form does not fit the shapes",
    ),
    "factors of nothing": (
        {name.replace("0.", "9.", 1): tensor for name, tensor in STATE.items()},
        "no layer '9' that can",
    ),
    "a quantizer of nothing": (
        STATE | {"1.input_quantizer.bits": torch.tensor(4, dtype=torch.uint8)},
        "no layer '1' whose input can be quantized",
    ),
    "bits that are none": (
        STATE | {"2.input_quantizer.bits": torch.tensor(77, dtype=torch.uint8)},
        "the input of 2 has 77 bits",
    ),
    "a tensor too many": (STATE | {"more": torch.ones(3)}, "more is not in the module"),
    "a tensor too few": (without(STATE, "2.bias"), "2.bias is missing"),
    "another dtype": (STATE | {"2.bias": torch.ones(5).double()}, "2.bias is torch.float64"),
}


@pytest.mark.parametrize(("tensors", "message"), LIES.values(), ids=LIES.keys())
def test_a_file_that_does_not_fit_leaves_the_module_as_it_is(
    tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    path, net = tmp_path / "net.fitsmall", plain()
    save(path, tensors)
    before = str(net), {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        restore(net, path)
    assert str(net) == before[0]
    after = net.state_dict()
    assert after.keys() == before[1].keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before[1].items())


@pytest.mark.parametrize("name", ["0.reduce.weight", "0.weight"])
def test_a_few_bytes_take_no_memory(name: str, tmp_path: Path) -> None:
    """A few hundred bytes ask for 64 MB of zeros; the module's own sizes say no."""
    path, net = tmp_path / "net.fitsmall", plain()
    assert save(path, {**without(STATE, name), name: torch.zeros(2000, 4000).double()}) < 2000
    before = reset_peak_memory()
    with pytest.raises(ValueError, match="does not fit Sequential"):
        restore(net, path)
    assert peak_memory() - before < 2**23
    assert [type(layer) for layer in net] == [nn.Linear, nn.ReLU, nn.Linear]


def test_damage_in_a_payload_leaves_the_module_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "net.fitsmall"
    save(path, STATE)
    content = path.read_bytes()
    for position in itertools.islice(itertools.count(6, 7), 40):
        damaged = bytearray(content)
        damaged[position % len(content)] ^= 0x55
        path.write_bytes(damaged)
        net = plain()
        with pytest.raises(ValueError, match=r"damaged|truncated|fit"):
            restore(net, path)
        assert [type(layer) for layer in net] == [nn.Linear, nn.ReLU, nn.Linear]
    path.write_bytes(content)
    assert load(path).keys() == STATE.keys()
