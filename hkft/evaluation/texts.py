"""The numbers of generated texts, each against several references, as the E2E NLG challenge and the field define them.

    name      unit     better  what it is                                                            computed by
    bleu      percent  higher  1- to 4-grams found in the references, geometric mean, short texts     sacrebleu
                               penalised; mteval-v13a's tokens, lowercased
    nist      bits     higher  what the 1- to 5-grams found tell, arithmetic mean, short texts        this module
                               penalised; the same tokens
    meteor    percent  higher  words aligned by form, stem and WordNet synonym, in few chunks         nltk
    rouge_l   percent  higher  longest common subsequence, F of precision and recall                  this module
    cider     0 to 10  higher  cosine of the 1- to 4-grams, each weighted by how rare it is            this module
    ter       percent  lower   edits to reach the nearest reference, per word of a reference          sacrebleu
    chrf      percent  higher  F of the 1- to 6-grams of characters                                   sacrebleu

BLEU and NIST are the challenge's mteval-v13a without regard to case. ROUGE-L and CIDEr are coco-caption's, on the words
of `words`: coco-caption runs Stanford's Java tokeniser, whose words these nearly always are. METEOR is NLTK's, that of
2007, and not the Java program METEOR 1.5 of the papers, which has other weights and knows paraphrases: where that gives
46 for texts of E2E, this gives 80. Compare it with itself only. TER and chrF are no part of the challenge: sacrebleu's
defaults, as its command prints them. TER is slow: a minute and more for E2E's test set, a second each for the others.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import zip_longest
from operator import or_
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkft.events import Listener, Notice, silent

Predictions = Sequence[str]
References = Sequence[Sequence[str]]  # references[i]: those of prediction i, one or more, not as many for every row

NAMES: tuple[str, ...] = ("bleu", "nist", "meteor", "rouge_l", "cider", "ter", "chrf")
NO_WORDNET = "METEOR is left out: NLTK has no WordNet on this machine. Get it with `python -m nltk.downloader wordnet`."


def score_texts(
    predictions: Predictions, references: References, metrics: Sequence[str] = NAMES, tell: Listener = silent
) -> dict[str, float]:
    """The metrics of the predictions, in the units of the table above.

    METEOR is missing from the result, and one warning says so, where NLTK has no WordNet. An empty prediction counts:
    it finds nothing. Where there is not one word of reference, for lack of rows too, every metric is NaN.
    """
    assert set(metrics) <= set(NAMES), f"no such metric: {sorted(set(metrics) - set(NAMES))}"
    assert len(predictions) == len(references), f"{len(predictions)} predictions, {len(references)} rows of references"
    assert all(texts and not isinstance(texts, str) for texts in references), "a row needs a list of references"
    if "meteor" in metrics and _wordnet() is None:
        tell(Notice(NO_WORDNET, level="warning"))
        metrics = [name for name in metrics if name != "meteor"]
    if not any(text.strip() for texts in references for text in texts):
        return dict.fromkeys(metrics, math.nan)
    by_name = dict(zip(NAMES, (bleu, nist, meteor, rouge_l, cider, ter, chrf), strict=True))
    return {name: by_name[name](predictions, references) for name in metrics}


def signature(references: References, metric: str = "bleu") -> str:
    """sacrebleu's name, as "nrefs:var|case:lc|eff:no|tok:13a|...", of a bleu, ter or chrf: print it beside."""
    return str(_sacrebleu(metric, references).get_signature())


def bleu(predictions: Predictions, references: References) -> float:
    """BLEU of Papineni and others (2002), percent, smoothed as mteval-v13a does where no n-gram of a length is found.

    NaN where no prediction is as long as four words: of no 4-grams no part can be right. 0 where all are empty.
    """
    result = _sacrebleu("bleu", references).corpus_score(predictions, None)
    return math.nan if result.sys_len and not result.totals[-1] else float(result.score)


def ter(predictions: Predictions, references: References) -> float:
    """TER of Snover and others (2006), percent of the references' mean length; words are what blanks separate."""
    return float(_sacrebleu("ter", references).corpus_score(predictions, None).score)


