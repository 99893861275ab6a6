"""Numbers from numbers: the gap, the curve, the verdict. No console, no torch."""
