"""Canonical rows of generation -> examples: tokens, and which of them are learned.

    prompt, completion   tokenised apart, so that training sees the very tokens that generation begins with
    messages             the tokenizer's chat template; what the assistant says is learned, in every turn

A completion is tokenised as it stands in the midst of a text: a tokenizer that puts a space in front of every text
(SentencePiece) puts none in front of a completion, so the space between the two is the one that the recipe writes.

The end of text is a label like any other token of the completion, whatever pads. Too long an example loses the
beginning of its prompt, and only where the completion alone is too long the end of that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from hkft.data.encoding import encoded, key_of
from hkft.data.sources import column_of, picked
from hkft.errors import DataError, SetupError
from hkft.events import Listener, Notice

IGNORED = -100  # a label that is not learned, as everywhere in torch and transformers
MUCH = 0.05  # a larger share of cut rows is a warning
MARK = "\ue000"  # a private sign of Unicode: no answer holds it
LEAD = "\n"  # in front of a text that is tokenised as if in the midst of another
CUTS: tuple[str | None, ...] = (
    None,
    "prompt",
    "completion",
)  # by the number that says which of them a row lost a part of

Chat = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Encoded:
    """The tokens of an example up to where generation begins, with the labels among them, and those after it."""

    prompt: list[int]
    prompt_labels: list[int]  # IGNORED, but for earlier turns of the assistant
    completion: list[int]
    unlearned: int = 0  # earlier answers of the assistant that are not learned
    parted: bool = False  # whether the template begins the last answer otherwise than it asks for one

    @property
    def learned(self) -> bool:
        """Whether there is a token to learn. The first of all is never predicted."""
        labels = [*self.prompt_labels, *self.completion]
        return any(label != IGNORED for label in labels[1:])


@dataclass(frozen=True)
class Written:
    """A chat as its template writes it: up to the last answer, with the places of earlier ones, and that answer."""

    asked: str
    earlier: list[tuple[int, int]]
    answer: str
    ended: bool  # the template ends it with a token that generation stops at
    unlearned: int
    parted: bool


class Encoder:
    """A tokenizer's way with prompts, completions and chats.

    Raises SetupError for chats where there is no chat template, or no telling which text a token stands for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chats: bool) -> None:
        self.tokenizer = tokenizer
        self.start, self.end = (
            token if isinstance(token, int) else None for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        )
        if chats and not (tokenizer.chat_template and tokenizer.is_fast):
            raise SetupError(
                f"the tokenizer has no {'offsets' if tokenizer.chat_template else 'chat template'}",
                where=tokenizer.name_or_path or None,
                hint="take an instruct model, or data.prompt and data.completion in place of data.messages",
            )
        one, inside, lead = self._tokens(["a", f"{LEAD}a", LEAD])
        dressed = self._tokens(["a"], special=True)[0]
        self.front = next((dressed[:n] for n in range(len(dressed)) if dressed[n : n + len(one)] == one), [])
        self.lead = [] if inside[len(inside) - len(one) :] == one else lead
        self.opening, self.closing = self._around() if tokenizer.chat_template else ("", "")
        self.stops = self.turn_end() is not None or self.end in self._tokens([self.closing])[0]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """With the tokens that the tokenizer puts in front of every text, and none that it puts behind."""
        return [self.front + ids for ids in self._tokens(texts)]

    def pairs(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Encoded]:
        return [
            Encoded(prompt, [IGNORED] * len(prompt), self._ended(completion))
            for prompt, completion in zip(self.prompts(prompts), self._inside(completions), strict=True)
        ]

    def chat_prompt(self, turns: Chat, where: str = "data.messages") -> list[int]:
        """The tokens that generation of the next turn begins with."""
        return self._tokens([self._rendered(turns, True, where)])[0]

    def chats(self, chats: Sequence[Chat], where: Sequence[str]) -> list[Encoded]:
        """Chats that end with the assistant's turn; `where`: what an error calls each.

        The whole is tokenised at once, or the answer apart where a token would reach from the prompt into it.
        """
        written = [self._written(turns, place) for turns, place in zip(chats, where, strict=True)]
        asked = [chat.asked for chat in written]
        prompts = self.tokenizer(asked, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        wholes = self._tokens([chat.asked + chat.answer for chat in written])
        found = []
        for chat, prompt, places, whole in zip(
            written, prompts["input_ids"], prompts["offset_mapping"], wholes, strict=True
        ):
            agree = whole[: len(prompt)] == prompt
            completion = whole[len(prompt) :] if agree else self._inside([chat.answer])[0]
            learned = [any(start < b and stop > a for a, b in chat.earlier) for start, stop in places]
            labels = [token if yes else IGNORED for token, yes in zip(prompt, learned, strict=True)]
            completion = completion if chat.ended else self._ended(completion)
            found.append(Encoded(prompt, labels, completion, chat.unlearned, chat.parted))
        return found

    def said(self, text: str) -> str:
        """What the assistant says in a text that it wrote, without what the template puts around every answer."""
        before, after = (
            str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            for tokens in self._tokens([self.opening, self.closing])
        )
        text = text.strip().removeprefix(before)
        return (text.partition(after)[0] if after else text).strip()

    def turn_end(self) -> int | None:
        """The token that the template ends an answer with; None where it is no token of its own, or nothing."""
        tokens = self._tokens([self.closing.strip()])[0]
        return tokens[0] if tokens and tokens[0] in self.tokenizer.added_tokens_decoder else None

    def _written(self, turns: Chat, where: str) -> Written:
        """Where the template does not begin the answer as it asks for one, it is learned after what it asks with."""
        asked, whole = self._rendered(turns[:-1], True, where), self._rendered(turns, False, where).rstrip()
        parted = not whole.startswith(asked)
        if not parted:
            answer = whole[len(asked) :]
        else:
            place = _place(whole, self._rendered(_marked(turns, len(turns) - 1), False, where).rstrip())
            if place is None:
                found = f"{whole[-80:]!r} after {asked[-80:]!r}"
                raise DataError("the chat template hides where the last answer begins", where=where, found=found)
            before = whole[: place[0]]
            space = before[len(before.rstrip()) :]
            answer = ("" if asked.endswith(space) else space) + whole[place[0] :]
        spans = [self._span(turns[:-1], n, asked, where) for n in _answers(turns[:-1])]
        ended = self.stops or (not self.closing and not answer.endswith(turns[-1]["content"].rstrip()))
        return Written(asked, [span for span in spans if span], answer, ended, spans.count(None), parted)

    def _span(self, turns: Chat, n: int, text: str, where: str) -> tuple[int, int] | None:
        """Where turn n and its end stand in `text`, the chat ready for an answer; None where not all it says is there.

        Most templates write a chat as the beginning of every longer one. Where one does not, an answer's place is where
        another answer would stand.
        """
        if n and text.startswith(before := self._rendered(turns[:n], True, where)):
            through = self._rendered(turns[: n + 1], False, where).rstrip()
            if text.startswith(through):
                return len(before), len(through)
        place = _place(text, self._rendered(_marked(turns, n), True, where))
        said = turns[n]["content"].strip()
        if place is None or not said or text[slice(*place)].strip() != said:
            return None
        begin, end = place
        return begin, end + len(self.closing) if text.startswith(self.closing, end) else end

    def _around(self) -> tuple[str, str]:
        """What the template writes between asking for an answer and the answer, and after it, but for white space there.

        Qwen3's, for one, puts an empty thought before every answer.
        """
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
        try:
            asked, whole = self._rendered(turns[:1], True, ""), self._rendered(turns, False, "")
        except DataError:
            return "", ""
        before, _, after = whole.rpartition(MARK)
        return before[len(asked) :] if before.startswith(asked) else "", after.rstrip()

    def _rendered(self, turns: Chat, answer: bool, where: str) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=answer
            )
        except Exception as error:  # a template is a program of somebody else's, and raises what it likes
            raise DataError(
                "the chat template refuses a chat",
                where=where,
                found=f"{error}: {json.dumps(list(turns))[:120]}",
                hint="templates differ in the roles they take, and in their order",
            ) from error
        assert isinstance(text, str)
        return text

    def _inside(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts that others stand before."""
        alone, lead = self._tokens(texts), self.lead
        if not lead:
            return alone
        led = self._tokens([LEAD + text for text in texts])
        return [b[len(lead) :] if b[: len(lead)] == lead else a for a, b in zip(alone, led, strict=True)]

    def _tokens(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=special, truncation=False, verbose=False)["input_ids"]

    def _ended(self, ids: list[int]) -> list[int]:
        """With one end-of-sequence token at the end, where there is such a token."""
        return ids if self.end is None or ids[-1:] == [self.end] else [*ids, self.end]


def _answers(turns: Chat) -> list[int]:
    return [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]


def _marked(turns: Chat, n: int) -> Chat:
    """The chat with another answer in place of turn n."""
    return [{**turn, "content": MARK} if place == n else turn for place, turn in enumerate(turns)]


def _place(text: str, other: str) -> tuple[int, int] | None:
    """Where `text` says something in place of the MARK in `other`; None where that is not all they differ in."""
    before, mark, after = other.partition(MARK)
    same = text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text)
    return (len(before), len(text) - len(after)) if mark and same else None


def fit(example: Encoded, longest: int, start: int | None) -> tuple[Encoded, str | None]:
    """The example in at most `longest` tokens, and what was cut: "prompt", "completion" or None.

    start: the token that begins every text, kept in front of a prompt that loses its beginning. Of a prompt one more
    token stays, where that leaves room for one of the completion.
    """
    if len(example.prompt) + len(example.completion) <= longest:
        return example, None
    head = 1 if example.prompt[:1] == [start] else 0
    least = min(len(example.prompt), head + 1, max(longest - 1, 1))
    kept = max(longest - len(example.completion), least)

    def shortened(values: list[int]) -> list[int]:
        return values[:head] + values[len(values) - kept + head :]

    completion = example.completion[: longest - kept]
    cut = "completion" if len(completion) < len(example.completion) else "prompt"
    prompt, labels = shortened(example.prompt), shortened(example.prompt_labels)
    return replace(example, prompt=prompt, prompt_labels=labels, completion=completion), cut


def examples_of(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    tell: Listener,
    name: str,
    content: str | None = None,
) -> datasets.Dataset:
    """The rows as examples in their order: no padding, at most `longest` tokens. content: as in `tokenise`.

    Columns: `input_ids`, `attention_mask`; `labels` where the rows have a `completion`, IGNORED for what is not
    learned; `prompt_length`, the tokens that generation begins with; `id`, `length`, `prompt`, `completion`. What is
    cut, and what is left out because nothing of it would be learned, is counted aloud under `name`. Raises DataError
    where no row is left, or the chat template refuses one, and SetupError as `Encoder` does.
    """
    chats, labelled = "messages" in rows.column_names, "completion" in rows.column_names
    encoder = Encoder(tokenizer, chats)
    found = encoded(
        rows,
        _Encode(encoder, longest, labelled, name),
        _features(labelled),
        tell,
        name,
        key=None if content is None else key_of(content, tokenizer, longest),
        slow=chats or not tokenizer.is_fast,
    )
    noted = {column: column_of(found, column) for column in _NOTES}
    there = np.flatnonzero(noted["kept"])
    cut = dict(zip(CUTS, np.bincount(noted["cut"], minlength=len(CUTS)).tolist(), strict=True))
    _tell_cut(cut, len(rows), len(there), longest, tell, name)
    if labelled:
        _tell_unlearned(int(noted["unlearned"].sum()), int(noted["parted"].sum()), encoder, tell, name)
    return picked(found, there).remove_columns([*_NOTES])


def _tell_cut(cut: Mapping[str | None, int], rows: int, kept: int, longest: int, tell: Listener, name: str) -> None:
    """Say what was left out and what was cut. Raises DataError where nothing is left."""
    if kept < rows:
        share = f"{rows - kept:,} of {rows:,} {name} rows"
        if not kept:
            hint = f"data.max_length {longest} leaves no room" if cut["completion"] else None
            raise DataError("no row has a token to learn", where=name, found=share, hint=hint)
        tell(Notice(f"{share} were left out: nothing in them would be learned", level="warning"))
    if cut["completion"] == rows and name == "train":
        raise DataError(
            "every completion is cut, so that no end of text would be learned",
            where="data.max_length",
            found=str(longest),
        )
    end_of_both = "all but the end of their prompt, and the end of their completion with the end of text"
    for what, end in (("prompt", "the beginning of their prompt"), ("completion", end_of_both)):
        if count := cut[what]:
            level = "warning" if what == "completion" or count > MUCH * rows else "info"
            share = f"{count:,} of {rows:,} {name} rows ({count / rows:.1%})"
            tell(Notice(f"{share} are longer than {longest} tokens and lost {end}: data.max_length", level=level))


def _tell_unlearned(unlearned: int, parted: int, encoder: Encoder, tell: Listener, name: str) -> None:
    """Say what the tokenizer or its chat template does not let be learned as it stands."""
    if unlearned:
        told = f"{unlearned:,} earlier answers of {name}, which the chat template writes otherwise once past"
        tell(Notice(f"{told}, are not learned", level="warning"))
    if parted:
        told = f"in {parted:,} chats of {name} the chat template does not begin the answer as it asks for one"
        tell(Notice(f"{told}: it is learned right after what the template asks with", level="warning"))
    if encoder.end is None:
        tell(Notice("the tokenizer has no end-of-sequence token: no end of text can be learned", level="warning"))


@dataclass(frozen=True)
class _Encode:
    """A batch of rows -> columns of examples, with what was done to each row in _NOTES."""

    encoder: Encoder
    longest: int
    labelled: bool
    name: str  # of the rows, for errors

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        fitted = [fit(example, self.longest, self.encoder.start) for example in self._examples(batch)]
        examples, cuts = [example for example, _ in fitted], [CUTS.index(cut) for _, cut in fitted]
        lengths = [len(example.prompt) + len(example.completion) for example in examples]
        columns = {
            "input_ids": [example.prompt + example.completion for example in examples],
            "attention_mask": [[1] * length for length in lengths],
            "prompt_length": [len(example.prompt) for example in examples],
            "length": lengths,
            "kept": [bool(example.prompt) and (example.learned or not self.labelled) for example in examples],
            "cut": cuts,
            "unlearned": [example.unlearned for example in examples],
            "parted": [example.parted for example in examples],
        }
        if self.labelled:
            columns["labels"] = [example.prompt_labels + example.completion for example in examples]
        return columns | {key: batch[key] for key in ("id", "prompt", "completion") if key in batch}

    def _examples(self, batch: Mapping[str, list[Any]]) -> list[Encoded]:
        encoder = self.encoder
        if "messages" in batch:
            chats = [json.loads(chat) for chat in batch["messages"]]
            where = [f"data.messages, {self.name}, row {row} (the first is 0)" for row in batch["id"]]
            if "completion" in batch:
                return encoder.chats(chats, where)
            prompts = [encoder.chat_prompt(chat, place) for chat, place in zip(chats, where, strict=True)]
        elif "completion" in batch:
            return encoder.pairs(batch["prompt"], batch["completion"])
        else:
            prompts = encoder.prompts(batch["prompt"])
        return [Encoded(prompt, [IGNORED] * len(prompt), []) for prompt in prompts]


_NOTES = {  # columns that tell what was done to a row; no example has them
    "kept": datasets.Value("bool"),
    "cut": datasets.Value("int8"),
    "unlearned": datasets.Value("int32"),
    "parted": datasets.Value("bool"),
}


def _features(labelled: bool) -> datasets.Features:
    numbers, text = datasets.List(datasets.Value("int32")), datasets.Value("string")
    kinds: dict[str, Any] = {"input_ids": numbers, "attention_mask": datasets.List(datasets.Value("int8"))}
    kinds |= {"labels": numbers, "completion": text} if labelled else {}
    counts = dict.fromkeys(("id", "length", "prompt_length"), datasets.Value("int64"))
    return datasets.Features({**kinds, "prompt": text, **counts, **_NOTES})
