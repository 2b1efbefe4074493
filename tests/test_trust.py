"""The folder of a run is data, not code: whatever it names or holds, nothing of it is executed."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint

from fitsmall.callbacks import CompressedCheckpoint, GradualPruning
from fitsmall.compressors import save
from fitsmall.experiments.cli.main import main
from fitsmall.experiments.models.networks import MLP
from fitsmall.experiments.run import experiment
from fitsmall.experiments.run.trust import load_config, remember
from training import Net, fit, loader, trainer, validation

DATA = "data: {_target_: fitsmall.experiments.data.images.Digits, batch_size: 64, held_out: 270}\n"
NETWORK = "model: {_target_: fitsmall.experiments.models.networks.MLP, widths: [64, 10]%s}\n"


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def run_of(folder: Path, config: str) -> Path:
    (folder / "config.yaml").write_text(config)
    save(folder / "model.fitsmall", MLP([64, 10]).state_dict())
    (folder / "model.onnx").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.os.system",
        "torch.nn.modules.module.sys.exit",
        "fitsmall.experiments.data.sources.os.system",
        "torch.hub.load",
        "torch.load",
        "network.Network",
    ],
)
def test_a_run_that_was_not_made_here_calls_nothing(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network.py").write_text("open('called', 'w')")
    nested = NETWORK % f", extra: [{{_target_: {target}, command: touch called}}]"
    for number, config in enumerate((nested + DATA, f"model: {{_target_: {target}}}\n" + DATA)):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        run_of(folder, config)
        for words in (["ranks", folder], ["export", folder], ["bench", folder / "model.onnx"]):
            with pytest.raises(SystemExit):
                main([*map(str, words)])
            refused = f"names '{target}', which is code, and the run was not made here"
            assert refused in capsys.readouterr().err
    assert not (tmp_path / "called").exists()


def test_known_classes_trusted_packages_and_runs_made_here(tmp_path: Path) -> None:
    folder = run_of(tmp_path, NETWORK % "" + DATA)
    assert load_config(folder).model.widths == [64, 10]
    run_of(folder, "model: {_target_: mine.Network}\n" + DATA)
    with pytest.raises(ValueError, match=r"'mine.Network'.*if you know whose code .* --trust mine"):
        load_config(folder)
    assert load_config(folder, ["mine"]).model._target_ == "mine.Network"
    remember(folder)
    assert load_config(folder).model._target_ == "mine.Network"
    run_of(folder, "model: {_target_: other.Network}\n" + DATA)
    with pytest.raises(ValueError, match="was not made here"):
        load_config(folder)


def test_a_planted_checkpoint_is_not_unpickled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "fingerprint", lambda config: "planted")
    checkpoint = {"global_step": 0, "planted": Planted(tmp_path / "called")}
    torch.save(checkpoint, tmp_path / "resume-planted.ckpt")
    with pytest.raises(SystemExit):
        main(["train", "reference=false", f"hydra.run.dir={tmp_path}"])
    told = capsys.readouterr().err
    assert "resume-planted.ckpt holds more than tensors and numbers" in told
    assert "remove it to start again" in told
    assert not (tmp_path / "called").exists()


def test_the_best_weights_are_not_unpickled(tmp_path: Path) -> None:
    """A resumed checkpoint may name any file as that of the best weights."""

    class Swap(ModelCheckpoint):
        def on_train_end(self, *args: Any) -> None:
            self.best_model_path = str(tmp_path / "planted.ckpt")

    (tmp_path / "planted.ckpt").write_bytes(pickle.dumps(Planted(tmp_path / "called")))
    best = Swap(tmp_path, monitor="val/error")
    file = CompressedCheckpoint(tmp_path, weights="best")
    runner = trainer(tmp_path, GradualPruning(), best, file, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"planted.ckpt holds more than .* holds the last weights"):
        runner.fit(Net(), loader(), validation())
    assert not (tmp_path / "called").exists()

    class Hyper(Net):
        def __init__(self, path: Path) -> None:
            super().__init__()
            self.save_hyperparameters()

    best, file = (
        ModelCheckpoint(tmp_path, monitor="val/error"),
        CompressedCheckpoint(weights="best"),
    )
    with pytest.raises(MisconfigurationException, match=r"parameters of Hyper .*ignore="):
        fit(tmp_path, best, file, module=Hyper(tmp_path), enable_checkpointing=True)
