"""Is the merged model the adapted one? Both are shown the same rows, and their logits compared.

Both run in float32, whatever dtype is written: what differs is then what merging and rounding did to the weights, not
how a machine computes in that dtype.

TOLERANCE[dtype] x max(0.1, largest |logit| of the adapted model) is the most that any logit may differ.
    float32     1e-3   (W + sBA)x in place of Wx + sB(Ax): another order of float32 sums, about 1e-6 a layer, which tens
                       of layers may make a hundred times larger
    float16     2e-2   a weight is rounded by up to 2^-11 (5e-4) of itself, in tens of matrices, one behind the other
    bfloat16    1e-1   by up to 2^-8 (4e-3); measured on encoders of 6 and 24 layers: a twentieth to a half of it
A head that was lost, or an adapter that was not merged, differs by about what the adapter changes. `adapter_effect`
says how much that is on the same rows, and so what the check could have told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hkft.data import tokenise
from hkft.errors import HkftError
from hkft.evaluation.predict import Predictions, predict
from hkft.evaluation.saved import Saved, examples_of
from hkft.events import Listener, Notice, Stage
from hkft.merging.loading import Adapted
from hkft.model import build

ROWS = 64
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
LEAST_SCALE = 0.1  # below it logits are all but zero, and float32's own noise would count
TEXT = "verifying"
RANDOM_LENGTH = 16  # tokens of a random row, where no tokenizer is there

SENTENCES = (
    "The film was far better than I had expected.",
    "No.",
    "She said that the train would be late again, and it was.",
    "Prices rose by 3.2 % in March, the third rise in a row.",
    "Why does the kettle whistle before the water boils?",
    "A dull, overlong story with two good scenes and no ending.",
    "Please send the signed form back before Friday.",
    "The committee has not decided whether to publish the report.",
    "I would not recommend this hotel to anyone.",
    "def add(a, b): return a + b",
    "Two men are playing chess in a park while a dog looks on.",
    "It is not true that all birds can fly.",
    "WONDERFUL!!! Best evening of the year :-)",
    "The river flooded the lower town in 1953 and again in 2002.",
    "Nobody knows who painted the smaller of the two portraits.",
    "If the lamp is red, wait; if it is green, go on.",
)


@dataclass(frozen=True)
class Probe:
    """Rows to show to both models. `run(model)` -> what it says of them; it holds no model itself."""

    on: str
    run: Callable[[nn.Module], Predictions]


def probe(adapted: Adapted, tell: Listener) -> Probe:
    """Up to 64 rows of the validation set, evenly spread; fixed sentences and random tokens where there is none."""
    if adapted.saved is not None:
        try:
            return _of_data(adapted, adapted.saved, tell)
        except HkftError as error:
            reason = str(error).splitlines()[0]
            tell(Notice(f"no validation rows to verify with ({reason}): fixed sentences are used", "warning"))
    return _of_sentences(adapted, tell)


def reopened(path: Path, opens: Any, device: torch.device) -> nn.Module:
    """The written model, opened by plain transformers from its folder alone, in float32."""
    return opens.from_pretrained(str(path), dtype=torch.float32, local_files_only=True).to(device).eval()


def compare(before: Predictions, after: Predictions, dtype: str, on: str, effect: float) -> dict[str, Any]:
    """The record of the check: `passed` and the numbers it rests on.

    before, after: what the adapted and the merged model say of the same rows, [N,C]. NaN or inf in either never passes.
    mean_kl: KL(adapted || merged), nats, mean over rows; agreement: share of rows with the same decision. Both are None
    where no class is chosen. metrics: of each model, and merged minus adapted; None for rows without labels.
    """
    scale = max(LEAST_SCALE, float(np.abs(before.logits).max()))
    difference, tolerance = largest(after.logits - before.logits), TOLERANCE[dtype] * scale
    chooses = before.task == "classification"
    return {
        "passed": bool(difference <= tolerance),  # False for NaN
        "on": on,
        "rows": len(before.ids),
        "dtype": dtype,
        "max_logit_difference": difference,
        "tolerance": tolerance,
        "largest_logit": float(np.abs(before.logits).max()),
        "adapter_effect": effect,
        "mean_kl": _kl(before.logits, after.logits) if chooses else None,
        "agreement": float((before.logits.argmax(1) == after.logits.argmax(1)).mean()) if chooses else None,
        "metrics": _metrics(before, after),
    }


def _of_data(adapted: Adapted, saved: Saved, tell: Listener) -> Probe:
    every = examples_of(saved, "validation", tell)
    chosen = np.unique(np.linspace(0, len(every) - 1, min(ROWS, len(every))).round().astype(int))
    examples = every.select(chosen)
    if saved.recipe.task == "generation":
        rows = [{"input_ids": row["input_ids"][: row["prompt_length"]]} for row in examples]
        return _of_rows(adapted, rows, "validation prompts", tell)
    collate = tokenise.collator(saved.tokenizer, build.padding_side(saved.model))
    task, size = saved.recipe.task, saved.recipe.train["per_device_eval_batch_size"]

    def run(model: nn.Module) -> Predictions:
        return predict(model, examples, collate, task=task, batch_size=size, tell=tell, text=TEXT)

    return Probe("validation", run)


def _of_sentences(adapted: Adapted, tell: Listener) -> Probe:
    return _of_rows(adapted, _rows(adapted), "fixed sentences", tell)


def _of_rows(adapted: Adapted, rows: Sequence[Mapping[str, list[int]]], on: str, tell: Listener) -> Probe:
    config, kind = adapted.model.config, adapted.task_type
    chooses = kind != "SEQ_CLS" or (
        config.num_labels > 1 and config.problem_type not in ("regression", "multi_label_classification")
    )

    def run(model: nn.Module) -> Predictions:
        """One row at a time, since not every model has a padding token."""
        device, logits = next(model.parameters()).device, []
        for done, row in enumerate(rows, start=1):
            batch = {name: torch.tensor([values], device=device) for name, values in row.items()}
            if kind == "SEQ_2_SEQ_LM":
                batch["decoder_input_ids"] = batch["input_ids"]
            with torch.inference_mode():
                logits.append(_decisive(model(**batch).logits, kind).float().cpu().numpy())
            tell(Stage(TEXT, done, len(rows)))
        together = np.concatenate(logits)
        return Predictions(
            "classification" if chooses else "regression", list(range(len(together))), together, None, None
        )

    return Probe(on, run)


def _decisive(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """[1,C] of a sequence, [1,L,C] of its tokens -> [N,C]; of a language model only the last token's, [1,V]."""
    if kind in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return logits[:, -1]
    return logits.flatten(0, -2)