def chrf(predictions: Predictions, references: References) -> float:
    """chrF of Popovic (2015), percent, case kept; recall weighs twice (b = 2), each row by its best reference."""
    return float(_sacrebleu("chrf", references).corpus_score(predictions, None).score)


def _sacrebleu(metric: str, references: References) -> Any:
    """sacrebleu's scorer, which knows the references. It wants them as streams, None where a row has no more."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    streams: Any = list(zip_longest(*references))
    if metric == "bleu":  # force: full stops that stand apart, as E2E's, are no reason for a warning
        return BLEU(lowercase=True, force=True, references=streams)
    return {"ter": TER, "chrf": CHRF}[metric](references=streams)


def nist(predictions: Predictions, references: References) -> float:
    """NIST of Doddington (2002) as mteval-v13a counts it, n-grams of 1 to 5 words; NaN without a word of reference.

    An n-gram tells log2(how often its first n - 1 words / how often itself) bits, counted over all references. Those
    found, at most as often as the one reference that has most of it, sum to bits per n-gram of the predictions, and the
    five lengths are added. The factor for short texts is 1/2 at 2/3 of the references' words: exp(-b log(ratio)^2).

    The references' words are the mean of each row, summed, as the challenge's Python program does and Doddington means;
    mteval's Perl divides all words by the largest number of references, so is milder where some rows have fewer.
    """
    rows = [[_ngrams(words_13a(text), 5) for text in texts] for texts in references]
    seen = Counter(ngram for row in rows for counts in row for ngram in counts.elements())
    seen[()] = _total(seen, 1)
    expected = sum(_total(counts, 1) / len(row) for row in rows for counts in row)
    if not expected:
        return math.nan
    bits, spoken = np.zeros(5), np.zeros(5)
    for prediction, row in zip(predictions, rows, strict=True):
        counts = _ngrams(words_13a(prediction), 5)
        spoken += [_total(counts, n) for n in range(1, 6)]
        for ngram, count in (counts & reduce(or_, row)).items():
            bits[len(ngram) - 1] += count * math.log2(seen[ngram[:-1]] / seen[ngram])
    ratio = min(spoken[0] / expected, 1)
    length_factor = math.exp(math.log(0.5) * (math.log(ratio) / math.log(1.5)) ** 2) if ratio else 0.0
    return length_factor * float(np.sum(bits / np.maximum(spoken, 1)))


def meteor(predictions: Predictions, references: References) -> float:
    """METEOR of Lavie and Agarwal (2007) by NLTK, percent: the best of a row's references, mean over the rows.

    F = P R / (0.9 P + 0.1 R) of the aligned words, times 1 - 0.5 (chunks / aligned words)^3.
    """
    from nltk.translate.meteor_score import meteor_score

    synonyms: Any = _wordnet()
    pairs = zip(predictions, references, strict=True)
    scores = [meteor_score([words(text) for text in row], words(text), wordnet=synonyms) for text, row in pairs]
    return 100 * float(np.mean(scores))


def _wordnet() -> Any:
    """NLTK's WordNet, None where its data are not on this machine, or not whole."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError):
        return None
    return wordnet


