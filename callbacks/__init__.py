"""Lightning callbacks that compress a network while it trains."""

from fitsmall.callbacks.averaging import EMA
from fitsmall.callbacks.best import (
    EarlyStoppingOnceCompressed,
    ModelCheckpointOnceCompressed,
)
from fitsmall.callbacks.checkpoint import CompressedCheckpoint
from fitsmall.callbacks.compress import Compress
from fitsmall.callbacks.driver import plan_of, stages_of
from fitsmall.callbacks.guard import AccuracyGuard
from fitsmall.callbacks.loader import ResumableLoader
from fitsmall.callbacks.monitor import CompressionMonitor
from fitsmall.callbacks.pareto import ParetoCheckpoint
from fitsmall.callbacks.random_state import RandomState
from fitsmall.callbacks.stages import (
    ChannelPruning,
    GradualPruning,
    LearningCompression,
    QuantizationAwareTraining,
    RankLearning,
    SizeTarget,
    WeightSharing,
)
from fitsmall.compressors.training import Plan

__all__ = [
    "EMA",
    "AccuracyGuard",
    "ChannelPruning",
    "Compress",
    "CompressedCheckpoint",
    "CompressionMonitor",
    "EarlyStoppingOnceCompressed",
    "GradualPruning",
    "LearningCompression",
    "ModelCheckpointOnceCompressed",
    "ParetoCheckpoint",
    "Plan",
    "QuantizationAwareTraining",
    "RandomState",
    "RankLearning",
    "ResumableLoader",
    "SizeTarget",
    "WeightSharing",
    "plan_of",
    "stages_of",
]
