"""Units: slices of a network that can only be removed together, and their removal."""

from fitsmall.compressors.units.removal import remove
from fitsmall.compressors.units.tracer import Unit, Units, units_of

__all__ = ["Unit", "Units", "remove", "units_of"]