def rouge_l(predictions: Predictions, references: References) -> float:
    """ROUGE-L of Lin (2004) as coco-caption has it, percent: the mean of the rows.

    P and R: the longest common subsequence per word of the prediction and of a reference, each the best of the row's
    references, not always by the same one. F = (1 + b^2) P R / (R + b^2 P), b = 1.2: recall weighs more.
    """
    scores = []
    for prediction, texts in zip(predictions, references, strict=True):
        said = words(prediction) or [""]  # coco-caption's empty text is one empty word
        wanted = [words(text) or [""] for text in texts]
        common = [_longest_common(said, text) for text in wanted]
        precision = max(common) / len(said)
        recall = max(length / len(text) for length, text in zip(common, wanted, strict=True))
        scores.append(2.44 * precision * recall / (recall + 1.44 * precision) if precision else 0.0)
    return 100 * float(np.mean(scores))


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest subsequence of words, gaps allowed, that both have."""
    above = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for place, match in enumerate(other):
            row.append(above[place] + 1 if word == match else max(above[place + 1], row[place]))
        above = row
    return above[-1]


def cider(predictions: Predictions, references: References) -> float:
    """CIDEr-D of Vedantam and others (2015) as coco-caption has it, 0 to 10: the mean of the rows.

    An n-gram weighs its count in the text * log(rows / rows that have it in a reference). For each n from 1 to 4, the
    cosine of the two texts, in which the prediction's weight is at most the reference's, times exp(-d^2 / (2 * 6^2)),
    d the difference in number of bigrams; the mean over n and over the references, times 10.

    With a single row each n-gram of its references is in every row, log(1) = 0: CIDEr is 0. Few rows make it small.
    """
    rows = [[_ngrams(words(text), 4) for text in texts] for texts in references]
    having = Counter(ngram for row in rows for ngram in set().union(*row))

    def weights(counts: Counter) -> dict[tuple[str, ...], float]:
        return {ngram: count * math.log(len(rows) / max(having[ngram], 1)) for ngram, count in counts.items()}

    scores = []
    for prediction, row in zip(predictions, rows, strict=True):
        said = _ngrams(words(prediction), 4)
        weighted = weights(said)
        for counts in row:
            nearness = math.exp(-((_total(said, 2) - _total(counts, 2)) ** 2) / (2 * 6**2))
            scores.append(nearness * _cosines(weighted, weights(counts)).mean() / len(row))
    return 10 * float(np.sum(scores)) / len(rows)


def _cosines(prediction: Mapping[tuple[str, ...], float], reference: Mapping[tuple[str, ...], float]) -> NDArray:
    """[4], of 1- to 4-grams: their cosine, the prediction's weights clipped at the reference's; 0 for a null vector."""
    product, norms = np.zeros(4), np.zeros((2, 4))
    for ngram, weight in prediction.items():
        other = reference.get(ngram, 0.0)
        product[len(ngram) - 1] += min(weight, other) * other
    for side, vector in zip(norms, (prediction, reference), strict=True):
        for ngram, weight in vector.items():
            side[len(ngram) - 1] += weight**2
    return np.divide(product, np.sqrt(norms.prod(0)), out=product, where=norms.prod(0) > 0)


def _ngrams(text: Sequence[str], longest: int) -> Counter[tuple[str, ...]]:
    """How often the text has each run of 1 to `longest` words."""
    return Counter(tuple(text[at : at + n]) for n in range(1, longest + 1) for at in range(len(text) - n + 1))


def _total(counts: Mapping[tuple[str, ...], int], n: int) -> int:
    """How many n-grams of n words there are, each as often as it stands."""
    return sum(count for ngram, count in counts.items() if len(ngram) == n)


def words_13a(text: str) -> list[str]:
    """The words of BLEU and NIST: mteval-v13a's, lowercased; punctuation marks are words."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()(text.lower()).split()


_APART = re.compile(r"-(?=[£€])|[£€]|(?<![\s.])\.(?=\s)")  # in "20-£25" and within a text, where NLTK leaves them
_DROPPED = frozenset("'' ' `` ` . ? ! , : - -- ... ;".split())


def words(text: str) -> list[str]:
    """The words of ROUGE-L, CIDEr and METEOR: lowercased, split as the Penn Treebank's, punctuation marks dropped.

    NLTK's tokeniser, which needs no data, with pounds and inner full stops set apart as Stanford's does. The two differ
    in that Stanford writes "#" for "£", which changes no figure, and keeps the stop of abbreviations it knows ("st.").
    Brackets stay, as "-lrb-": coco-caption lowercases first, and its list of marks has them in capitals.
    """
    from nltk.tokenize import NLTKWordTokenizer

    split: Iterable[str] = NLTKWordTokenizer().tokenize(_APART.sub(r" \g<0> ", text.lower()), convert_parentheses=True)
    return [word.lower() for word in split if word not in _DROPPED]
