"""On what a run was made, with what, and when."""

import platform
import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["provenance"]


def provenance(device: torch.device) -> dict[str, str]:
    """For the record of a run that ends now.

    Args:
        device: What has computed it.

    Returns:
        ``machine``, the name of the processor or graphics card; ``software``, with versions;
        ``date``, as year-month-day in UTC.

    Example:
        >>> sorted(provenance(torch.device("cpu")))
        ['date', 'machine', 'software']
    """
    card = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device) if card else _processor(),
        "software": f"fitsmall {version('fitsmall')}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "date": datetime.now(UTC).date().isoformat(),
    }


def _processor() -> str:
    """Linux names the model in a file; elsewhere the standard library can."""
    listing = Path("/proc/cpuinfo")
    text = listing.read_text() if listing.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
