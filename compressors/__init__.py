"""Compression as projection, in pure torch: codes, projections, criteria, allocations, the file."""

from fitsmall.compressors.choices.allocation import ALLOCATIONS, Allocation
from fitsmall.compressors.choices.criteria import CRITERIA, STATISTICS, Criterion
from fitsmall.compressors.choices.rank_choice import Rank
from fitsmall.compressors.choices.schedules import (
    Cosine,
    Cubic,
    Exponential,
    Iterative,
    LinearRamp,
    OneShot,
    Schedule,
)
from fitsmall.compressors.codes.code import Code, Dense, Integer, Lookup, Sparse, Sum
from fitsmall.compressors.codes.dtypes import same_bits
from fitsmall.compressors.codes.exact import exact
from fitsmall.compressors.file.reader import load, read
from fitsmall.compressors.file.report import Report, TensorReport, inspect
from fitsmall.compressors.file.writer import save
from fitsmall.compressors.oneshot import compress, restore
from fitsmall.compressors.projections.cluster import KMeans
from fitsmall.compressors.projections.lowrank import Factors, Truncate
from fitsmall.compressors.projections.projection import Additive, Chain, Projection
from fitsmall.compressors.projections.prune import TopK
from fitsmall.compressors.projections.quantize import Quantize
from fitsmall.compressors.projections.structures import Block, NofM, Structure, Unstructured
from fitsmall.compressors.select import Selection, select
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
