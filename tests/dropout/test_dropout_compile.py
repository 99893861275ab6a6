"""torch.compile over a model with a method: one graph, no breaks, no compiling anew at every step, and true counts.

In a process of its own: the shape checks that these tests put around every function of hkft cannot be traced.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

CODE = """
import json, torch
from torch._dynamo.testing import CompileCounter
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from hkft import Method, Site, attach

SIZE = dict(vocab_size=64, hidden_size=32, num_attention_heads=4, intermediate_size=64)
OFF = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
MODELS = {
    "bert": lambda depth: BertModel(BertConfig(**SIZE, **OFF, num_hidden_layers=depth)),
    "llama": lambda depth: LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=2, num_hidden_layers=depth)),
}
METHODS = {
    "hiddenkey-": [Site("attention_logits", "column", layers="all"), Site("hidden", layers="all")],
    "dropattention": [Site("attention_weights", "column", layers="all")],
    "spans": [Site("attention_logits", "span", layers="all"), Site("hidden", "span", layers="all")],
    "attended": [Site("attention_logits", "span", layers="all"), Site("hidden", "span", layers="all", start="attended")],
}
ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(7))
mask = torch.ones_like(ids)
mask[0, 8:] = 0
batch = {"input_ids": ids, "attention_mask": mask}
found = {}
for kind, build in MODELS.items():
    for name, sites in METHODS.items():
        if (kind, name) == ("llama", "attended"):  # refused: a decoder
            continue
        torch.manual_seed(1)
        torch._dynamo.reset()
        depth = 2 if name == "hiddenkey-" else 1  # tracing a layer takes a second, every time
        model, counter = build(depth).train(), CompileCounter()
        with attach(model, Method(sites), rate=0.3) as attachment:
            compiled = torch.compile(model, backend=counter, fullgraph=True)
            outputs = []
            for step in range(40):
                torch.manual_seed(step)
                outputs.append(compiled(**batch)[0])
            reports = attachment.report()
            outputs[-1].square().sum().backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            model.zero_grad()
            torch.manual_seed(39)
            eager = model(**batch)[0]
            eager.square().sum().backward()
            again = [p.grad for p in model.parameters() if p.grad is not None]
            graphs = counter.frame_count
            seen = []  # without a mask
            for length in (9, 7, 10, 8, 11):
                seen.append([compiled(input_ids=ids[:, :length])[0].shape[1], counter.frame_count])
        found[f"{kind} {name}"] = {
            "graphs": graphs,
            "different": len({out[1, -1, 3].item() for out in outputs}),
            "calls": [site["calls"] / depth for site in reports],
            "measured": [site["measured"] for site in reports],
            "away": max((a - b).abs().max().item() for a, b in zip([eager, *again], [outputs[-1], *gradients])),
        }
        found[f"{kind} {name}"]["lengths"] = [length for length, _ in seen]
        found[f"{kind} {name}"]["graphs by length"] = [count for _, count in seen]
print(json.dumps(found))
"""
NAMES = [f"{kind} {name}" for kind in ("bert", "llama") for name in ("hiddenkey-", "dropattention", "spans")] + [
    "bert attended"
]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_true_counts_and_eagers_numbers(found: dict[str, Any], name: str) -> None:
    """fullgraph=True raises at any break. The same seed gives eager's own output and gradients."""
    result = found[name]
    assert result["graphs"] <= 2  # once, and once more when the counts are there
    assert result["different"] == 40  # masks are drawn at every step, not baked in
    assert set(result["calls"]) == {40}  # of a layer
    assert result["measured"] == pytest.approx([0.3] * len(result["measured"]), abs=0.05)
    assert result["away"] < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_other_lengths_are_not_compiled_each(found: dict[str, Any], name: str) -> None:
    """From the second length on, the sequence's is one that varies: nothing of a method bakes it in."""
    assert found[name]["lengths"] == [9, 7, 10, 8, 11]
    assert len(set(found[name]["graphs by length"][1:])) == 1
