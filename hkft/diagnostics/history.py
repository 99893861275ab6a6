"""`predictions/history.jsonl`: what every row of probe and validation was worth at every look.

A line is a look: its step and, for each set, the rows' losses in the set's order, their items (learned tokens; null: one
each) and whether each was decided rightly (null: nothing is decided).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hkft.diagnostics.memorisation import History
from hkft.diagnostics.uncertainty import Losses


def losses_of(record: Mapping[str, Any]) -> Losses:
    """The losses of one set at one look."""
    each = np.array([np.nan if loss is None else loss for loss in record["losses"]], dtype=np.float64)
    items = np.ones(len(each), dtype=np.int64) if record["items"] is None else np.array(record["items"])
    return Losses(each * items, items)


def history_of(looks: Sequence[Mapping[str, Any]], split: str) -> History:
    """A set's rows at all looks."""
    records = [look[split] for look in looks]
    right = None if records[0]["right"] is None else np.array([record["right"] for record in records], dtype=bool)
    losses = np.array([losses_of(record).each for record in records])
    return History(np.array([look["step"] for look in looks]), losses, right)
