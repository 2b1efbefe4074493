"""Kernels that skip zeros, chosen for each layer by measurement."""

from fitsmall.compressors.kernels.choice import Choice, Choices, accelerate

__all__ = ["Choice", "Choices", "accelerate"]
