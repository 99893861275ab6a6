"""The fields of peft's LoraConfig and transformers' TrainingArguments, as installed, read without importing either.

Both libraries import torch, which takes seconds; a recipe is checked in milliseconds. So their source is parsed for the
annotated fields of those classes. Here a key must exist and a value must not be plainly of another type; all else is
said by the classes themselves when they are constructed.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hkft.dropout.method import check_rate
from hkft.errors import MethodError, Problem, SetupError, nearest
from hkft.recipe.text import is_number, show

# section: (package, file, class), base classes first.
SOURCES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "lora": (
        ("peft", "config.py", "PeftConfigMixin"),
        ("peft", "config.py", "PeftConfig"),
        ("peft", "tuners/lora/config.py", "LoraConfig"),
    ),
    "train": (("transformers", "training_args.py", "TrainingArguments"),),
}
CLASSES = {"lora": "peft.LoraConfig", "train": "transformers.TrainingArguments"}

LORA_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 16}
TRAIN_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,  # below 1: a ratio of all steps
    "weight_decay": 0.0,
    "train_sampling_strategy": "group_by_length",
    "logging_steps": 10,
    "logging_first_step": True,  # so that a run shorter than that has its objective too
    "report_to": "none",
}

_FILLED_IN = "PEFT fills it in"
_EVALS = "hkft evaluates `diagnostics.evals_per_epoch` times an epoch"
_SAVES = "hkft saves at every evaluation, and keeps the best and the last adapter"
_BEST = "hkft keeps the best adapter, by `diagnostics.metric`"
_COLUMNS = "hkft prepares the columns"
_COMMAND = "the command decides it: `hkft train`, `hkft eval`, `hkft predict`"

# What hkft decides itself, and why or where.
DECIDED: dict[str, dict[str, str]] = {
    "lora": {
        "task_type": "hkft sets it from `task`",
        "inference_mode": "hkft trains the adapter",
        "base_model_name_or_path": "use `model.name`",
        "revision": "use `model.revision`",
        "peft_type": _FILLED_IN,
        "peft_version": _FILLED_IN,
        "auto_mapping": _FILLED_IN,
    },
    "train": {
        "output_dir": "use `hkft train --output`",
        "seed": "use `seed`, at the top level",
        "data_seed": "use `seed`, at the top level",
        "eval_strategy": _EVALS,
        "evaluation_strategy": _EVALS,
        "eval_steps": _EVALS,
        "save_strategy": _SAVES,
        "save_steps": _SAVES,
        "load_best_model_at_end": _BEST,
        "metric_for_best_model": _BEST,
        "greater_is_better": _BEST,
        "logging_nan_inf_filter": "hkft never hides NaN in a log",
        "prediction_loss_only": "hkft computes the task's metrics",
        "remove_unused_columns": _COLUMNS,
        "label_names": _COLUMNS,
        "hub_token": "a recipe holds no token: set HF_TOKEN in the environment",
        "do_train": _COMMAND,
        "do_eval": _COMMAND,
        "do_predict": _COMMAND,
        "resume_from_checkpoint": "use `hkft train --resume`",
        "use_cpu": "use `model.device`",
        "no_cuda": "use `model.device`",
    },
}

# Keys of other tools and of older versions, where the installed class has none of that name.
RENAMED: dict[str, dict[str, str]] = {
    "lora": {
        "rank": "r",
        "lora_r": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "lora_target": "target_modules",
    },
    "train": {
        "lr": "learning_rate",
        "epochs": "num_train_epochs",
        "batch_size": "per_device_train_batch_size",
        "micro_batch_size": "per_device_train_batch_size",
        "warmup_ratio": "warmup_steps: below 1 it is a ratio of all steps",
        "group_by_length": "train_sampling_strategy: group_by_length",
        "scheduler": "lr_scheduler_type",
    },
}

# Lower bounds that the classes do not check when constructed.
MINIMUM = {
    "r": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "learning_rate": 0,
    "weight_decay": 0,
}

_SIMPLE = {"null", "bool", "int", "float", "choice"}
_CALLED = {"float": "a number", "int": "a whole number", "bool": "true or false", "null": "null"}
_SWITCH = {"on": True, "yes": True, "off": False, "no": False}


@dataclass(frozen=True)
class Field:
    """What a field takes: kinds of value ("any": only the class itself can tell), and the texts, if listed."""

    kinds: frozenset[str]
    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        # A number includes the whole numbers, so that only one of the two is named.
        kinds = self.kinds - {"int"} if "float" in self.kinds else self.kinds
        return ", ".join([*(said for kind, said in _CALLED.items() if kind in kinds), *self.choices])


@cache
def installed(section: str) -> Mapping[str, Field]:
    """The fields that the installed class of `section` ("lora" or "train") takes, by name.

    Raises SetupError where the package is not installed, or keeps that class elsewhere.
    """
    fields: dict[str, Field] = {}
    for package, file, name in SOURCES[section]:
        path = _folder(package) / file
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError):
            tree = ast.Module([], [])
        body = next((node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
        if body is None:
            raise SetupError(
                f"this version of {package} does not define {name} in {file}",
                where=package,
                hint=f"pip install --upgrade hkft {package}",
            )
        fields |= dict(_annotated(body))
    return fields


def defaults(section: str) -> dict[str, Any]:
    """hkft's own defaults for `section`, as far as the installed class knows them."""
    chosen = LORA_DEFAULTS if section == "lora" else TRAIN_DEFAULTS
    return {key: value for key, value in chosen.items() if key in installed(section)}


