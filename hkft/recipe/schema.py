"""The sections of a recipe: keys, types, defaults, and one line of help for each.

`Schema` is plain data: where it is read from, and where each value came from, is `recipe.py`'s matter. A validator
raises RefusedError, or lets a MethodError through: both keep what was found and what is allowed.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from hkft.dropout.method import (
    DEFAULT_RATE,
    Consistency,
    Kind,
    Method,
    Pattern,
    Position,
    Protect,
    Rescale,
    Schedule,
    Site,
    Start,
    check_rate,
)
from hkft.dropout.named import find
from hkft.errors import RecipeError
from hkft.recipe.fields import CLASSES, defaults
from hkft.recipe.template import template
from hkft.recipe.text import dump, show

CUSTOM = "custom"  # the method's name where the recipe gives its sites
TASKS = ("classification", "regression", "generation")
COLUMNS = ("text", "label", "prompt", "completion", "messages")


class RefusedError(RecipeError, ValueError):
    """A value that a validator refuses; a ValueError, so that pydantic adds the place."""


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 1e3 is a whole number


def _rate(value: Any) -> Any:
    check_rate(value)
    return float(value)


def _known_method(name: str) -> str:
    return name if name == CUSTOM else find(name).name


def _native_dropout(value: Any) -> Any:
    if value == "keep":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise RefusedError("not a rate", found=show(value), allowed="0 <= rate < 1, or keep")
    return float(value)


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise RefusedError("no such kind of device", found=show(value), allowed="auto, cpu, cuda, cuda:1, mps")
    return value


def _validation(value: Any) -> Any:
    return _source_or_part(value, "validation is always on")


def _test(value: Any) -> Any:
    return value if value is None else _source_or_part(value, "not a test set")


def _source_or_part(value: Any, otherwise: str) -> Any:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        allowed = "a source, as `train` is, or a fraction of the training rows between 0 and 1"
        raise RefusedError(otherwise, found=show(value), allowed=allowed)
    return float(value)


def _text_columns(value: Any) -> Any:
    if value is None:  # where the task reads none; where it does, `recipe` asks for it
        return None
    pair = [value] if isinstance(value, str) else value
    if (
        not isinstance(pair, list)
        or len(pair) not in (1, 2)
        or not all(isinstance(name, str) and name for name in pair)
    ):
        raise RefusedError(
            "not a column or a pair of columns", found=show(value), allowed="one column, or two: [first, second]"
        )
    return value if isinstance(value, str) or len(pair) == 2 else pair[0]


def _template(value: str) -> str:
    try:
        template(value)
    except ValueError as error:
        allowed = 'a column, or a template such as "{question} ->"'
        raise RefusedError(f"not a template: {error}", found=show(value), allowed=allowed) from None
    return value


def _filter(value: Any) -> Any:
    def plain(item: Any) -> bool:
        return item is None or isinstance(item, str | int | float)

    allowed = "{column: value} or {column: [value, value]}"
    if not isinstance(value, dict):
        raise RefusedError("not a filter", found=show(value), allowed=allowed)
    for column, wanted in value.items():
        if not (plain(wanted) or (isinstance(wanted, list) and wanted and all(map(plain, wanted)))):
            raise RefusedError(f"column {column!r} is compared with values", found=show(wanted), allowed=allowed)
    return value


def _layers(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise RefusedError(
            "not a choice of layers", found=show(value), allowed="auto, all, latter-half, or a list of numbers"
        )
    return value


Text = Annotated[str, Field(min_length=1)]
Columns = Annotated[Text, AfterValidator(_template)]
Whole = Annotated[int, Strict(), BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=1)]
Rate = Annotated[Any, AfterValidator(_rate)]
Weight = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Section):
    """The base model."""

    name: Text = Field(description="hub id | local folder | package:<python package>/<path inside it>")
    revision: Text | None = Field(None, description="branch, tag or commit of a hub model")
    adapter: Text | None = Field(
        None, description="an adapter, or a run with one, whose weights a new run begins with; null: a new adapter"
    )
    quantization: Literal["none", "8bit", "4bit"] = Field("none", description="none | 8bit | 4bit (QLoRA)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of the frozen weights; auto: the checkpoint's, but float32 on a CPU, and bfloat16 for float16",
    )
    native_dropout: Annotated[Any, AfterValidator(_native_dropout)] = Field(
        0.0, description="rate set on the model's own dropout modules; `keep` leaves them"
    )
    device: Annotated[Text, AfterValidator(_device)] = Field("auto", description="auto | cpu | cuda | cuda:1 | mps")


class Data(Section):
    """Rows, and the columns to read of them."""

    train: Text = Field(
        description="hub:<dataset>[/<config>]#<split> | csv, tsv, json, jsonl, parquet | package:<package>/<path>"
    )
    validation: Annotated[Any, AfterValidator(_validation)] = Field(0.1, description="a source, or a fraction of train")
    test: Annotated[Any, AfterValidator(_test)] = Field(
        None, description="a source, or a fraction of train, the same rows for every seed: for `hkft eval --split test`"
    )
    filter: Annotated[dict[str, Any], BeforeValidator(_filter)] | None = Field(
        None, description="{column: value} or {column: [value, value]}: keep only these rows"
    )
    text: Annotated[Any, AfterValidator(_text_columns)] = Field(
        None, description="classification, regression: one column, or two for a pair: [first, second]"
    )
    label: Text | None = Field(None, description="classification, regression: the column of the answer")
    prompt: Columns | None = Field(
        None, description='generation: a column, or a template: "{meaning_representation} ->"'
    )
    completion: Columns | None = Field(
        None, description='generation: a column, or a template: " {reference}"; the loss is on this and the end of text'
    )
    messages: Text | None = Field(
        None, description="generation, instead of both: a column of chats; the loss is on what the assistant says"
    )
    max_length: Annotated[Whole, Field(ge=8)] = Field(128, description="tokens of an example; longer ones are cut")
    padding_free: bool = Field(False, description="generation: train on batches laid end to end, without padding")
    train_rows: Count | None = Field(None, description="use only so many rows, drawn with the seed")
    validation_rows: Count | None = Field(None, description="use only so many rows, drawn with the seed")


TextMetric = Literal["bleu", "nist", "meteor", "rouge_l", "cider", "ter", "chrf"]  # see `hkft.evaluation.texts`


class Generation(Section):
    """How text is generated: fields of transformers.GenerationConfig, by their own names, and how it is scored."""

    max_new_tokens: Count = Field(128, description="the longest answer")
    num_beams: Count = Field(1, description="1: no beam search")
    length_penalty: float = Field(1.0, description="of beam search: above 0 prefers longer answers")
    early_stopping: bool = Field(False, description="of beam search: stop as soon as there are num_beams answers")
    no_repeat_ngram_size: Annotated[Whole, Field(ge=0)] = Field(
        0, description="no such run of tokens twice; 0: no limit"
    )
    repetition_penalty: Annotated[float, Field(gt=0)] = Field(1.0, description="1: none")
    do_sample: bool = Field(False, description="draw tokens, with the seed, instead of taking the likeliest")
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="with do_sample")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="with do_sample")
    top_k: Annotated[Whole, Field(ge=0)] = Field(0, description="with do_sample; 0: all tokens")
    batch_size: Count = Field(16, description="prompts at a time")
    metrics: list[TextMetric] = Field(
        list(get_args(TextMetric)), description="of the generated text in `hkft eval`; []: generate nothing there"
    )

    @model_validator(mode="after")
    def _used(self) -> Generation:
        for switch, on, keys in (
            ("do_sample: true", self.do_sample, ("temperature", "top_p", "top_k")),
            ("num_beams above 1", self.num_beams > 1, ("length_penalty", "early_stopping")),
        ):
            for key in keys:
                if not on and (value := getattr(self, key)) != type(self).model_fields[key].default:
                    raise RefusedError(
                        f"{key} would have no effect", where=key, found=show(value), hint=f"set {switch}"
                    )
        return self


class SiteRecord(Section):
    """One entry of `dropout.sites`: see `hkft.dropout.method.Site`."""

    position: Position = Field(
        description="where: attention_logits | attention_weights | hidden | input | output | ..."
    )
    pattern: Pattern = Field("element", description="element | column | span")
    rate: Rate | None = Field(None, description="null: `dropout.rate`")
    layers: Annotated[Any, AfterValidator(_layers)] = Field("auto", description="auto | all | latter-half | [numbers]")
    rescale: Rescale | None = Field(None, description="null: the position's own")
    schedule: Schedule = Field("constant", description="constant | linear_up | linear_down, over the layers")
    start: Start = Field("uniform", description="of a span of hidden tokens: uniform | attended")
    protect: Protect = Field(
        "first_key", description="of an attention row that would lose all keys: first_key | row | none"
    )

    def site(self) -> Site:
        return Site(**self.model_dump())

    @model_validator(mode="after")
    def _exists(self) -> SiteRecord:
        self.site()
        return self


class ConsistencyRecord(Section):
    """`dropout.consistency` of a full record: see `hkft.dropout.method.Consistency`."""

    kind: Kind = Field("kl", description="kl | js | js_symmetric")
    weight: Weight | None = Field(None, description="null: `dropout.weight`")
    gradient: Literal["one", "both"] | None = Field(None, description="null: `dropout.gradient`")


class Dropout(Section):
    """A method by its name, or its full record: `sites` and `consistency`."""

    method: Annotated[Text, AfterValidator(_known_method)] = Field("hiddenkey", description="a name of `hkft methods`")
    rate: Rate = Field(DEFAULT_RATE, description="of every site that names none of its own")
    weight: Weight = Field(1.0, description="of the consistency loss, a mean over examples (completion tokens)")
    gradient: Literal["one", "both"] | None = Field(
        None, description="passes the consistency loss trains through; null: the method's own"
    )
    sites: list[SiteRecord] | None = Field(None, description="instead of `method`: a list of {position, pattern, ...}")
    consistency: ConsistencyRecord | None = Field(None, description="with `sites`: {kind, weight, gradient}")

    @model_validator(mode="before")
    @classmethod
    def _named_by_sites(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("sites") is not None and "method" not in values:
            return {**values, "method": CUSTOM}
        return values

    @model_validator(mode="after")
    def _one_method(self) -> Dropout:
        if self.sites is not None and self.method != CUSTOM:
            raise RefusedError("a method's name and sites exclude each other", where="method", found=self.method,
                        hint="remove one of the two")  # fmt: skip
        if self.sites is None and self.method == CUSTOM:
            raise RefusedError("a custom method needs its sites", where="method", hint="add `sites`, or name a method")
        if self.sites is None and self.consistency is not None:
            raise RefusedError(
                "belongs to a full record, and this is a named method",
                where="consistency",
                hint=f"`hkft methods {self.method}` prints the full record of {self.method}",
            )
        self.as_method()
        return self

    def as_method(self) -> Method:
        """The method, with `rate`, `weight` and `gradient` wherever a full record does not say otherwise."""
        if self.sites is None:
            method = find(self.method)
            own = method.consistency and Consistency(
                method.consistency.kind, self.weight, self.gradient or method.consistency.gradient
            )
            return Method(method.sites, own, method.name).with_rate(self.rate)
        own = self.consistency and Consistency(
            self.consistency.kind,
            self.weight if self.consistency.weight is None else self.consistency.weight,
            self.consistency.gradient or self.gradient or "one",
        )
        return Method([record.site() for record in self.sites], own, CUSTOM).with_rate(self.rate)


class Diagnostics(Section):
    """The eval-mode look at a probe of the training set and at the validation set."""

    evals_per_epoch: Annotated[Whole, Field(ge=1, lt=10_000)] = Field(4, description="looks per epoch")
    probe_size: Annotated[Whole, Field(ge=2)] | None = Field(None, description="null: as many as validation rows")
    generate: Count | None = Field(
        None, description="generation: at every look, score the text of so many prompts of each set too; null: never"
    )
    metric: Text | None = Field(None, description="picks the best adapter; null: validation loss")
    patience: Count | None = Field(None, description="stop after so many looks without a better one; null: never")
    average: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="look at, and keep, a moving average of the adapter: its decay, 0.99 say; null: the adapter itself",
    )


class Comparing(Section):
    """What `hkft compare` runs of a recipe. It changes no run, so that it is none of a run's values."""

    methods: list[Annotated[Text, AfterValidator(_known_method)]] = Field(
        ["none", "hiddenkey-", "hiddenkey"], min_length=1, description="names of `hkft methods`, or name/pattern"
    )
    seeds: Count | Annotated[list[Annotated[Whole, Field(ge=0)]], Field(min_length=1)] = Field(
        3, description="how many, from the recipe's own on; or which"
    )
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict, description="{section.key: [values]}: every method with every combination"
    )
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="{name: {section.key: value}}: the recipe without dropout, and with this"
    )
    baseline: Text | None = Field(
        None, description="the row that the others are compared with; null: none, or the first"
    )
    paper: Text | None = Field(None, description="the paper's table and column to print beside: table1/sst2")


