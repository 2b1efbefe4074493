"""Lightning callbacks that compress a network while it trains."""

from pressfit.callbacks.averaging import EMA
from pressfit.callbacks.checkpoint import CompressedCheckpoint
from pressfit.callbacks.method import Method, methods_of, plan_of
from pressfit.callbacks.monitor import CompressionMonitor
from pressfit.callbacks.plan import Plan
from pressfit.callbacks.pruning import GradualPruning
from pressfit.callbacks.resume import RandomState, ResumableLoader
from pressfit.callbacks.sharing import WeightSharing

__all__ = [
    "EMA",
    "CompressedCheckpoint",
    "CompressionMonitor",
    "GradualPruning",
    "Method",
    "Plan",
    "RandomState",
    "ResumableLoader",
    "WeightSharing",
    "methods_of",
    "plan_of",
]
