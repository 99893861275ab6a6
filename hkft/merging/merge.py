"""A run or an adapter -> a folder that plain transformers opens, compared with what was trained, then put in place."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from hkft.errors import CheckFailedError, DivergedError, SetupError, UsageError, nearest
from hkft.evaluation.predict import Predictions
from hkft.events import Listener, Notice, Stage, silent
from hkft.folder import SCHEMA_VERSION, jsonable, read_json, write_json, write_text
from hkft.merging import loading, place, verification
from hkft.merging.card import card, shown
from hkft.model.memory import out_of_memory
from hkft.recipe import Recipe


@dataclass(frozen=True)
class Merged:
    """A merged model on disk. `verification` is `verification.compare`'s record, None where none was asked for."""

    path: Path
    dtype: str
    verification: dict[str, Any] | None
    bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The same in JSON's own types."""
        return jsonable(asdict(self))


@dataclass(frozen=True)
class _Reference:
    """What is kept of the adapted model once its weights are let go of: enough to compare, and to describe."""

    task_type: str
    opens: Any
    device: torch.device
    recipe: Recipe | None
    labels: tuple[str, ...] | None
    dtype: str
    probe: verification.Probe | None
    before: Predictions | None
    effect: float


def merge(
    source: str | Path,
    output: str | Path,
    *,
    checkpoint: str = "best",
    dtype: str | None = None,
    verify: bool = True,
    force: bool = False,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    tell: Listener = silent,
) -> Merged:
    """Merge a run's adapter, or any PEFT adapter folder, into its base model and write the result to `output`.

    checkpoint: "best", "last" or a path, of a run.
    dtype: "float32", "float16", "bfloat16", None for that of the base model's files. The update is added in float32 and
        the sum rounded once.
    verify: compare with the adapted model, as `hkft.merging.verification` says.
    force: replace an older merged model, once the new one is complete.
    recipe, overrides: base, task and data of an adapter without a run; without them its own configuration is asked.
    Raises UsageError (the folders), SetupError (no such base, no fit, nothing can be written), DivergedError (NaN in
    the adapter), OutOfMemoryError, and CheckFailedError, which leaves the model at `<output>.unverified` and what was
    at `output` as it was. Any other end leaves nothing behind.
    """
    began = time.perf_counter()
    _check_dtype(dtype)
    origin = loading.origin(source, checkpoint, recipe, overrides)
    target = Path(output).expanduser().resolve()
    place.check(target, origin.keep, force)
    place.check(_unverified(target), origin.keep, force=True)
    memory = out_of_memory("merging", "--set model.device=cpu merges in the machine's own memory")
    with memory, place.beside(target) as partial:
        reference = _write(origin, partial, dtype, verify, tell)
        record = _verified(reference, partial, tell)
        _describe(origin, reference, partial, target.name, record)
        bytes_ = place.size(partial)
        if record is not None and not record["passed"]:
            raise _failed(record, partial, target)
        place.put(partial, target)
    return Merged(target, reference.dtype, record, bytes_, time.perf_counter() - began)


def _write(origin: loading.Origin, folder: Path, dtype: str | None, wanted: bool, tell: Listener) -> _Reference:
    """Load, look (if `wanted`), merge, write. The model lives no longer than this function."""
    adapted = loading.load(origin, tell)
    probe = verification.probe(adapted, tell) if wanted else None
    before = probe.run(adapted.model) if probe else None
    effect = verification.effect(adapted.model, probe, before) if probe and before else float("nan")
    reference = _Reference(
        task_type=adapted.task_type,
        opens=adapted.opens,
        device=next(adapted.model.parameters()).device,
        recipe=adapted.saved.recipe if adapted.saved else None,
        labels=adapted.saved.labels if adapted.saved else None,
        dtype=dtype or adapted.dtype,
        probe=probe,
        before=before,
        effect=effect,
    )
    tell(Stage("merging"))
    model = _merged(adapted, origin).to(loading.DTYPES[reference.dtype])  # type: ignore[arg-type]
    tell(Stage("writing"))
    try:
        write_model(model, folder)
        if adapted.tokenizer is not None:
            adapted.tokenizer.save_pretrained(str(folder))
    except (OSError, SafetensorError) as error:
        raise SetupError(
            "the merged model could not be written",
            where=str(folder.parent),
            found=str(error).strip().splitlines()[0],
            hint=f"{shutil.disk_usage(folder.parent).free / 1e9:.1f} GB are free there",
        ) from error
    return reference


