"""One look at a model, whatever its task: the same at every evaluation in training and by `hkft eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from hkft.data import tokenise
from hkft.evaluation import completions
from hkft.evaluation.completions import Completions
from hkft.evaluation.generate import write
from hkft.evaluation.predict import Predictions, predict
from hkft.events import Listener, silent
from hkft.model import build
from hkft.processes import WHOLE, Share

if TYPE_CHECKING:
    from hkft.recipe import Recipe


def look(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Any,
    recipe: Recipe,
    *,
    batch_size: int,
    write_text: bool,
    limit: int | None = None,
    tell: Listener = silent,
    looking: str,
    writing: str,
    share: Share = WHOLE,
) -> Predictions | Completions:
    """Predictions on tokenised `examples`; of a decoder the losses of its completions and, with write_text, its text.

    Under training's own precision. limit: of the prompts that are written for, drawn with the recipe's seed. looking, writing: what the stages are called. share: of the
    rows, which several processes look at together.
    """
    collate = tokenise.collator(tokenizer, build.padding_side(model))
    told: dict[str, Any] = {"precision": build.precision(recipe), "tell": tell, "share": share}
    if recipe.task != "generation":
        return predict(model, examples, collate, task=recipe.task, batch_size=batch_size, text=looking, **told)
    seen = completions.look(model, examples, collate, batch_size=batch_size, text=looking, **told)
    if not write_text:
        return seen
    asked: dict[str, Any] = {
        "limit": limit,
        "chats": recipe.data.messages is not None,
        "seed": recipe.seed,
        "text": writing,
    }
    return seen.with_text(write(model, tokenizer, examples, recipe.generation, **asked, **told))
