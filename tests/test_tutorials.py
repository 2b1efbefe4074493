"""The pages that a reader follows run as they stand, from the first line to the last."""

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

DOCS = Path(__file__).parents[1] / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
PAGES = [*TUTORIALS, DOCS / "training-loops.md", DOCS / "add-your-own.md"]
# Their commands run with fewer steps in test_cli.py, test_loggers.py and test_channels.py.
SLOW = {"sweeps", "curves", "channels"}

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


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and code of each block of a page that runs or is a file."""
    pattern = r"^```(sh|python|yaml)\n(.*?)^```"
    return re.findall(pattern, page.read_text(), re.DOTALL | re.MULTILINE)


def file_of(code: str) -> str | None:
    """The file that a block is, by its first line: `# folder/name.py`."""
    found = re.match(r"# (\S+\.(?:py|yaml))\n", code)
    return found[1] if found else None


def programs(page: Path) -> list[tuple[str, str]]:
    """The blocks of a page that run, by language; neighbours in one language are one program."""
    commands = [block for block in blocks(page) if not file_of(block[1])]
    return [
        (language, "\n".join(code for _, code in group))
        for language, group in groupby(commands, key=lambda block: block[0])
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of a reader, whose modules Python finds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - before:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


@pytest.mark.long
@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in PAGES],
    ids=lambda page: page.stem,
)
def test_a_page_runs(page: Path, shell: dict[str, str], folder: Path) -> None:
    for name in {"sweeps": ["plotly"], "curves": ["mlflow", "wandb"]}.get(page.stem, []):
        pytest.importorskip(name)
    for _, code in blocks(page):
        if name := file_of(code):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(code.partition("\n")[2])
    for language, code in programs(page):
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


def test_there_is_a_tutorial_for_each_kind_of_use() -> None:
    assert [page.stem for page in TUTORIALS] == [
        "callbacks",
        "channels",
        "compress",
        "curves",
        "sweeps",
    ]


def test_what_a_user_adds_is_short() -> None:
    """A criterion, a structure and so on take no more lines than the page says, imports and
    docstrings included."""
    most = {"taylor": 10, "kernels": 20, "powers": 40, "spread": 10, "late": 10}
    files = {file_of(code): code for _, code in blocks(DOCS / "add-your-own.md")}
    for name, limit in most.items():
        lines = files[f"{name}.py"].rstrip("\n").split("\n")[1:]
        assert len(lines) <= limit, f"{name}.py has {len(lines)} lines"