class Schema(Section):
    """A recipe's values, and nothing else."""

    model: Model
    task: Literal["classification", "regression", "generation"] = Field("classification", description=" | ".join(TASKS))
    data: Data
    lora: dict[str, Any] = Field(default_factory=dict, description=f"fields of {CLASSES['lora']}, by their own names")
    dropout: Dropout = Field(default_factory=lambda: Dropout.model_validate({}))
    train: dict[str, Any] = Field(default_factory=dict, description=f"fields of {CLASSES['train']}, by their own names")
    generation: Generation = Field(default_factory=lambda: Generation.model_validate({}))
    diagnostics: Diagnostics = Field(default_factory=lambda: Diagnostics.model_validate({}))
    compare: Comparing = Field(default_factory=lambda: Comparing.model_validate({}))
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = Field(1, description="of everything that is drawn")


SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "data": Data,
    "dropout": Dropout,
    "generation": Generation,
    "diagnostics": Diagnostics,
    "compare": Comparing,
}
RECORDS: dict[tuple[str, ...], type[Section]] = {
    (): Schema,
    **{(name,): section for name, section in SECTIONS.items()},
    ("dropout", "sites"): SiteRecord,
    ("dropout", "consistency"): ConsistencyRecord,
}


def reference() -> str:
    """Every key with its default and its help, as YAML. Keys without a default are marked `required`."""
    lines = []
    for name, field in Schema.model_fields.items():
        if name in SECTIONS:
            lines += [f"{name}:", *(_line(key, f, "  ") for key, f in SECTIONS[name].model_fields.items())]
        elif name in CLASSES:
            lines += [f"{name}:  # {field.description}; hkft sets:"]
            lines += [f"  {key}: {show(value)}" for key, value in defaults(name).items()]
        else:
            lines.append(_line(name, field, ""))
    return "\n".join(lines) + "\n"


def _line(key: str, field: Any, indent: str) -> str:
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if isinstance(default, list):
        entry = f"{indent}{key}: [{', '.join(map(show, default))}]"
    else:
        entry = f"{indent}{key}:" if field.is_required() else indent + dump({key: default}).strip()
    return f"{entry:<28}  # {'required: ' if field.is_required() else ''}{field.description}"
