"""`predictions/history.jsonl`: what every row of probe and validation was worth at every look.

A line is a look: its step and, for each set, the rows' losses in the set's order, their items (learned tokens; null: one
each) and whether each was decided rightly (null: nothing is decided).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hkft.diagnostics.uncertainty import Losses


def losses_of(record: Mapping[str, Any]) -> Losses:
    """The losses of one set at one look."""
    each = np.array([np.nan if loss is None else loss for loss in record["losses"]], dtype=np.float64)
    items = np.ones(len(each), dtype=np.int64) if record["items"] is None else np.array(record["items"])
    return Losses(each * items, items)
