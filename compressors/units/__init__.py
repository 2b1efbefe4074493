"""Units: slices of a network that can only be removed together, and their removal."""

from fitsmall.compressors.units.cut import Cut
from fitsmall.compressors.units.removal import find_cut, removable, remove
from fitsmall.compressors.units.tracer import Unit, Units, units_of

__all__ = ["Cut", "Unit", "Units", "find_cut", "removable", "remove", "units_of"]
