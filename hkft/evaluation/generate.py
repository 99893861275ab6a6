"""Prompts -> the text a decoder writes, by transformers' `generate`, and its scores against every completion of a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hkft.data.completions import Encoder
from hkft.data.holdout import draw
from hkft.evaluation.completions import Written
from hkft.evaluation.predict import longest_first, looking
from hkft.evaluation.texts import score_texts, signature
from hkft.events import Listener, Stage, silent
from hkft.model.vocabulary import inner_model
from hkft.processes import WHOLE, Share
from hkft.recipe.schema import Generation

SAMPLING = ("temperature", "top_p", "top_k")
BEAMS = ("length_penalty", "early_stopping")
ALWAYS = ("max_new_tokens", "num_beams", "do_sample", "no_repeat_ngram_size", "repetition_penalty")


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: Generation,
    *,
    chats: bool = False,
    seed: int = 0,
    precision: torch.dtype | None = None,
    tell: Listener = silent,
    text: str = "writing",
    share: Share = WHOLE,
) -> list[str]:
    """The text after each prompt of tokens, in the prompts' order, special tokens and outer white space taken off.

    chats: the prompts are chats, and what the template puts around every answer is taken off too.
    In eval mode and batches of like length, padded on the left. Ends at the end of text, at what the chat template ends a
    turn with, at `max_new_tokens`, or where the model has no more positions. Draws, if any, come from `seed` and the batch's
    number, and leave the random stream as it was. share: of the batches, which several processes write together.
    """
    inner: Any = inner_model(model)  # its `generate` is a mixin's
    device = next(model.parameters()).device
    encoder = Encoder(tokenizer, chats)
    config, texts = _config(inner, encoder, settings), list[tuple[int, str]]()
    ends = frozenset(config.eos_token_id or ())
    positions = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    generators = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    with torch.random.fork_rng(generators), looking(model, precision), _asked_for(inner, config):
        batches = longest_first([len(prompt) for prompt in prompts], settings.batch_size, tell, text)
        for number, rows in share.mine(enumerate(batches)):
            torch.manual_seed(seed + number)
            inputs = tokenizer.pad(
                {"input_ids": [list(prompts[row]) for row in rows]},
                padding_side="left",
                return_tensors="pt",
                verbose=False,
            ).to(device)
            width = inputs["input_ids"].shape[1]
            room = max(1, positions - width) if isinstance(positions, int) else settings.max_new_tokens
            config.max_new_tokens = min(settings.max_new_tokens, room)
            tokens = inner.generate(**inputs, generation_config=config)
            for row, written in zip(rows, tokens[:, width:].tolist(), strict=True):
                end = next((n for n, token in enumerate(written) if token in ends), None)  # it may not be a special one
                told = str(tokenizer.decode(written[:end], skip_special_tokens=True)).strip()
                texts.append((row, encoder.said(told) if chats else told))
    return [told for _, told in sorted(share.all(texts))]


def write(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Any,
    settings: Generation,
    *,
    limit: int | None = None,
    chats: bool = False,
    seed: int = 0,
    precision: torch.dtype | None = None,
    tell: Listener = silent,
    text: str = "writing",
    share: Share = WHOLE,
) -> Written:
    """One text for each different prompt of `examples` (see `hkft.data.completions`), scored against all its completions.

    limit: only so many prompts, drawn with the seed.
    """
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(examples["prompt"]):
        rows.setdefault(prompt, []).append(row)
    asked = list(rows)
    if limit is not None:
        asked = [asked[n] for n in draw(len(asked), limit, seed)]
    lengths, completions, tokens = examples["prompt_length"], examples["completion"], examples["input_ids"]
    fullest = [max(rows[prompt], key=lambda row: lengths[row]) for prompt in asked]  # the prompt least cut
    begun = [tokens[row][: lengths[row]] for row in fullest]
    told: dict[str, Any] = {"seed": seed, "precision": precision, "tell": tell, "text": text, "share": share}
    written = generate(model, tokenizer, begun, settings, chats=chats, **told)
    references = [[completions[row].strip() for row in rows[prompt]] for prompt in asked]
    tell(Stage("scoring"))
    scores = score_texts(written, references, settings.metrics, tell)
    named = signature(references) if "bleu" in scores else None
    return Written(dict(zip(asked, written, strict=True)), scores, named)


@contextmanager
def _asked_for(model: Any, config: GenerationConfig) -> Iterator[None]:
    """For a while the settings asked for are all there are: `generate` fills in what is None from the checkpoint's own."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _config(model: Any, encoder: Encoder, settings: Generation) -> GenerationConfig:
    """transformers' settings, with every token that may end a text. What the checkpoint says of sampling is not asked."""
    names = [*ALWAYS, *(SAMPLING if settings.do_sample else ()), *(BEAMS if settings.num_beams > 1 else ())]
    values: Mapping[str, Any] = {name: getattr(settings, name) for name in names}
    own = model.generation_config.eos_token_id
    ends = [encoder.end, *(own if isinstance(own, list) else [own]), encoder.turn_end()]
    return GenerationConfig(
        **values,
        eos_token_id=sorted({end for end in ends if isinstance(end, int)}) or None,
        pad_token_id=encoder.tokenizer.pad_token_id,
        use_cache=True,
    )
