"""A merge on the terminal: where the model is, and how far it is from the adapted one."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from hkft.view.console import output, say
from hkft.view.tables import table
from hkft.view.words import duration, memory

BASES = {"full": "full-precision base", "dequantised": "dequantised base"}


def show_merged(merged: Mapping[str, Any]) -> None:
    """What `Merged.as_dict` holds, as a table, and what may come next."""
    rows = [
        ["merged model", merged["path"]],
        ["dtype", merged["dtype"]],
        ["size", memory(merged["bytes"])],
        ["time", duration(merged["seconds"])],
    ]
    if merged.get("url"):
        rows.append(["pushed to", merged["url"]])
    found = merged["verification"]
    if found is None:
        rows.append(["verified", "no (--no-verify)"])
    else:
        rows += [
            ["verified on", f"{found['rows']:,} rows of {found['on']}"],
            ["max |logit difference|", f"{found['max_logit_difference']:.3g} (tolerance {found['tolerance']:.3g})"],
            *_telling(found),
        ]
        if found["metrics"]:
            changed = [(name, value) for name, value in found["metrics"]["difference"].items() if value is not None]
            rows.append(["merged less adapted", ", ".join(f"{name} {value:+z.2g}" for name, value in changed[:2])])
    table(["merge", ""], rows)
    if merged["bases"]:
        of_base = [
            [
                BASES[name] + " (this one)" * (name == merged["base"]),
                f"{told['max_logit_difference']:.3g}",
                *(value for _, value in _telling(told)),
            ]
            for name, told in merged["bases"].items()
        ]
        table(["from what was trained", "max |logit difference|", "mean KL", "same decisions"], of_base)
    if merged["task_type"] == "CAUSAL_LM":
        told = f"for llama.cpp: python convert_hf_to_gguf.py {shlex.quote(merged['path'])} --outfile model.gguf"
        say(output(), told)


def _telling(found: Mapping[str, Any]) -> list[list[str | None]]:
    return [
        ["mean KL", None if found["mean_kl"] is None else f"{found['mean_kl']:.3g}"],
        ["same decisions", None if found["agreement"] is None else f"{found['agreement']:.2%}"],
    ]
