"""A merge on the terminal: where the model is, and how far it is from the adapted one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hkft.view.tables import table
from hkft.view.words import duration, memory


def show_merged(merged: Mapping[str, Any]) -> None:
    """What `Merged.as_dict` holds, as a table."""
    rows = [
        ["merged model", merged["path"]],
        ["dtype", merged["dtype"]],
        ["size", memory(merged["bytes"])],
        ["time", duration(merged["seconds"])],
    ]
    found = merged["verification"]
    if found is None:
        rows.append(["verified", "no (--no-verify)"])
    else:
        rows += [
            ["verified on", f"{found['rows']:,} rows of {found['on']}"],
            ["max |logit difference|", f"{found['max_logit_difference']:.3g} (tolerance {found['tolerance']:.3g})"],
            ["mean KL", None if found["mean_kl"] is None else f"{found['mean_kl']:.3g}"],
            ["same decisions", None if found["agreement"] is None else f"{found['agreement']:.2%}"],
        ]
    table(["merge", ""], rows)
