"""The tutorials run as they stand, from the first line to the last."""

import os
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md"))


def script(text: str) -> str:
    """All blocks of a page for one shell; neighbours in Python are one program."""
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    parts = []
    for language, group in groupby(blocks, key=lambda block: block[0]):
        code = "\n".join(code for _, code in group)
        parts.append(code if language == "sh" else f"python - <<'PROGRAM'\n{code}PROGRAM\n")
    return "\n".join(parts)


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs(page: Path, tmp_path: Path) -> None:
    for name in {"sweeps": ["plotly"], "curves": ["mlflow", "wandb"]}.get(page.stem, []):
        pytest.importorskip(name)
    binaries = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script(page.read_text())],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_there_is_one_for_each_kind_of_use() -> None:
    assert [page.stem for page in TUTORIALS] == ["callbacks", "curves", "sweeps"]
