"""The provenance of a run: machine, software and date."""

import platform
import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["provenance"]


def provenance(device: torch.device) -> dict[str, str]:
    """Machine, software and date of a run that ends now.

    Args:
        device: Device that trained.

    Returns:
        ``machine``, the name of the processor or graphics card; ``software``, with versions;
        ``date``, as year-month-day in UTC.

    Example:
        >>> sorted(provenance(torch.device("cpu")))
        ['date', 'machine', 'software']
    """
    is_gpu = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device) if is_gpu else _processor(),
        "software": f"fitsmall {version('fitsmall')}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "date": datetime.now(UTC).date().isoformat(),
    }


def _processor() -> str:
    """Name of the processor, which Linux writes into a file and other systems tell Python."""
    listing = Path("/proc/cpuinfo")
    text = listing.read_text() if listing.is_file() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()