def check(section: str, key: str, value: Any) -> tuple[Any, Problem | None]:
    """The value as the class takes it (`on` -> True, 1e3 -> 1000 where those fit), and what is wrong with it, or None.

    The Problem has no `where`: the caller knows the place.
    """
    fields = installed(section)
    name = f"{section}.{key}"
    if key in DECIDED[section]:
        return value, Problem(f"{name} is not set in a recipe", hint=DECIDED[section][key])
    if key not in fields:
        message = f"there is no key {key!r} in {section}: {CLASSES[section]} has no such field"
        return value, Problem(message, hint=_hint(section, key))
    field = fields[key]
    value = _fitted(field, value)
    if fault := _fault(key, field, value):
        return value, replace(fault, message=f"{name}: {fault.message}", found=show(value))
    return value, None


def _hint(section: str, key: str) -> str | None:
    if key in RENAMED[section]:
        return f"did you mean `{RENAMED[section][key]}`?"
    return nearest(key, [name for name in installed(section) if name not in DECIDED[section]])


def _fitted(field: Field, value: Any) -> Any:
    if isinstance(value, str) and "bool" in field.kinds and "text" not in field.kinds and value not in field.choices:
        return _SWITCH.get(value.lower(), value)
    whole = isinstance(value, float) and value.is_integer()
    return int(value) if whole and "int" in field.kinds and not field.kinds & {"float", "any"} else value


def _fault(key: str, field: Field, value: Any) -> Problem | None:
    kind = _kind(value)
    if field.kinds <= _SIMPLE and not _takes(field, kind):
        quoted = kind == "text" and is_number(value) and field.kinds & {"int", "float"}
        hint = "remove the quotes" if quoted else None
        return Problem("not a value of this field", allowed=field.allowed, hint=hint)
    if field.kinds <= _SIMPLE and kind == "text" and value not in field.choices:
        return Problem("not one of its values", allowed=field.allowed, hint=nearest(value, field.choices))
    if kind == "float" and not math.isfinite(value):
        return Problem("not a finite number", allowed="a finite number")
    if key in MINIMUM and kind in ("int", "float") and value < MINIMUM[key]:
        return Problem("too small", allowed=f"{MINIMUM[key]} or more")
    if key == "lora_dropout":
        try:
            check_rate(value)
        except MethodError as error:
            return error.problems[0]
    return None


def _takes(field: Field, kind: str) -> bool:
    accepted = {*field.kinds, *(("int",) if "float" in field.kinds else ()), *(("text",) if field.choices else ())}
    return kind in accepted


def _kind(value: Any) -> str:
    kinds = {bool: "bool", int: "int", float: "float", str: "text", list: "list", dict: "mapping"}
    return kinds.get(type(value), "null")


def _folder(package: str) -> Path:
    spec = find_spec(package)  # of a top-level name: finds it, imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(f"{package} is not installed", where=package, hint=f"pip install {package}")
    return Path(spec.submodule_search_locations[0])


def _annotated(body: list[ast.stmt]) -> list[tuple[str, Field]]:
    fields = []
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        options = {word.arg: word.value for word in node.value.keywords} if isinstance(node.value, ast.Call) else {}
        hidden = isinstance(init := options.get("init"), ast.Constant) and init.value is False
        if node.target.id.startswith("_") or hidden or "ClassVar" in ast.unparse(node.annotation):
            continue
        fields.append((node.target.id, _field(node.annotation, options.get("metadata"))))
    return fields


def _field(annotation: ast.expr, metadata: ast.expr | None) -> Field:
    """From an annotation and the metadata of `dataclasses.field`, where transformers lists some fields' choices."""
    kinds, choices = _union(annotation)
    if isinstance(metadata, ast.Dict):
        for key, value in zip(metadata.keys, metadata.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List | ast.Tuple):
                choices = tuple(str(item.value) for item in value.elts if isinstance(item, ast.Constant))
                kinds = (kinds - {"text"}) | {"choice"}
    return Field(frozenset(kinds), choices)


def _union(node: ast.expr) -> tuple[set[str], tuple[str, ...]]:
    """The kinds and listed texts of an annotation: a name, `X | Y`, `Optional[X]`, `Union[X, Y]` or `Literal[...]`."""
    if isinstance(node, ast.BinOp):
        members = [node.left, node.right]
    elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Optional", "Union"):
        members = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
        members += [ast.Constant(None)] if ast.unparse(node.value) == "Optional" else []
    elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
        return _literal(node.slice)
    else:
        return {_single(node)}, ()
    parts = [_union(member) for member in members]
    return set().union(*(kinds for kinds, _ in parts)), tuple(text for _, choices in parts for text in choices)


def _literal(node: ast.expr) -> tuple[set[str], tuple[str, ...]]:
    items = [item.value for item in ast.walk(node) if isinstance(item, ast.Constant)]
    texts = tuple(item for item in items if isinstance(item, str))
    closed = len(texts) == len(items) and not any("[" in text for text in texts)  # "pissa_niter_[number of iters]"
    return ({"choice"} if closed else {"any"}), texts


def _single(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and node.value is None:
        return "null"
    name = ast.unparse(node.value if isinstance(node, ast.Subscript) else node)
    known = {"bool": "bool", "int": "int", "float": "float", "str": "text", "list": "list", "dict": "mapping"}
    return known.get(name, "any")
