"""Metrics of generated texts against what the official programs print, and against values worked by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import nltk.data
import pytest

from hkft.evaluation import texts
from hkft.evaluation.texts import NAMES, score_texts, signature, words, words_13a
from hkft.events import Notice

WITHOUT_METEOR = [name for name in NAMES if name != "meteor"]

ROWS = [
    (
        "The Copper Kettle is a cheap tea room by the river.",
        "The Copper Kettle is a cheap tea room near the river.",
        "By the river you will find a cheap tea room, The Copper Kettle.",
        "Cheap and close to the river: the Copper Kettle tea room.",
    ),
    (
        "Luna serves Greek food. It is not family-friendly.",
        "Luna serves Greek food, but it is not for families.",
        "Luna is a Greek restaurant. It isn't family-friendly.",
    ),
    (
        "For £20-25 you can eat Thai food at Bamboo House.",
        "At Bamboo House, Thai food costs £20-25.",
        "You can eat Thai food for £20-25 at Bamboo House.",
        "Bamboo House offers Thai dishes in the £20-25 range.",
        "Thai meals at Bamboo House cost £20-25.",
    ),
    (
        "Old Mill is a pub in the city centre.",
        "Old Mill is a highly rated pub in the city centre, where children are welcome.",
        "In the centre of the city there is a highly rated pub that welcomes children, Old Mill.",
    ),
    (
        "Rated 4 out of 5, Saffron is an Indian restaurant near Old Mill.",
        "Saffron, an Indian restaurant near Old Mill, is rated 4 out of 5.",
        "Near Old Mill is Saffron. It serves Indian food and has a rating of 4 out of 5.",
    ),
    (
        "Do the families like the coffee shop Blossom (riverside)?",
        "Blossom is a coffee shop on the riverside which families like.",
        "Families like Blossom, a coffee shop by the riverside.",
        "Do you like coffee? Take your family to Blossom at the riverside!",
    ),
    (
        "Pasta Point Pasta Point sells Italian food food.",
        "Pasta Point sells Italian food at high prices.",
        "Italian food is sold at Pasta Point; its prices are high.",
    ),
]
PREDICTIONS = [prediction for prediction, *_ in ROWS]
REFERENCES = [references for _, *references in ROWS]


@pytest.fixture
def no_wordnet(monkeypatch):
    """NLTK finds no data, whatever is on this machine."""
    monkeypatch.setattr(texts, "_wordnet", lambda: None)


@pytest.fixture
def small_wordnet(monkeypatch):
    """A WordNet of one synset: pub and inn."""
    inn = SimpleNamespace(lemmas=lambda: [SimpleNamespace(name=lambda: "inn"), SimpleNamespace(name=lambda: "pub")])
    monkeypatch.setattr(
        texts, "_wordnet", lambda: SimpleNamespace(synsets=lambda word: [inn] if word in ("inn", "pub") else [])
    )


def test_official_figures():
    found = score_texts(PREDICTIONS, REFERENCES, WITHOUT_METEOR)
    # E2E challenge, metrics/pymteval.py (BLEUScore, NISTScore), as `measure_scores.py -p` runs it
    assert found["bleu"] == pytest.approx(51.029503128814056)
    assert found["nist"] == pytest.approx(5.74939146617135)
    # coco-caption, as pycocoevalcap 1.2 packs it: Rouge and Cider, on the words of its Java PTBTokenizer
    assert found["rouge_l"] == pytest.approx(68.41648862283743)
    assert found["cider"] == pytest.approx(3.4417933678934998)


def test_sacrebleu_command():
    found = score_texts(PREDICTIONS, REFERENCES, ["ter", "chrf", "bleu"])
    assert list(found) == ["ter", "chrf", "bleu"]
    # the two rows of three references, in files: sacrebleu 2.6.0, `sacrebleu r0 r1 r2 -i h -m ter chrf -w 6`
    alike = score_texts([PREDICTIONS[0], PREDICTIONS[5]], [REFERENCES[0], REFERENCES[5]], ["ter", "chrf"])
    assert alike["ter"] == pytest.approx(31.343284, abs=1e-6)
    assert alike["chrf"] == pytest.approx(73.209447, abs=1e-6)


def test_words():
    assert words("It's in Luna's garden. Isn't it (for £20-£25)?") == (
        "it 's in luna 's garden is n't it -lrb- for £ 20 £ 25 -rrb-".split()
    )
    assert words("") == words(" . ! ") == []
    assert words_13a("Luna's, 3.5 stars. A £20-25 Pub") == "luna's , 3.5 stars . a £20 - 25 pub".split()


def test_nist_by_hand():
    # references: "a b" and "a c", 4 words; a tells log2(4/2) bits, b and c log2(4/1), a b and a c log2(2/1)
    assert score_texts(["a b", "a c"], [["a b"], ["a c"]], ["nist"])["nist"] == pytest.approx((1 + 2 + 1 + 2) / 4 + 1)
    # 2 words said, 3 wanted: half; a tells log2(3/2) bits, twice in two words, and a a log2(2/1), once in one bigram
    assert score_texts(["a a"], [["a a b"]], ["nist"])["nist"] == pytest.approx(0.5 * (math.log2(3 / 2) + 1))


def test_nist_length_is_the_mean_of_each_row():
    # 3 words said, (4 + 2) / 2 + (1 + 2) / 2 = 4.5 wanted: two thirds, half the bits. Of 9 words a, b and x are two
    # each: log2(9/2) bits; b always follows a: a b tells nothing
    found = score_texts(["a b", "x"], [["a b c d", "a b"], ["x", "x y"]], ["nist"])["nist"]
    assert found == pytest.approx(0.5 * math.log2(9 / 2))


def test_rouge_l_takes_the_best_precision_and_the_best_recall():
    # "a b c d" against "a b c d e f" (precision 1, recall 4/6) and "a b" (precision 1/2, recall 1)
    found = score_texts(["a b c d"], [["a b c d e f", "a b"]], ["rouge_l"])["rouge_l"]
    assert found == pytest.approx(100)
    # one reference: precision 2/4, recall 2/3, in order with gaps
    found = score_texts(["a x b y"], [["a b z"]], ["rouge_l"])["rouge_l"]
    assert found == pytest.approx(100 * (1 + 1.44) * (1 / 2) * (2 / 3) / (2 / 3 + 1.44 / 2))


def test_cider_by_hand():
    # two rows, no word in both: every n-gram weighs log 2. "p q" is its reference, so cosines 1, 1, 0, 0
    # "r s t" against "r s": clipped cosines 2 / sqrt(6), 1 / sqrt(2), 0, 0; one bigram more
    found = score_texts(["p q", "r s t"], [["p q"], ["r s"]], ["cider"])["cider"]
    second = math.exp(-1 / 72) * (2 / math.sqrt(6) + 1 / math.sqrt(2)) / 4
    assert found == pytest.approx(10 * (2 / 4 + second) / 2)


def test_cider_clips_what_is_said_too_often():
    found = score_texts(["p p", "r"], [["p"], ["r"]], ["cider"])["cider"]
    first = math.exp(-1 / 72) * (1 / 2) / 4  # weight 2 clipped to 1, over the length 2 of the prediction's vector
    assert found == pytest.approx(10 * (first + 1 / 4) / 2)


@pytest.mark.usefixtures("small_wordnet")
def test_meteor_by_hand():
    # the pub is cheap / the inn is cheap: all four aligned, one chunk. Second row: 2 of 3 and of 2 words, one chunk
    found = score_texts(["The pub is cheap.", "a big tea"], [["x", "The inn is cheap."], ["big teas"]], ["meteor"])
    first = 1 - 0.5 * (1 / 4) ** 3
    precision, recall = 2 / 3, 2 / 2
    second = precision * recall / (0.9 * precision + 0.1 * recall) * (1 - 0.5 * (1 / 2) ** 3)
    assert found["meteor"] == pytest.approx(100 * (first + second) / 2)


@pytest.mark.usefixtures("no_wordnet")
def test_without_wordnet_one_notice_and_the_rest():
    told = []
    found = score_texts(PREDICTIONS[:2], REFERENCES[:2], tell=told.append)
    assert list(found) == WITHOUT_METEOR
    assert told == [Notice(texts.NO_WORDNET, level="warning")]
    assert "python -m nltk.downloader wordnet" in told[0].text
    assert score_texts(PREDICTIONS[:2], REFERENCES[:2], ["bleu"], told.append) and len(told) == 1  # not asked for


def test_nltk_without_data_is_noticed(monkeypatch, tmp_path):
    from nltk.corpus.reader import CorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr("nltk.corpus.wordnet", LazyCorpusLoader("wordnet", CorpusReader, []))
    assert texts._wordnet() is None


@pytest.mark.usefixtures("small_wordnet")
def test_equal_to_a_reference():
    found = score_texts(PREDICTIONS, [["Nothing.", text] for text in PREDICTIONS])
    assert [found["bleu"], found["rouge_l"], found["chrf"]] == pytest.approx([100, 100, 100])
    assert found["ter"] == 0
    assert found["meteor"] > 99
    single = score_texts(PREDICTIONS[:1], [PREDICTIONS[:1]])
    assert [single["bleu"], single["rouge_l"]] == pytest.approx([100, 100])
    assert single["nist"] > 0
    assert single["cider"] == 0  # one row: no n-gram is rarer than another


@pytest.mark.usefixtures("small_wordnet")
def test_empty_predictions_find_nothing():
    found = score_texts([""] * len(ROWS), REFERENCES)
    lengths = [[len(text.split()) for text in row] for row in REFERENCES]  # to insert: the words of the shortest
    edits = sum(map(min, lengths)) / sum(sum(row) / len(row) for row in lengths)
    assert found == {name: pytest.approx(100 * edits) if name == "ter" else 0 for name in NAMES}
    some = score_texts(["", *PREDICTIONS[1:]], REFERENCES)
    assert all(math.isfinite(value) and value > 0 for value in some.values())


@pytest.mark.usefixtures("small_wordnet")
@pytest.mark.parametrize(("predictions", "references"), [([], []), (["Luna"], [[""]]), (["", "a"], [["", " "], [""]])])
def test_nothing_to_compare_with_is_not_a_number(predictions, references):
    found = score_texts(predictions, references)
    assert list(found) == list(NAMES)
    assert all(math.isnan(value) for value in found.values())


def test_bleu_without_a_single_4_gram_is_not_defined():
    assert math.isnan(score_texts(["Luna is Greek", ""], [["Luna is Greek"], ["a pub"]], ["bleu"])["bleu"])


def test_a_missing_reference_is_no_empty_reference():
    # 0 and 1 edits; the references of a row have 2.5 and 2 words, and not 1, as an empty one beside "c d" would make it
    found = score_texts(["a b", "c"], [["a b c", "a b"], ["c d"]], ["ter"])
    assert found["ter"] == pytest.approx(100 * 1 / 4.5)
    filled = [[*row, *[row[0]] * (4 - len(row))] for row in REFERENCES]  # the same one again changes nothing here
    same = ["bleu", "chrf", "rouge_l"]
    assert score_texts(PREDICTIONS, filled, same) == score_texts(PREDICTIONS, REFERENCES, same)


def test_signature():
    assert signature(REFERENCES).startswith("nrefs:var|case:lc|eff:no|tok:13a|smooth:exp|version:")
    assert signature([["a", "b"], ["c", "d"]]).startswith("nrefs:2|case:lc|")
    assert signature(REFERENCES, "ter").startswith("nrefs:var|case:lc|tok:tercom|")
    assert signature(REFERENCES, "chrf").startswith("nrefs:var|case:mixed|eff:yes|nc:6|nw:0|")


def test_texts_that_look_tokenised_are_no_reason_for_a_warning(caplog):
    score_texts(["Luna is a pub ."] * 100, [["Luna is a pub ."]] * 100, ["bleu"])
    assert not caplog.records


def test_mistakes_are_told():
    with pytest.raises(AssertionError, match="blue"):
        score_texts(PREDICTIONS, REFERENCES, ["blue"])
    with pytest.raises(AssertionError, match="7 predictions, 2 rows"):
        score_texts(PREDICTIONS, REFERENCES[:2])
    with pytest.raises(AssertionError, match="list of references"):
        score_texts(["a"], [[]])
    with pytest.raises(AssertionError, match="list of references"):
        score_texts(["a"], ["a"])  # pyright: ignore[reportArgumentType]
