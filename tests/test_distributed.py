"""The guarantees on two processes, which `tests/distributed.py` runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import EVERY, RANKS


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_agree(strategy: str, tmp_path: Path) -> None:
    """Weights, latents, masks, clusters and the file have equal hashes on both; under FSDP2 also
    after resuming from sharded and full checkpoints."""
    script = Path(__file__).with_name("distributed.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(script), strategy, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert {name.rsplit(", ", 1)[0] if strategy == "fsdp" else name for name in first} == {
        *EVERY,
        RANKS,
    }
    if strategy == "ddp":  # under EMA the file holds the average, as the module does
        assert all(hashes["file"] == hashes["weights"] for hashes in first.values())