def _merged(adapted: loading.Adapted, origin: loading.Origin) -> PreTrainedModel:
    """The base model with the update added to its weights and the trained head in place, in float32."""
    try:
        return adapted.model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        if "NaN" not in str(error):
            raise
        raise DivergedError(
            "the adapter holds NaN or inf: there is nothing to merge",
            where=str(origin.adapter),
            found=str(error),
            hint="another checkpoint of the run may be sound: --checkpoint",
        ) from error


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """config.json, safetensors, and generation_config.json where the model generates. Whoever reads one reads all."""
    model.save_pretrained(str(folder))
    for path in folder.glob("*.safetensors"):  # safetensors lets only the owner read
        shutil.copymode(folder / "config.json", path)


def _verified(reference: _Reference, folder: Path, tell: Listener) -> dict[str, Any] | None:
    if reference.probe is None or reference.before is None:
        return None
    tell(Stage(verification.TEXT))
    after = reference.probe.run(verification.reopened(folder, reference.opens, reference.device))
    record = verification.compare(reference.before, after, reference.dtype, reference.probe.on, reference.effect)
    if record["passed"] and record["tolerance"] >= reference.effect:
        tell(
            Notice(
                f"the adapter changes these rows' logits by {reference.effect:.2g} at most, and the check allows "
                f"{record['tolerance']:.2g}: it would have missed an adapter that was not merged",
                "warning",
            )
        )
    return record


def _describe(
    origin: loading.Origin, reference: _Reference, folder: Path, name: str, record: dict[str, Any] | None
) -> None:
    """merge.json and the model card."""
    write_json(
        folder / place.RECORD,
        {
            "schema_version": SCHEMA_VERSION,
            "source": shown(str((origin.run.path if origin.run else origin.adapter).resolve())),
            "checkpoint": origin.checkpoint or origin.adapter.name,
            "base": shown(origin.base),
            "dtype": reference.dtype,
            "verification": record,
        },
    )
    text = card(
        name=name,
        base=origin.base,
        dtype=reference.dtype,
        task_type=reference.task_type,
        opens=reference.opens.__name__,
        recipe=reference.recipe,
        recipe_name=read_json(origin.run.summary).get("recipe") if origin.run and origin.run.summary.exists() else None,
        labels=reference.labels,
        metrics=_metrics(origin),
        verification=record,
    )
    write_text(folder / "README.md", text)


def _metrics(origin: loading.Origin) -> dict[str, float] | None:
    """Of the validation set, where the run's summary has them for this very checkpoint."""
    if origin.run is None or origin.checkpoint is None or not origin.run.summary.exists():
        return None
    summary = read_json(origin.run.summary)
    seen = summary.get({"best": "best", "last": "final"}[origin.checkpoint])
    finished = origin.checkpoint == "best" or summary["status"] == "finished"
    return seen["validation"] if seen and finished else None


def _failed(record: dict[str, Any], partial: Path, target: Path) -> CheckFailedError:
    """Put the model where its name says what it is, and say what was found."""
    place.put(partial, _unverified(target))
    found = f"logits that differ by up to {record['max_logit_difference']:.3g}"
    return CheckFailedError(
        "the merged model does not agree with the adapted one",
        where=str(_unverified(target)),
        found=f"{found}, on {record['rows']} rows ({record['on']})",
        allowed=f"{record['tolerance']:.3g} for {record['dtype']}",
        hint="--dtype float32"
        if record["dtype"] != "float32"
        else "`merge.json` there has the numbers; please report this",
    )


def _unverified(target: Path) -> Path:
    return target.with_name(target.name + ".unverified")


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in loading.DTYPES:
        raise UsageError(
            f"a merged model cannot be {dtype}",
            where="--dtype",
            allowed=", ".join(loading.DTYPES),
            hint=nearest(dtype, loading.DTYPES),
        )
