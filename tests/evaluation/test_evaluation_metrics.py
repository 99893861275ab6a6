"""Metrics against hand-worked values, and predictions that do not depend on how rows are batched."""

from __future__ import annotations

import math

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from hkft.data.tokenise import collator
from hkft.evaluation.metrics import cross_entropy, score, squared_error
from hkft.evaluation.predict import predict


def test_classification_by_hand():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0], [0.0, 2.0]])  # decided 0 1 0 1
    found = score("classification", logits, np.array([0, 1, 1, 1]))
    assert found["accuracy"] == 0.75
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 0 + 1))  # two true, none false, one missed
    assert found["matthews_correlation"] == pytest.approx((2 * 1 - 0 * 1) / math.sqrt(2 * 3 * 1 * 2))


def test_regression_by_hand():
    found = score("regression", np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 2.0]))
    assert found["mse"] == pytest.approx((0 + 1 + 4) / 3)
    assert found["spearman"] == pytest.approx(0.5)
    x, y = np.array([1.0, 2, 4]), np.array([1.0, 3, 2])
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_what_the_data_does_not_define_is_nan():
    found = score("regression", np.ones((4, 1)), np.arange(4.0))
    assert math.isnan(found["pearson"])
    assert math.isnan(found["spearman"])


def test_losses_are_torch_s():
    logits, labels = np.random.randn(7, 3).astype(np.float32), np.array([0, 2, 1, 1, 0, 2, 2])
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels), reduction="none")
    np.testing.assert_allclose(cross_entropy(logits, labels), expected.numpy(), rtol=1e-5)
    assert cross_entropy(np.array([[1000.0, 0.0]]), np.array([1]))[0] == 1000.0
    assert squared_error(np.array([[2.0]]), np.array([0.5]))[0] == 2.25


def test_predictions_keep_the_rows_order_and_do_not_depend_on_the_batch(tiny_bert):
    model = BertForSequenceClassification.from_pretrained(tiny_bert).train()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    texts = ["good film", "the plot of this film was very very sad and grey", "bad", "warm and funny actor"]
    rows = [dict(tokenizer(text), id=10 * n, labels=n % 2) for n, text in enumerate(texts)]
    examples = datasets.Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in rows])
    seen = [predict(model, examples, collator(tokenizer), task="classification", batch_size=size) for size in (1, 3, 4)]
    assert model.training, "the mode is put back"
    for predictions in seen:
        assert predictions.ids == [0, 10, 20, 30]
        np.testing.assert_allclose(predictions.logits, seen[0].logits, atol=1e-5)
    model.eval()
    alone = model(**tokenizer(texts[2], return_tensors="pt")).logits
    np.testing.assert_allclose(seen[1].logits[2], alone[0].detach().numpy(), atol=1e-5)
    record = seen[0].records(("no", "yes"))[1]
    assert record["label"] == "yes"
    assert record["prediction"] == ("no", "yes")[int(seen[0].logits[1].argmax())]
