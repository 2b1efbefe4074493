"""Compression during training, for any loop: pure torch, without Lightning."""

from fitsmall.compressors.training.clock import Clock, Window
from fitsmall.compressors.training.methods.channels import ChannelPruning
from fitsmall.compressors.training.methods.proximal import LearningCompression, Proximal
from fitsmall.compressors.training.methods.pruning import GradualPruning
from fitsmall.compressors.training.methods.quantization import QuantizationAwareTraining
from fitsmall.compressors.training.methods.ranks import RankLearning
from fitsmall.compressors.training.methods.sharing import WeightSharing
from fitsmall.compressors.training.methods.size_target import SizeTarget
from fitsmall.compressors.training.plan import Plan
from fitsmall.compressors.training.stage import Stage

__all__ = [
    "ChannelPruning",
    "Clock",
    "GradualPruning",
    "LearningCompression",
    "Plan",
    "Proximal",
    "QuantizationAwareTraining",
    "RankLearning",
    "SizeTarget",
    "Stage",
    "WeightSharing",
    "Window",
]
