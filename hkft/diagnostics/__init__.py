"""Numbers from numbers: the gap, the curve, the verdict. No console, no torch."""

from hkft.diagnostics.curve import Point, from_records
from hkft.diagnostics.gap import LOWER_IS_BETTER, gap, main_metric

__all__ = ["LOWER_IS_BETTER", "Point", "from_records", "gap", "main_metric"]
