"""Lightning callbacks that compress a network while it trains."""

from fitsmall.callbacks.averaging import EMA
from fitsmall.callbacks.best import (
    EarlyStoppingOnceCompressed,
    ModelCheckpointOnceCompressed,
)
from fitsmall.callbacks.checkpoint import CompressedCheckpoint
from fitsmall.callbacks.guard import AccuracyGuard
from fitsmall.callbacks.method import Method, methods_of, plan_of
from fitsmall.callbacks.monitor import CompressionMonitor
from fitsmall.callbacks.pareto import ParetoCheckpoint
from fitsmall.callbacks.plan import Plan
from fitsmall.callbacks.proximal import LearningCompression
from fitsmall.callbacks.pruning import GradualPruning
from fitsmall.callbacks.quantization import QuantizationAwareTraining
from fitsmall.callbacks.rank import RankLearning
from fitsmall.callbacks.resume import RandomState, ResumableLoader
from fitsmall.callbacks.sharing import WeightSharing

__all__ = [
    "EMA",
    "AccuracyGuard",
    "CompressedCheckpoint",
    "CompressionMonitor",
    "EarlyStoppingOnceCompressed",
    "GradualPruning",
    "LearningCompression",
    "Method",
    "ModelCheckpointOnceCompressed",
    "ParetoCheckpoint",
    "Plan",
    "QuantizationAwareTraining",
    "RandomState",
    "RankLearning",
    "ResumableLoader",
    "WeightSharing",
    "methods_of",
    "plan_of",
]
