"""The gradient noise of dropout methods on a recipe's own model and rows: what `hkft noise` prints."""

from __future__ import annotations

from collections.abc import Sequence

from hkft.data import splits, tokenise
from hkft.dropout.noise import GradientNoise, gradient_noise
from hkft.errors import UsageError
from hkft.evaluation import saved
from hkft.events import Listener, Stage, silent
from hkft.model import build
from hkft.recipe import load


def measure(
    source: str | None,
    recipe: str | None,
    overrides: Sequence[str] = (),
    methods: Sequence[str] = ("dropkey", "dropattention"),
    *,
    rate: float = 0.1,
    draws: int = 32,
    rows: int = 16,
    tell: Listener = silent,
) -> list[GradientNoise]:
    """`gradient_noise` on the first `rows` training rows, with the adapter of a run, or with a fresh one of a recipe.

    A fresh adapter has B = 0: then only B and the head have a gradient. Raises what loading raises, and UsageError.
    """
    if source is None and recipe is None:
        raise UsageError("there is nothing to measure on", hint="name a run, or give --recipe")
    if source is not None:
        loaded = saved.load_saved(source, recipe=recipe, overrides=overrides, tell=tell)
        model, examples, tokenizer = loaded.model, saved.examples_of(loaded, "train", tell), loaded.tokenizer
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
    else:
        assert recipe is not None
        read = load(recipe, overrides)
        drawn, tokenizer = splits.load(read, tell), build.tokenizer(read)
        assert drawn.train is not None
        examples = tokenise.tokenise(drawn.train, tokenizer, read.data.max_length, tell, name="train")
        tell(Stage(f"loading {read.model.name}"))
        model = build.with_lora(build.base(read, drawn.labels, build.padding_id(tokenizer)), read)
    batch = tokenise.collator(tokenizer, build.padding_side(model))(
        [examples[n] for n in range(min(rows, len(examples)))]
    )
    tell(Stage("measuring gradients"))
    return gradient_noise(model, batch.to(model.device), methods, rate=rate, draws=draws)