def _rows(adapted: Adapted) -> list[dict[str, list[int]]]:
    """The sentences as tokens, and each once more with every word token replaced by a random one."""
    config, random = adapted.model.config.get_text_config(), np.random.RandomState(0)
    if adapted.tokenizer is None:
        return [{"input_ids": random.randint(config.vocab_size, size=RANDOM_LENGTH).tolist()} for _ in SENTENCES]
    special = set(adapted.tokenizer.all_special_ids)
    words = np.setdiff1d(np.arange(config.vocab_size), list(special))
    longest = getattr(config, "max_position_embeddings", None) or RANDOM_LENGTH
    rows = []
    for sentence in SENTENCES:
        row = {name: values[:longest] for name, values in adapted.tokenizer(sentence).items()}
        ids = [token if token < config.vocab_size else int(random.choice(words)) for token in row["input_ids"]]
        rows.append({**row, "input_ids": ids})
    return rows + [
        {**row, "input_ids": [t if t in special else int(random.choice(words)) for t in row["input_ids"]]}
        for row in rows
    ]


def _metrics(before: Predictions, after: Predictions) -> dict[str, dict[str, float]] | None:
    if before.labels is None:
        return None
    adapted, merged = before.metrics(), after.metrics()
    return {
        "adapted": adapted,
        "merged": merged,
        "difference": {name: merged[name] - adapted[name] for name in adapted},
    }


def _kl(before: NDArray[np.floating], after: NDArray[np.floating]) -> float:
    from scipy.special import log_softmax

    p, q = (log_softmax(logits.astype(np.float64), axis=1) for logits in (before, after))
    return float((np.exp(p) * (p - q)).sum(1).mean())


def largest(difference: NDArray[np.floating]) -> float:
    """The largest absolute value."""
    return float(np.abs(difference).max())
