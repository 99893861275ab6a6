"""HiddenCut's own start of a span: among the 40 % of tokens that the layer's attention looks at most."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from hkft import Method, Site, attach
from hkft.dropout.hidden import most_attended
from hkft.dropout.masks import span, uniform
from hkft.errors import MethodError

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def by_hand(weights: Tensor) -> Tensor:
    """weights [B,H,Q,K] -> [B,K]."""
    received = weights.sum((1, 2))
    chosen = torch.zeros_like(received, dtype=torch.bool)
    for row, values in enumerate(received):
        count = math.ceil(0.4 * int((values > 0).sum()))
        chosen[row, values.topk(count).indices] = True
    return chosen


@pytest.mark.parametrize("kind", ["open", "padded", "bias", "softcap"])
@pytest.mark.parametrize("queries", [12, 300])  # below and above a block
def test_the_tokens_are_those_of_the_weights_written_out(kind: str, queries: int) -> None:
    torch.manual_seed(3)
    q, k = (torch.randn(2, 3, queries, 8) for _ in range(2))
    logits, mask, softcap = 0.5 * q @ k.transpose(-1, -2), None, None
    if kind == "padded":
        mask = torch.ones(2, 1, 1, queries, dtype=torch.bool)
        mask[0, ..., 5:] = False
        logits = logits.masked_fill(~mask, float("-inf"))
    elif kind == "bias":
        mask = torch.randn(1, 3, queries, queries)
        logits = logits + mask
    elif kind == "softcap":
        softcap = 2.0
        logits = softcap * torch.tanh(logits / softcap)
    found = most_attended(q, k, mask=mask, scale=0.5, softcap=softcap)
    assert torch.equal(found, by_hand(torch.softmax(logits, -1)))


def test_a_span_begins_at_a_likely_unit_or_ends_at_the_last() -> None:
    torch.manual_seed(0)
    likely = torch.zeros(500, 20, dtype=torch.bool)
    likely[:, [3, 9, 19]] = True
    keep = span((500, 20, 4), (500, 20), 0.25, uniform(torch.device("cpu")), likely)
    starts = (~keep).int().argmax(-1)
    assert (~keep).sum(-1).eq(5).all()  # 0.25 x 20, also where the start stands too near to the end
    counts = {int(start): int((starts == start).sum()) for start in starts.unique()}
    assert counts.keys() == {3, 9, 15}  # 19 is moved back
    assert all(abs(count - 500 / 3) < 5 * (500 * 2 / 9) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("beside", [[], [Site("attention_logits", "column", 0.1)]], ids=["alone", "with dropkey"])
@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "electra", "distilbert", "modernbert"])
def test_every_span_begins_where_the_layer_attends(zoo: Any, name: str, beside: list[Site]) -> None:
    """Seen from outside: the start of the run of zeros in each FFN output, against the weights the model itself returns."""
    model, batch = zoo.build(name, backend="eager"), zoo.inputs(name, rows=6)
    model.eval()
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions[0]
    model.train()
    method = Method([Site("hidden", "span", 0.2, [0], start="attended"), *beside])
    with attach(model, method) as attachment:
        ffn, seen = attachment.family.layers[0].ffn_output, []
        assert ffn is not None
        handle = ffn.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
        for _ in range(10):
            zoo.run(model, batch)
        handle.remove()
    if name == "modernbert":  # its own weights are those of a window; the first layer is global
        assert weights.shape[-1] == 12
    chosen = by_hand(weights)
    for out in seen:
        gone = (out == 0).all(-1).view(6, 12)
        for row in range(6):
            length, start = int(gone[row].sum()), int(gone[row].int().argmax())
            assert length in (2, 3)  # 0.2 x 12
            assert chosen[row, start] or (start == 12 - length and chosen[row, start:].any())


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_a_decoder_is_refused(zoo: Any, name: str) -> None:
    """Which earlier tokens are cut would tell of the later ones: law 4."""
    with pytest.raises(MethodError, match="must not hang on tokens that come after them"):
        attach(zoo.build(name), "hiddencut-span")


def test_an_ffn_in_chunks_is_refused() -> None:
    """Each chunk would lose a span of its own."""
    config = BertConfig(**SMALL, chunk_size_feed_forward=4)
    for start in ("attended", "uniform"):
        with pytest.raises(MethodError, match="the FFN sees the tokens in chunks") as caught:
            attach(BertModel(config), Method([Site("hidden", "span", start=start)]))  # type: ignore[arg-type]
        assert caught.value.problems[0].where == "chunk_size_feed_forward"
    with attach(BertModel(config).train(), Method([Site("hidden", "column", 0.5)])) as attachment:
        attachment.family.model(input_ids=torch.full((2, 8), 3))
        assert attachment.report()[0]["calls"] == 4


def test_an_attention_in_eval_mode_guides_nothing_and_says_so(zoo: Any) -> None:
    model = zoo.build("bert")
    model.encoder.layer[0].attention.eval()
    with attach(model, "hiddencut-span"), pytest.raises(MethodError, match="told nothing of where a span may start"):
        zoo.run(model, zoo.inputs("bert"))


def test_in_eval_mode_and_after_detaching_nothing_is_guided(zoo: Any) -> None:
    model, batch = zoo.build("bert").eval(), zoo.inputs("bert")
    before = zoo.run(model, batch)
    with attach(model, "hiddencut-span"):
        assert torch.equal(zoo.run(model, batch), before)
    assert model.config._attn_implementation == "sdpa"
    assert not any("_hkft" in key for module in model.modules() for key in module.__dict__)
