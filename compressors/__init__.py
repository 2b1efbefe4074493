"""Compression as projection, in pure torch: codes, projections, criteria, allocations, the file."""

from fitsmall.compressors.allocation import ALLOCATIONS, Allocation
from fitsmall.compressors.cluster import KMeans
from fitsmall.compressors.codes import Code, Dense, Integer, Lookup, Sparse, Sum
from fitsmall.compressors.criteria import CRITERIA, STATISTICS, Criterion
from fitsmall.compressors.dtypes import same_bits
from fitsmall.compressors.exact import exact
from fitsmall.compressors.file.reader import load, read
from fitsmall.compressors.file.report import Report, TensorReport, inspect
from fitsmall.compressors.file.writer import save
from fitsmall.compressors.lowrank import Factors, Truncate
from fitsmall.compressors.oneshot import compress, restore
from fitsmall.compressors.projections import Additive, Chain, Projection
from fitsmall.compressors.prune import TopK
from fitsmall.compressors.quantize import Quantize
from fitsmall.compressors.rank_choice import Rank
from fitsmall.compressors.schedules import (
    Cosine,
    Cubic,
    Exponential,
    Iterative,
    LinearRamp,
    OneShot,
    Schedule,
)
from fitsmall.compressors.select import Selection, select
from fitsmall.compressors.structures import Block, NofM, Structure, Unstructured
from fitsmall.compressors.surgery.factors import Factored, factorize
from fitsmall.compressors.surgery.kinds import to_plain
from fitsmall.compressors.surgery.quantizers import ActivationQuantizer

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "STATISTICS",
    "ActivationQuantizer",
    "Additive",
    "Allocation",
    "Block",
    "Chain",
    "Code",
    "Cosine",
    "Criterion",
    "Cubic",
    "Dense",
    "Exponential",
    "Factored",
    "Factors",
    "Integer",
    "Iterative",
    "KMeans",
    "LinearRamp",
    "Lookup",
    "NofM",
    "OneShot",
    "Projection",
    "Quantize",
    "Rank",
    "Report",
    "Schedule",
    "Selection",
    "Sparse",
    "Structure",
    "Sum",
    "TensorReport",
    "TopK",
    "Truncate",
    "Unstructured",
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
    "to_plain",
]
