"""Files of any names and tensors, and what is in the way of a new one: a sentence, nothing lost."""

import contextlib
import os
import resource
import signal
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fitsmall.compressors import inspect, load, save
from fitsmall.compressors.file.atomic import replaced
from fitsmall.experiments.cli.main import main

ONE = {"w": torch.ones(3)}


@pytest.mark.parametrize(
    "shapes",
    [
        {"reduce": (3,), "expand": (), "factor_form": ()},
        {"a.reduce.weight": (3,), "a.expand.weight": (3,), "a.factor_form": ()},
        {"a.reduce.weight": (), "a.expand.weight": (4, 3), "a.factor_form": ()},
        {"a.reduce.weight": (2, 3), "a.expand.weight": (4, 3, 1), "a.factor_form": (7,)},
        {"a.input_quantizer.bits": ()},
        {"__metadata__": (3,)},
    ],
)
def test_tensors_with_names_of_other_meanings(shapes: dict[str, Any], tmp_path: Path) -> None:
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    save(tmp_path / "file", tensors)
    report = inspect(tmp_path / "file")
    assert [row.name for row in report.tensors] == [*shapes]
    assert report.changed == ()
    assert report.table()


def refused(words: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert told[0].startswith("fitsmall: ")
    assert told[1].startswith("Set HYDRA_FULL_ERROR=1")
    return told[0]


def test_outputs_that_are_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "w.safetensors", tmp_path / "folder"
    save(file, ONE)
    folder.mkdir()
    before = file.read_bytes()
    assert "is the compressed file itself: name another" in refused(["decompress", file], capsys)
    told = refused(["decompress", file, "-o", folder], capsys)
    assert "is no file that could be replaced" in told
    told = refused(["decompress", file, "-o", "/dev/null"], capsys)
    assert "is no file that could be replaced" in told
    told = refused(["decompress", file, "-o", tmp_path / "none" / "w"], capsys)
    assert "There is no folder" in told
    save(tmp_path / "odd", {"__metadata__": torch.ones(3)})
    told = refused(["decompress", tmp_path / "odd"], capsys)
    assert "safetensors cannot hold that name" in told
    save(tmp_path / "odd", {"c": torch.ones(3, dtype=torch.complex128)})
    told = refused(["decompress", tmp_path / "odd"], capsys)
    assert "'c', and safetensors cannot hold torch.complex128" in told
    save(tmp_path / "complex", {"c": torch.ones(3, dtype=torch.complex64)})
    main(["decompress", str(tmp_path / "complex")])
    assert load_file(tmp_path / "complex.safetensors")["c"].dtype == torch.complex64
    assert sorted(os.listdir(tmp_path)) == [
        "complex",
        "complex.safetensors",
        "folder",
        "odd",
        "w.safetensors",
    ]
    assert file.read_bytes() == before


def _unpack_on_a_full_disk(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    with open(folder / "err", "w") as errors, contextlib.redirect_stderr(errors):
        main(["decompress", str(folder / "file"), "-o", str(folder / "out")])


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    save(tmp_path / "file", {"w": torch.randn(20_000)})
    (tmp_path / "out").write_text("old")
    process = get_context("fork").Process(target=_unpack_on_a_full_disk, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode
    assert "out cannot be written: " in (tmp_path / "err").read_text()
    assert (tmp_path / "out").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["err", "file", "out"]


def test_names_are_printed_without_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "\x1b[31mred\n.fitsmall"
    assert "/\\x1b[31mred\\n.fitsmall'" in refused(["inspect", file], capsys)
    file.write_bytes(b"x" * 20)
    assert "/\\x1b[31mred .fitsmall is not" in refused(["inspect", file], capsys)
    save(file, ONE)
    main(["inspect", str(file)])
    main(["decompress", str(file)])
    printed = capsys.readouterr().out
    assert "\\x1b[31mred\\n.fitsmall: " in printed
    assert "\\x1b[31mred\\n.safetensors: 1 tensors" in printed
    assert "\x1b" not in printed


def test_permissions_stay(tmp_path: Path) -> None:
    file = tmp_path / "file"
    before = os.umask(0o027)
    try:
        save(file, ONE)
        assert file.stat().st_mode & 0o777 == 0o640
        file.chmod(0o604)
        save(file, ONE)
        assert file.stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(before)


class _Kill(torch.Tensor):
    """Kills its process when it is written."""

    def resolve_conj(self) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return self


def _save_and_die(file: Path) -> None:
    save(file, {"w": torch.ones(3), "last": torch.ones(3).as_subclass(_Kill)})


def test_scratch_files_of_a_killed_process_go_with_the_next_save(tmp_path: Path) -> None:
    file = tmp_path / "file[1]"
    save(file, ONE)
    process = get_context("fork").Process(target=_save_and_die, args=(file,))
    process.start()
    process.join()
    assert len(os.listdir(tmp_path)) == 2
    with replaced(file) as other:  # of a process that goes on
        assert len(os.listdir(tmp_path)) == 2
        save(file, {"w": torch.zeros(3)})
        assert len(os.listdir(tmp_path)) == 2
        assert Path(other.name).exists()
        other.write(file.read_bytes())
    assert os.listdir(tmp_path) == [file.name]
    assert not load(file)["w"].any()
