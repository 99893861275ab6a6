"""Canonical rows of generation -> examples: tokens, and which of them are learned.

    prompt, completion   tokenised apart, so that training sees the very tokens that generation begins with
    messages             the tokenizer's chat template; what the assistant says is learned, in every turn

The end of text is a label like any other token of the completion, whatever pads. Too long an example loses the beginning of
its prompt, and only where the completion alone is too long the end of that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from hkft.errors import DataError, SetupError
from hkft.events import Listener, Notice, Stage

IGNORED = -100  # a label that is not learned, as everywhere in torch and transformers
BATCH = 1000
MUCH = 0.05  # a larger share of cut rows is a warning


@dataclass(frozen=True)
class Encoded:
    """The tokens of an example up to where generation begins, with the labels among them, and those after it."""

    prompt: list[int]
    prompt_labels: list[int]  # IGNORED, but for earlier turns of the assistant
    completion: list[int]

    @property
    def learned(self) -> bool:
        """Whether there is a token to learn. The first of all is never predicted."""
        labels = [*self.prompt_labels, *self.completion]
        return any(label != IGNORED for label in labels[1:])


class Encoder:
    """A tokenizer's way with prompts, completions and chats. Raises SetupError for chats without a chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chats: bool) -> None:
        self.tokenizer = tokenizer
        self.start, self.end = (
            token if isinstance(token, int) else None for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        )
        self.unlearned = self.parted = 0  # earlier answers that are not learned; last ones that begin elsewhere
        if chats and not tokenizer.chat_template:
            raise SetupError(
                "the tokenizer has no chat template",
                where=tokenizer.name_or_path or None,
                hint="take an instruct model, or data.prompt and data.completion in place of data.messages",
            )

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """With the tokens that the tokenizer puts in front of every text, and none that it puts behind."""
        return [self._without_end(ids) for ids in self._tokens(texts, special=True)]

    def pairs(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Encoded]:
        ends = [] if self.end is None else [self.end]
        return [
            Encoded(prompt, [IGNORED] * len(prompt), self._without_end(completion) + ends)
            for prompt, completion in zip(self.prompts(prompts), self._tokens(completions, special=False), strict=True)
        ]

    def chat_prompt(self, turns: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens that generation of the next turn begins with."""
        return self._tokens([self._rendered(turns, answer=True)], special=False)[0]

    def chat(self, turns: Sequence[Mapping[str, Any]]) -> Encoded:
        """A chat that ends with the assistant's turn.

        Where a turn begins is told by the template itself: what it writes for the turns before, ready for an answer. A
        template that writes an earlier answer otherwise once it is past (without its reasoning, say) leaves it unlearned.
        """
        whole = self._rendered(turns, answer=False)
        spans = [self._span(turns, n, whole) for n, turn in enumerate(turns) if turn["role"] == "assistant"]
        self.unlearned += spans[:-1].count(None)
        begin = spans[-1][0] if spans[-1] else self._parting(turns, whole)
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        first = next((n for n, (start, stop) in enumerate(places) if stop > begin and stop > start), len(ids))
        learned = [any(a <= start < b for a, b in filter(None, spans[:-1])) for start, _ in places[:first]]
        labels = [token if yes else IGNORED for token, yes in zip(ids, learned, strict=False)]
        completion = ids[first:]
        if self.end is not None and whole.rstrip().endswith(str(turns[-1]["content"]).rstrip()):
            completion = [*completion, self.end]  # a template that says nothing of where an answer ends
        return Encoded(ids[:first], labels, completion)

    def _parting(self, turns: Sequence[Mapping[str, Any]], whole: str) -> int:
        """Where the chat parts from what the template writes, ready for an answer: they should agree up to the answer."""
        self.parted += 1
        pairs = zip(self._rendered(turns[:-1], answer=True), whole, strict=False)
        return next((n for n, (asked, written) in enumerate(pairs) if asked != written), len(whole))

    def turn_end(self) -> int | None:
        """The token that the template ends an answer with; None where that is the end of text, or nothing."""
        if not self.tokenizer.chat_template:
            return None
        mark = "hkft"
        try:
            whole = self._rendered([{"role": "user", "content": mark}, {"role": "assistant", "content": mark}], False)
        except DataError:
            return None
        after = self._tokens([whole[whole.rindex(mark) + len(mark) :].strip()], special=False)[0]
        return after[0] if after and after[0] in self.tokenizer.all_special_ids else None

    def _span(self, turns: Sequence[Mapping[str, Any]], n: int, whole: str) -> tuple[int, int] | None:
        if n == 0:
            return None
        before, through = self._rendered(turns[:n], answer=True), self._rendered(turns[: n + 1], answer=False)
        return (len(before), len(through)) if whole.startswith(through) and through.startswith(before) else None

    def _rendered(self, turns: Sequence[Mapping[str, Any]], answer: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=answer
            )
        except Exception as error:  # a template is a program of somebody else's, and raises what it likes
            raise DataError(
                "the chat template refuses a chat",
                where="data.messages",
                found=f"{error}: {json.dumps(list(turns))[:120]}",
                hint="templates differ in the roles they take, and in their order",
            ) from error
        assert isinstance(text, str)
        return text

    def _tokens(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=special, truncation=False, verbose=False)["input_ids"]

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] == self.end else ids


def fit(example: Encoded, longest: int, start: int | None) -> tuple[Encoded, str | None]:
    """The example in at most `longest` tokens, and what was cut: "prompt", "completion" or None.

    start: the token that begins every text, kept in front of a prompt that loses its beginning.
    """
    over = len(example.prompt) + len(example.completion) - longest
    if over <= 0:
        return example, None
    head = 1 if example.prompt[:1] == [start] else 0
    room = max(longest - len(example.completion), head + 1)
    left = max(0, room - head)

    def shortened(values: list[int]) -> list[int]:
        return values[:head] + values[head:][len(values) - head - left :] if left < len(values) - head else values

    prompt, labels = shortened(example.prompt), shortened(example.prompt_labels)
    completion = example.completion[: longest - len(prompt)]
    return Encoded(prompt, labels, completion), "completion" if len(completion) < len(example.completion) else "prompt"


def examples_of(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, longest: int, tell: Listener, name: str
) -> datasets.Dataset:
    """The rows as examples, in memory and in their order: no padding, at most `longest` tokens.

    Columns: `input_ids`, `attention_mask`; `labels` where the rows have a `completion`, IGNORED for what is not learned;
    `prompt_length`, the tokens that generation begins with; `id`, `length`, `prompt`, `completion`. What is cut, and what
    is left out because nothing of it would be learned, is counted aloud under `name`.
    """
    encoder = Encoder(tokenizer, "messages" in rows.column_names)
    cut: dict[str | None, int] = {}
    done = 0

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        nonlocal done
        encoded = [fit(example, longest, encoder.start) for example in _encoded(encoder, batch)]
        for _, what in encoded:
            cut[what] = cut.get(what, 0) + 1
        done += len(encoded)
        tell(Stage(f"tokenising {name}", done, len(rows)))
        return _columns([example for example, _ in encoded], batch, "completion" in batch)

    examples = rows.map(
        encode,
        batched=True,
        batch_size=BATCH,
        remove_columns=rows.column_names,
        features=_features("completion" in rows.column_names),
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint="tokenised",  # else datasets pickles the tokenizer to name a cache file that is never written
    )
    if left_out := len(rows) - len(examples):
        share = f"{left_out:,} of {len(rows):,} {name} rows"
        if not len(examples):
            raise DataError("no row has a token to learn", where="data.completion", found=share)
        tell(Notice(f"{share} were left out: nothing in them would be learned", level="warning"))
    for what, end in (("prompt", "beginning of their prompt"), ("completion", "end of their completion")):
        if count := cut.get(what, 0):
            level = "warning" if what == "completion" or count > MUCH * len(rows) else "info"
            share = f"{count:,} of {len(rows):,} {name} rows ({count / len(rows):.1%})"
            tell(Notice(f"{share} are longer than {longest} tokens and lost the {end}: data.max_length", level=level))
    if encoder.unlearned:
        told = f"{encoder.unlearned:,} earlier answers of {name}, which the chat template writes otherwise once they are past"
        tell(Notice(f"{told}, are not learned"))
    if encoder.parted:
        told = f"{encoder.parted:,} chats of {name} do not begin their last answer as the chat template asks for one"
        tell(Notice(f"{told}: what is generated begins otherwise than what was learned", level="warning"))
    if "completion" in rows.column_names and encoder.end is None:
        tell(Notice("the tokenizer has no end-of-sequence token: no end of text can be learned", level="warning"))
    return examples


def _encoded(encoder: Encoder, batch: Mapping[str, list[Any]]) -> list[Encoded]:
    if "messages" in batch:
        chats = [json.loads(chat) for chat in batch["messages"]]
        if "completion" in batch:
            return [encoder.chat(chat) for chat in chats]
        prompts = [encoder.chat_prompt(chat) for chat in chats]
    elif "completion" in batch:
        return encoder.pairs(batch["prompt"], batch["completion"])
    else:
        prompts = encoder.prompts(batch["prompt"])
    return [Encoded(prompt, [IGNORED] * len(prompt), []) for prompt in prompts]


def _columns(examples: Sequence[Encoded], batch: Mapping[str, list[Any]], labelled: bool) -> dict[str, list[Any]]:
    rows = [n for n, example in enumerate(examples) if example.learned or not labelled]
    kept = [examples[n] for n in rows]
    columns = {
        "input_ids": [example.prompt + example.completion for example in kept],
        "attention_mask": [[1] * (len(example.prompt) + len(example.completion)) for example in kept],
        "prompt_length": [len(example.prompt) for example in kept],
        "length": [len(example.prompt) + len(example.completion) for example in kept],
    }
    if labelled:
        columns["labels"] = [example.prompt_labels + example.completion for example in kept]
    return columns | {key: [batch[key][n] for n in rows] for key in ("id", "prompt", "completion") if key in batch}


def _features(labelled: bool) -> datasets.Features:
    numbers, text = datasets.List(datasets.Value("int32")), datasets.Value("string")
    kinds: dict[str, Any] = {"input_ids": numbers, "attention_mask": datasets.List(datasets.Value("int8"))}
    kinds |= {"labels": numbers, "completion": text} if labelled else {}
    return datasets.Features(
        {**kinds, "prompt": text, **dict.fromkeys(("id", "length", "prompt_length"), datasets.Value("int64"))}
    )
