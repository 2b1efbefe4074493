"""The guarantees on two processes, which `tests/distributed.py` runs."""

import json
import socket
from multiprocessing import get_context
from pathlib import Path

import pytest
from distributed import CHANNELS, EVERY, RANKS, main
from torch.multiprocessing import start_processes

# Processes begin where torch and Lightning are imported.
get_context("forkserver").set_forkserver_preload(["fitsmall.callbacks"])


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_agree(strategy: str, tmp_path: Path) -> None:
    """Weights, latents, masks, clusters and the file have equal hashes on both; under FSDP2 also
    after resuming from sharded and full checkpoints."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    start_processes(main, (strategy, tmp_path, port), nprocs=2, start_method="forkserver")
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first.keys() == {*EVERY, RANKS, *([CHANNELS] if strategy == "ddp" else [])}
    if strategy == "ddp":  # under EMA the file holds the average, as the module does
        assert all(hashes["file"] == hashes["weights"] for hashes in first.values())
