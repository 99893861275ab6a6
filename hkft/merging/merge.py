"""Runs or adapters -> a folder that plain transformers opens, compared with what was trained, then put in place."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from peft import PeftModel
from safetensors import SafetensorError

from hkft.errors import CheckFailedError, SetupError, UsageError, nearest
from hkft.events import Listener, Notice, Stage, silent
from hkft.folder import SCHEMA_VERSION, jsonable, read_json, write_json, write_text
from hkft.merging import loading, place, reference, streaming, verification
from hkft.merging.card import card, shown
from hkft.model import pickles
from hkft.model.memory import out_of_memory


@dataclass(frozen=True)
class Merged:
    """A merged model on disk. `verification` is `verification.compare`'s record, None where none was asked for.

    bases: of an adapter trained on quantised weights, how far either base is from what was trained. streamed: tensor by
    tensor, not as a whole model in memory.
    """

    path: Path
    task_type: str  # PEFT's
    dtype: str
    base: str  # "full" or "dequantised"
    streamed: bool
    verification: dict[str, Any] | None
    bases: dict[reference.Base, dict[str, Any]] | None
    bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The same in JSON's own types."""
        return jsonable(asdict(self))


def merge(
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    checkpoint: str = "best",
    dtype: str | None = None,
    base: reference.Base = "full",
    verify: bool = True,
    force: bool = False,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    tell: Listener = silent,
) -> Merged:
    """Merge a run's adapter, or any PEFT adapter, into its base model and write the result to `output`.

    source: a run, an adapter's folder or its hub id; or several, whose updates B A (not their factors) are averaged.
    weights: of several, adding up to 1; None: all alike.
    checkpoint: "best", "last" or a path, of a run.
    dtype: "float32", "float16", "bfloat16", None for that of the base model's files. The update is added in float32 and
        the sum rounded once.
    base: of a run on quantised weights: "full", the full-precision base; "dequantised", the numbers that the quantised
        layers computed with in training. Nothing is quantised again.
    verify: compare with the adapted model, as `hkft.merging.verification` says. Without it no more than a tensor or two of
        the base are in memory, where the adapter can be streamed.
    force: replace an older merged model, once the new one is complete.
    recipe, overrides: base, task and data of an adapter without a run; without them its own configuration is asked.
    Raises UsageError (the folders), SetupError (no such base, no fit, nothing can be written), DivergedError (NaN in
    the adapter), OutOfMemoryError, and CheckFailedError, which leaves the model at `<output>.unverified` and what was
    at `output` as it was. Any other end leaves nothing behind.
    """
    began = time.perf_counter()
    _check_dtype(dtype)
    sources = [source] if isinstance(source, str | Path) else list(source)
    origins = [loading.origin(each, checkpoint, recipe, overrides) for each in sources]
    for origin in origins:
        pickles.refuse(origin.adapter)
        pickles.refuse(loading.location(origin.base))
        loading.check_kind(origin)
    parts = list(zip(origins, _shares(weights, len(origins)), strict=True))
    _check_base(base, origins)
    keep = [folder for origin in origins for folder in origin.keep]
    folder = Path(output).expanduser().resolve()
    place.check(folder, keep, force)
    place.check(_unverified(folder), keep, force=True)
    memory = out_of_memory("merging", "--set model.device=cpu merges in the machine's own memory")
    with memory, place.beside(folder) as partial:
        target = _described(origins, tell)
        target = replace(target, dtype=dtype or target.dtype)
        plan = _planned(parts, target, tell)
        trained, held = _trained(origins, base, verify, tell)
        seen = reference.look(parts, base, held, trained, tell) if verify else None
        del trained  # it is as large as the base
        tell(Stage("merging"))
        with _disk(partial):
            write_model(parts, target, plan, held if base == "dequantised" else None, partial, tell)
        record = _verified(seen, target, partial, tell)
        bases = seen.bases if seen else None
        _describe(parts, target, base, partial, folder.name, record, bases)
        bytes_ = place.size(partial)
        if record is not None and not record["passed"]:
            raise _failed(record, partial, folder)
        place.put(partial, folder, force)
    seconds = time.perf_counter() - began
    return Merged(folder, target.task_type, target.dtype, base, plan is not None, record, bases, bytes_, seconds)


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    if len(weights) != count or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise UsageError(
            "the weights of an average are as many as its adapters, and add up to 1",
            where="--weights",
            found=", ".join(f"{weight:g}" for weight in weights),
            allowed=f"{count} numbers",
        )
    return list(weights)


def _check_base(base: str, origins: Sequence[loading.Origin]) -> None:
    if base not in get_args(reference.Base):
        allowed = ", ".join(get_args(reference.Base))
        hint = nearest(base, get_args(reference.Base))
        raise UsageError(f"there is no base {base!r}", where="--base", allowed=allowed, hint=hint)
    if base == "dequantised" and {origin.quantization for origin in origins} == {"none"}:
        raise UsageError("it was trained on full-precision weights", where="--base dequantised", allowed="full")
    if len({(origin.base, origin.revision, origin.quantization) for origin in origins}) > 1:
        found = ", ".join(f"{origin.base} ({origin.quantization})" for origin in origins)
        raise UsageError("adapters of different bases cannot be averaged", found=found, allowed="one base for all")


