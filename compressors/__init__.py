"""Compression as projection, in pure torch: codes, projections, criteria, allocations, the file."""

from pressfit.compressors.allocation import ALLOCATIONS
from pressfit.compressors.artifact import load, read, save
from pressfit.compressors.cluster import KMeans
from pressfit.compressors.codes import Code, Dense, Integer, Lookup, Sparse, Sum, exact, same_bits
from pressfit.compressors.compress import compress, restore
from pressfit.compressors.criteria import CRITERIA
from pressfit.compressors.factorize import Factored, factorize
from pressfit.compressors.lowrank import Factors, Rank, Truncate
from pressfit.compressors.projections import Additive, Chain, Projection
from pressfit.compressors.prune import TopK
from pressfit.compressors.quantize import ActivationQuantizer, Quantize
from pressfit.compressors.report import Report, TensorReport, inspect
from pressfit.compressors.schedules import (
    Cosine,
    Cubic,
    Exponential,
    Iterative,
    Linear,
    OneShot,
    Schedule,
)
from pressfit.compressors.select import Selection, select

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "ActivationQuantizer",
    "Additive",
    "Chain",
    "Code",
    "Cosine",
    "Cubic",
    "Dense",
    "Exponential",
    "Factored",
    "Factors",
    "Integer",
    "Iterative",
    "KMeans",
    "Linear",
    "Lookup",
    "OneShot",
    "Projection",
    "Quantize",
    "Rank",
    "Report",
    "Schedule",
    "Selection",
    "Sparse",
    "Sum",
    "TensorReport",
    "TopK",
    "Truncate",
    "compress",
    "exact",
    "factorize",
    "inspect",
    "load",
    "read",
    "restore",
    "same_bits",
    "save",
    "select",
]
