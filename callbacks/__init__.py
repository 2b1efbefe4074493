"""Lightning callbacks that compress a network while it trains."""

from pressfit.callbacks.averaging import EMA
from pressfit.callbacks.best import (
    EarlyStoppingOnceCompressed,
    ModelCheckpointOnceCompressed,
)
from pressfit.callbacks.checkpoint import CompressedCheckpoint
from pressfit.callbacks.guard import AccuracyGuard
from pressfit.callbacks.method import Method, methods_of, plan_of
from pressfit.callbacks.monitor import CompressionMonitor
from pressfit.callbacks.pareto import ParetoCheckpoint
from pressfit.callbacks.plan import Plan
from pressfit.callbacks.proximal import LearningCompression
from pressfit.callbacks.pruning import GradualPruning
from pressfit.callbacks.quantization import QuantizationAwareTraining
from pressfit.callbacks.rank import RankLearning
from pressfit.callbacks.resume import RandomState, ResumableLoader
from pressfit.callbacks.sharing import WeightSharing

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
