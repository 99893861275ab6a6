"""Validation rows that nearly stand in train: a copy with a changed word or mark flatters the validation scores as well.

Gram: five characters of a text in a row, letter case aside and white space of any length as one blank. Similarity: the
cosine of the counts of two texts' grams, 1 for the same grams, 0 where they share none (Broder 1997 compares sets of such
shingles). Texts shorter than a gram have none: they are near where they are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hkft.data.holdout import draw

GRAM = 5  # characters
CHARACTERS = 2**24  # whose grams are held at a time, of either side: about 0.3 GB
PAIRS = 2**22  # whose similarities are held at a time: about 50 MB
ROUNDING = 1e-6  # of a similarity, in float32


@dataclass(frozen=True, slots=True)
class Near:
    """A validation text and the most similar train text: their positions, and the similarity in 0..1."""

    validation: int
    train: int
    similarity: float


def near_duplicates(
    train: Sequence[str], validation: Sequence[str], *, least: float = 0.9, most_rows: int = 20_000, seed: int = 0
) -> tuple[list[Near], int]:
    """Validation texts with a train text of similarity `least` or more, and how many validation texts were compared.

    similarity(x, y) = sum_g n_g(x) n_g(y) / (|n(x)| |n(y)|), n_g(x) how often gram g stands in x; see the module. Each
    validation text appears once, with its most similar train text (the first of equals); the most similar come first. Of
    more than `most_rows` texts on a side so many are compared, drawn with the seed: with fewer train texts, fewer are
    found. Grams and products are held a block at a time: past the drawn texts, memory does not grow with the rows. 0.9 by
    trial: below it, sentences of one template that say different things ("a man/woman is playing the guitar") pass for
    copies.
    """
    assert 0 < least <= 1, least
    columns, rows = ([int(i) for i in drawn(len(side), most_rows, seed)] for side in (train, validation))
    train_texts = [_plain(train[i]) for i in columns]
    texts = [_plain(validation[i]) for i in rows]
    first: dict[str, int] = {}
    for position, text in enumerate(train_texts):
        first.setdefault(text, position)
    found = [Near(int(rows[i]), int(columns[first[text]]), 1.0) for i, text in enumerate(texts) if text in first]
    rest = [i for i, text in enumerate(texts) if text not in first and len(text) >= GRAM]
    distinct = [text for text in first if len(text) >= GRAM]
    best, similarity = _most_similar(distinct, [texts[i] for i in rest], least)
    found += [
        Near(int(rows[rest[i]]), int(columns[first[distinct[best[i]]]]), float(similarity[i]))
        for i in np.flatnonzero(best >= 0)
    ]
    return sorted(found, key=lambda near: (-near.similarity, near.validation)), len(rows)


def drawn(count: int, most: int, seed: int) -> np.ndarray:
    """The numbers of the texts that are compared, of `count`."""
    return np.arange(count) if count <= most else draw(count, most, seed)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _most_similar(train: Sequence[str], texts: Sequence[str], least: float) -> tuple[np.ndarray, np.ndarray]:
    """Of each text: the position of the most similar train text, -1 where none reaches `least`, and its similarity."""
    best, similarity = np.full(len(texts), -1), np.zeros(len(texts), np.float32)
    for some in _blocks(texts):
        counts = _grams(texts[some])
        for others in _blocks(train):
            transposed = _grams(train[others]).T.tocsr()
            step = max(1, PAIRS // transposed.shape[1])
            for start in range(0, counts.shape[0], step):
                row, column, value = _pairs(counts[start : start + step] @ transposed, least)
                row, column = row + some.start + start, column + others.start
                better = value > similarity[row]
                best[row[better]], similarity[row[better]] = column[better], value[better]
    return best, np.minimum(similarity, 1.0)


def _pairs(cosines: Any, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, column, value) of the largest value in each row of a sparse matrix that has one of `least` or more."""
    cosines.data[cosines.data < least - ROUNDING] = 0
    cosines.eliminate_zeros()
    found = cosines.tocoo()
    order = np.lexsort((found.col, -found.data, found.row))
    row, column, value = found.row[order], found.col[order], found.data[order]
    row, firsts = np.unique(row, return_index=True)
    return row, column[firsts], value[firsts]


def _grams(texts: Sequence[str]) -> Any:
    """A sparse [rows, grams] matrix of gram counts, hashed, each row of length 1."""
    from sklearn.feature_extraction.text import HashingVectorizer

    vectoriser = HashingVectorizer(
        analyzer="char",
        ngram_range=(GRAM, GRAM),
        lowercase=False,
        alternate_sign=False,
        norm="l2",
        dtype=np.float32,  # type: ignore[arg-type]
    )
    return vectoriser.transform(texts)


def _blocks(texts: Sequence[str]) -> Iterator[slice]:
    """Consecutive texts of `CHARACTERS` characters together, or one longer text."""
    start = length = 0
    for position, text in enumerate(texts):
        if position > start and length + len(text) > CHARACTERS:
            yield slice(start, position)
            start, length = position, 0
        length += len(text)
    if start < len(texts):
        yield slice(start, len(texts))