def _described(origins: Sequence[loading.Origin], tell: Listener) -> loading.Target:
    first, *others = [loading.describe(origin, tell) for origin in origins]
    for origin, other in zip(origins[1:], others, strict=True):
        same = (first.task_type, first.labels, first.opens) == (other.task_type, other.labels, other.opens)
        if not same or first.config.num_labels != other.config.num_labels:
            raise UsageError(
                "adapters of different tasks or labels cannot be averaged",
                where=str(origin.adapter),
                found=", ".join(other.labels or (f"{other.task_type} with {other.config.num_labels} labels",)),
                allowed=", ".join(first.labels or (f"{first.task_type} with {first.config.num_labels} labels",)),
            )
    return first


def _planned(parts: Sequence[reference.Part], target: loading.Target, tell: Listener) -> streaming.Plan | None:
    """What is to be written, tensor by tensor; None, said aloud, where that needs the whole model."""
    adapters = [(origin.adapter, weight) for origin, weight in parts]
    try:
        where = loading.base_folder(parts[0][0])
        return streaming.plan(where, adapters, target.opens, target.config, loading.DTYPES[target.dtype])
    except streaming.CannotStream as reason:
        alone = parts[0][0].run is None and parts[0][0].recipe is None
        if alone and isinstance(reason, streaming.NobodysError):  # of a run the seed draws them again
            raise SetupError(
                "the model has weights that were never saved",
                where=str(parts[0][0].adapter),
                found=str(reason),
                hint="PEFT saves a new head where modules_to_save names it; an hkft run, or --recipe with its seed, draws it again",
            ) from reason
        itself = ", and an average can then only be checked against itself" if len(parts) > 1 else ""
        tell(Notice(f"merged with the whole model in memory: {reason}{itself}"))
        return None


def _trained(
    origins: Sequence[loading.Origin], base: reference.Base, verify: bool, tell: Listener
) -> tuple[PeftModel | None, streaming.Held | None]:
    """Of a run on quantised weights the model as it was, and its base in numbers, where either is asked for."""
    origin = origins[0]
    if origin.quantization == "none":
        return None, None
    if base == "full":
        tell(
            Notice(
                f"trained on a {origin.quantization} base, merged onto the full-precision one: nothing is quantised again, and "
                "its outputs may differ a little from those seen in training; --base dequantised keeps the base of training",
                "warning",
            )
        )
    if not verify and base == "full":
        return None, None
    trained, held = reference.quantised(origin, tell)
    return (trained if len(origins) == 1 else None), held  # nobody has trained an average


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Raises SetupError for what the disk has to say while `folder` is written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SetupError(
            "the merged model could not be written",
            where=str(folder.parent),
            found=str(error).strip().splitlines()[0],
            hint=f"{shutil.disk_usage(folder.parent).free / 1e9:.1f} GB are free there",
        ) from error


def write_model(
    parts: Sequence[reference.Part],
    target: loading.Target,
    plan: streaming.Plan | None,
    held: streaming.Held | None,
    folder: Path,
    tell: Listener,
) -> None:
    """Configuration, safetensors, generation_config.json where the model generates, tokenizer. Who may read one may read all."""
    if plan is None:
        model = reference.in_memory(parts, held, tell).to(loading.DTYPES[target.dtype])  # type: ignore[arg-type]
        model.save_pretrained(str(folder))
    else:
        replace(plan, held=held).write(folder, tell)
        if plan.unties:
            for config in (target.config, target.config.get_text_config()):
                config.tie_word_embeddings = False
        target.config.dtype = target.dtype
        target.config.save_pretrained(str(folder))
        if target.generation is not None:
            target.generation.save_pretrained(str(folder))
    if target.tokenizer is not None:
        target.tokenizer.save_pretrained(str(folder))
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)


def _verified(
    seen: reference.Reference | None, target: loading.Target, folder: Path, tell: Listener
) -> dict[str, Any] | None:
    if seen is None:
        return None
    tell(Stage(verification.TEXT))
    after = seen.probe.run(verification.reopened(folder, target.opens, seen.device))
    record = verification.compare(seen.before, after, target.dtype, seen.probe.on, seen.effect)
    if record["passed"] and record["tolerance"] >= seen.effect:
        tell(
            Notice(
                f"the adapter changes these rows' logits by {seen.effect:.2g} at most, and the check allows "
                f"{record['tolerance']:.2g}: it would have missed an adapter that was not merged",
                "warning",
            )
        )
    return record


def _describe(
    parts: Sequence[reference.Part],
    target: loading.Target,
    base: str,
    folder: Path,
    name: str,
    record: dict[str, Any] | None,
    bases: Mapping[reference.Base, Mapping[str, Any]] | None,
) -> None:
    """merge.json and the model card."""
    origin, *others = [each for each, _ in parts]
    sources = [shown(str((each.run.path if each.run else each.adapter).resolve())) for each, _ in parts]
    write_json(
        folder / place.RECORD,
        {
            "schema_version": SCHEMA_VERSION,
            "source": sources if others else sources[0],
            "weights": [weight for _, weight in parts],
            "checkpoint": origin.checkpoint or origin.adapter.name,
            "base": shown(origin.base),
            "base_weights": base,
            "dtype": target.dtype,
            "verification": record,
            "bases": bases,
        },
    )
    text = card(
        name=name,
        base=origin.base,
        dtype=target.dtype,
        task_type=target.task_type,
        opens=target.opens.__name__,
        recipe=target.recipe,
        recipe_name=read_json(origin.run.summary).get("recipe") if origin.run and origin.run.summary.exists() else None,
        labels=target.labels,
        metrics=None if others else _metrics(origin),
        verification=record,
        sources=sources,
        dequantised=base == "dequantised",
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
    place.put(partial, _unverified(target), force=True)
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
