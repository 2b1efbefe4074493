"""The tutorials run as they stand, from the first line to the last."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread

import pytest
from command import Command

TUTORIALS = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md"))

# Sends its words to a process that has imported torch and Lightning, and prints what they print.
FITSMALL = """#!{python} -S
import json, os, socket, sys
with socket.create_connection(("localhost", {port})) as server:
    request = sys.argv[1:], os.getcwd(), dict(os.environ)
    server.sendall(json.dumps(request).encode() + b"\\n")
    code, printed, errors = json.loads(server.makefile().read())
sys.stdout.write(printed)
sys.stderr.write(errors)
sys.exit(code)
"""


class Answer(StreamRequestHandler):
    def handle(self) -> None:
        words, folder, environment = json.loads(self.rfile.readline())
        done = Command(*words, folder=Path(folder), **environment).end()
        self.wfile.write(json.dumps([done.returncode, done.stdout, done.stderr]).encode())


@pytest.fixture
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a shell whose ``fitsmall`` begins at once."""
    folder = tmp_path_factory.mktemp("bin")
    with ThreadingTCPServer(("localhost", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        command = folder / "fitsmall"
        command.write_text(FITSMALL.format(python=sys.executable, port=server.server_address[1]))
        command.chmod(0o755)
        yield os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        server.shutdown()


def programs(text: str) -> list[tuple[str, str]]:
    """The blocks of a page by language; neighbours in one language are one program."""
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [
        (language, "\n".join(code for _, code in group))
        for language, group in groupby(blocks, key=lambda block: block[0])
    ]


@pytest.mark.long
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs(
    page: Path, shell: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {"sweeps": ["plotly"], "curves": ["mlflow", "wandb"]}.get(page.stem, []):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    for language, code in programs(page.read_text()):
        if language == "python":
            exec(code, {"__name__": "__main__"})  # noqa: S102
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            check=False,
            capture_output=True,
            text=True,
            env=shell,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_there_is_one_for_each_kind_of_use() -> None:
    assert [page.stem for page in TUTORIALS] == ["callbacks", "curves", "sweeps"]
