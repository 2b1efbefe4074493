"""Lightning callbacks that compress a network while it trains."""

from pressfit.callbacks.checkpoint import CompressedCheckpoint
from pressfit.callbacks.method import Method
from pressfit.callbacks.monitor import CompressionMonitor
from pressfit.callbacks.plan import Plan
from pressfit.callbacks.pruning import GradualPruning
from pressfit.callbacks.sharing import WeightSharing

__all__ = [
    "CompressedCheckpoint",
    "CompressionMonitor",
    "GradualPruning",
    "Method",
    "Plan",
    "WeightSharing",
]
