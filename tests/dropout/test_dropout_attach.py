"""attach() and detach(): where a method lands, who shares what, what is refused and how, and what the report shows."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, CLIPVisionConfig, CLIPVisionModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

import hkft
from hkft import METHODS, Method, Site, attach, attached
from hkft.dropout import attention
from hkft.dropout.attach import Attachment
from hkft.errors import MethodError


@pytest.fixture(autouse=True)
def registries_end_empty() -> Iterator[None]:
    """Every test here gives back what it entered: no name of hkft's stays in transformers' process-wide registries."""
    yield
    if hkft_names():
        gc.collect()  # a copy that a test dropped without detaching
    assert hkft_names() == []


def hkft_names() -> list[str]:
    registries = (AttentionInterface, AttentionMaskInterface)
    return [name for registry in registries for name in registry._global_mapping if "hkft" in name]


def lora(model: Any, *targets: str, **more: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **more)
    return peft.get_peft_model(model, config).train()


def text_of(caught: pytest.ExceptionInfo[MethodError]) -> str:
    return str(caught.value)


def fired(attachment: Attachment) -> dict[int | None, float]:
    return {dropper.layer: dropper.rate for dropper in attachment.droppers if dropper.counted()["calls"]}


# --- layers and schedules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["attention_logits", "hidden"])
@pytest.mark.parametrize(
    ("name", "count", "layers", "expected"),
    [
        ("bert", 4, "auto", [0, 1, 2, 3]),
        ("modernbert", 4, "auto", [0, 1, 2, 3]),
        ("vit", 3, "auto", [0, 1, 2]),
        ("llama", 4, "auto", [2, 3]),
        ("gpt2", 4, "auto", [2, 3]),
        ("llama", 5, "auto", [2, 3, 4]),
        ("llama", 1, "auto", [0]),
        ("llama", 4, "all", [0, 1, 2, 3]),
        ("bert", 4, "latter-half", [2, 3]),
        ("bert", 4, [3, 1], [1, 3]),
        ("llama", 4, [0], [0]),
    ],
)
def test_layers(zoo: Any, name: str, count: int, layers: Any, expected: list[int], position: Any) -> None:
    model = zoo.build(name, layers=count)
    with attach(model, Method([Site(position, "column", rate=0.3, layers=layers)])) as attachment:
        zoo.run(model, zoo.inputs(name))
        assert sorted(fired(attachment)) == expected  # type: ignore[type-var]
        assert attachment.report()[0]["layers"] == expected
        assert attachment.report()[0]["calls"] == len(expected)


def test_albert_shares_one_layer_and_fires_as_often_as_it_is_run(zoo: Any) -> None:
    model = zoo.build("albert", layers=4)
    with attach(model, "hiddenkey-") as attachment:
        zoo.run(model, zoo.inputs("albert"))
        assert [(r["layers"], r["modules"], r["calls"]) for r in attachment.report()] == [([0], 1, 4)] * 2


def test_a_layer_that_is_not_there_is_refused(zoo: Any) -> None:
    model = zoo.build("bert")
    with pytest.raises(MethodError) as caught:
        attach(model, Method([Site("attention_logits"), Site("hidden", layers=[1, 2, 7])]))
    assert text_of(caught) == "layers: BertModel has 2 layers\n  found: [2, 7]\n  allowed: 0 to 1"
    assert attached(model) is None
    attach(model, "dropkey").detach()  # nothing was left half-way


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant", [0.4] * 4), ("linear_up", [0.1, 0.2, 0.3, 0.4]), ("linear_down", [0.4, 0.3, 0.2, 0.1])],
)
@pytest.mark.parametrize("position", ["attention_logits", "attention_weights", "hidden"])
def test_schedules(zoo: Any, position: Any, schedule: Any, rates: list[float]) -> None:
    model = zoo.build("bert", layers=4)
    with attach(model, Method([Site(position, rate=0.4, schedule=schedule)])) as attachment:
        for _ in range(4):
            zoo.run(model, zoo.inputs("bert", rows=8))
        assert fired(attachment) == pytest.approx(dict(enumerate(rates)))
        for dropper in attachment.droppers:
            counted = dropper.counted()
            assert counted["dropped"] / counted["drawn"] == pytest.approx(dropper.rate, abs=0.05)
        (report,) = attachment.report()
        assert report["expected"] == pytest.approx(sum(rates) / 4)
        assert report["measured"] == pytest.approx(sum(rates) / 4, abs=0.03)


def test_a_schedule_runs_over_the_chosen_layers_only(zoo: Any) -> None:
    with attach(zoo.build("llama", layers=4), Method([Site("hidden", rate=0.4, schedule="linear_down")])) as attachment:
        assert {d.layer: d.rate for d in attachment.droppers} == pytest.approx({2: 0.4, 3: 0.2})


def test_report_of_two_equal_sites_counts_each_once(zoo: Any) -> None:
    model = zoo.build("bert")
    with attach(model, Method([Site("hidden", rate=0.1), Site("hidden", rate=0.1)])) as attachment:
        zoo.run(model, zoo.inputs("bert"))
        assert [r["calls"] for r in attachment.report()] == [2, 2]


# --- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dropkey", "dropattention", "hiddencut", "hiddenkey-"])
def test_a_seed_makes_its_own_draws(zoo: Any, name: str) -> None:
    model, batch = zoo.build("bert"), zoo.inputs("bert")

    def two_passes(seed: int) -> list[Tensor]:
        with attach(model, name, rate=0.4, seed=seed), torch.no_grad():
            return [zoo.run(model, batch) for _ in range(2)]

    state = torch.get_rng_state()
    first = two_passes(11)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator was not touched
    torch.manual_seed(99)
    again, other = two_passes(11), two_passes(12)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_without_a_seed_torchs_default_generator_decides(zoo: Any) -> None:
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    with attach(model, "hiddenkey-", rate=0.4):
        assert torch.equal(zoo.run(model, batch, seed=4), zoo.run(model, batch, seed=4))
        assert not torch.equal(zoo.run(model, batch, seed=4), zoo.run(model, batch, seed=5))


def test_layers_and_sites_draw_apart_under_one_seed(zoo: Any) -> None:
    model = zoo.build("bert", layers=3)
    sites = [Site("attention_logits", "column", rate=0.5), Site("hidden", "column", rate=0.5)]
    with attach(model, Method(sites), seed=1) as attachment:
        masks = [d.draw((2, 4, 12, 12), (2, 4, 12), torch.device("cpu")) for d in attachment.droppers]
        assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 6


def test_lora_dropout_obeys_the_seed_or_is_refused(zoo: Any) -> None:
    model, batch = lora(zoo.build("bert"), "query", "value"), zoo.inputs("bert")
    outs = []
    for default in (1, 2):
        try:
            attachment = attach(model, "lora-dropout", rate=0.5, seed=7)
        except MethodError:
            return
        with attachment:
            outs.append(zoo.run(model, batch, seed=default))
    assert torch.equal(*outs)


def enable_checkpointing(model: Any) -> None:
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


def test_a_seed_with_checkpointing_is_refused(zoo: Any) -> None:
    model = zoo.build("bert")
    enable_checkpointing(model)
    with pytest.raises(MethodError) as caught:
        attach(model, "dropkey", seed=1)
    assert text_of(caught) == (
        "gradient checkpointing replays torch's default generator only\n  hint: attach without a seed"
    )
    assert attached(model) is None
    attach(model, "dropkey").detach()


def test_a_seed_with_checkpointing_enabled_afterwards_is_refused(zoo: Any) -> None:
    model = zoo.build("bert")
    with attach(model, "dropkey", rate=0.5, seed=1):
        enable_checkpointing(model)
        with pytest.raises(MethodError, match="gradient checkpointing"):
            zoo.run(model, zoo.inputs("bert"))


def test_a_seed_with_checkpointing_enabled_between_two_steps_is_refused(zoo: Any) -> None:
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    with attach(model, "dropkey", rate=0.5, seed=1):
        zoo.run(model, batch)
        enable_checkpointing(model)
        with pytest.raises(MethodError, match="gradient checkpointing"):
            zoo.run(model, batch)


# --- several models ---------------------------------------------------------------------------------------------------


def test_two_models_with_two_methods_do_not_meet(zoo: Any) -> None:
    bert, llama = zoo.build("bert"), zoo.build("llama", backend="eager")
    batches = zoo.inputs("bert"), zoo.inputs("llama")
    first = attach(bert, Method([Site("attention_logits", "column", rate=0.2)]))
    second = attach(llama, Method([Site("attention_weights", "span", rate=0.6, layers="all")]))
    for _ in range(2):
        zoo.run(bert, batches[0])
        zoo.run(llama, batches[1])
    assert [(r["position"], r["expected"], r["calls"]) for a in (first, second) for r in a.report()] == [
        ("attention_logits", 0.2, 4),
        ("attention_weights", 0.6, 4),
    ]
    assert second.report()[0]["measured"] == pytest.approx(0.6, abs=0.02)
    first.detach()
    assert torch.equal(zoo.run(bert, batches[0]), zoo.run(bert, batches[0]))
    assert not torch.equal(zoo.run(llama, batches[1]), zoo.run(llama, batches[1]))
    assert bert.config._attn_implementation == "sdpa"
    second.detach()
    assert llama.config._attn_implementation == "eager"
    assert torch.equal(zoo.run(llama, batches[1]), zoo.run(llama, batches[1]))


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_models_that_share_one_configuration_object(zoo: Any, first_out: int) -> None:
    one = zoo.build("bert")
    two, bystander = (type(one)(one.config).train() for _ in range(2))
    assert two.config is one.config
    batch = zoo.inputs("bert")
    quiet = zoo.run(bystander, batch)
    models = [one, two]
    attachments = [attach(one, "dropkey", rate=0.2), attach(two, "dropattention", rate=0.6)]
    for model in models:
        zoo.run(model, batch)
    assert [a.report()[0]["calls"] for a in attachments] == [2, 2]
    assert torch.equal(zoo.run(bystander, batch), quiet)  # it goes through hkft's function, which hands over
    attachments[first_out].detach()
    out, still = models[first_out], models[1 - first_out]
    assert torch.equal(zoo.run(out, batch), zoo.run(out, batch))
    assert not torch.equal(zoo.run(still, batch), zoo.run(still, batch))
    attachments[1 - first_out].detach()
    assert one.config._attn_implementation == "sdpa"
    assert all(torch.equal(zoo.run(m, batch), zoo.run(m, batch)) for m in models)
    assert torch.equal(zoo.run(bystander, batch), quiet)


def copied(how: str, model: Any) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "peft"])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_an_attached_model_lives_its_own_life(zoo: Any, how: str, seed: int | None, wrapped: bool) -> None:
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    if wrapped:
        model = lora(model, "query", "value")
    original = attach(model, "hiddenkey-", rate=0.4, seed=seed)
    zoo.run(model, batch)
    twin = copied(how, model)
    mine = attached(twin)
    assert mine is not None
    assert mine is not original
    assert mine.family.model is not original.family.model
    before = [r["calls"] for r in original.report()]
    zoo.run(twin, batch)
    assert [r["calls"] for r in original.report()] == before  # nothing is shared
    assert [r["calls"] for r in mine.report()] == [c + 2 for c in before]
    original.detach()
    assert torch.equal(zoo.run(model, batch), zoo.run(model, batch))
    assert mine.attached
    assert not torch.equal(zoo.run(twin, batch), zoo.run(twin, batch))
    twin.eval()
    assert torch.equal(zoo.run(twin, batch), zoo.run(model.eval(), batch))
    twin.train()
    mine.detach()
    assert attached(twin) is None
    assert torch.equal(zoo.run(twin, batch), zoo.run(twin, batch))
    assert twin.config._attn_implementation == "sdpa"


def test_a_copy_that_is_thrown_away_does_not_hold_the_registries(zoo: Any) -> None:
    model = zoo.build("bert")
    with attach(model, "dropkey"):
        twin = copy.deepcopy(model)
        del twin
        gc.collect()
    assert hkft_names() == []


# --- once, and back ---------------------------------------------------------------------------------------------------


def test_a_second_method_is_refused(zoo: Any) -> None:
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    wrapper = nn.Sequential(model)
    with attach(model, "dropkey", rate=0.4) as attachment:
        for again in (model, wrapper):
            with pytest.raises(MethodError) as caught:
                attach(again, "hiddencut")
            assert text_of(caught) == "BertModel already has a method\n  hint: detach() it first"
        assert attached(model) is attachment
        assert attached(wrapper) is attachment
        zoo.run(model, batch)
        assert attachment.report()[0]["calls"] == 2


def test_detach_twice_and_detach_late_are_harmless(zoo: Any) -> None:
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    first = attach(model, "dropkey", rate=0.4)
    first.detach()
    first.detach()
    second = attach(model, "hiddenkey-", rate=0.4)
    first.detach()  # the old one must not take the new one off
    assert second.attached
    assert not first.attached
    assert not torch.equal(zoo.run(model, batch), zoo.run(model, batch))
    second.detach()
    assert model.config._attn_implementation == "sdpa"


def test_an_exception_inside_the_block_detaches_and_passes_on(zoo: Any) -> None:
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    with pytest.raises(ZeroDivisionError), attach(model, "hiddenkey-", rate=0.4):
        raise ZeroDivisionError
    assert attached(model) is None
    assert torch.equal(zoo.run(model, batch), zoo.run(model, batch))


def test_plain_training_touches_nothing(zoo: Any) -> None:
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    bare = zoo.run(model, batch)
    with attach(model, "none") as attachment:
        assert attachment.report() == []
        assert hkft_names() == []
        assert torch.equal(zoo.run(model, batch), bare)


def test_a_name_or_a_method_and_a_rate_for_what_is_open(zoo: Any) -> None:
    model = zoo.build("bert")
    with attach(model, "hiddenkey-") as attachment:
        assert [r["expected"] for r in attachment.report()] == pytest.approx([0.1, 0.1])
    with attach(model, Method([Site("hidden", rate=0.3), Site("input")]), rate=0.2) as attachment:
        assert [r["expected"] for r in attachment.report()] == pytest.approx([0.3, 0.2])
    with pytest.raises(MethodError, match="there is no method 'hidenkey'"):
        attach(model, "hidenkey")
    with pytest.raises(MethodError, match="a dropout rate is a probability"):
        attach(model, "dropkey", rate=1.0)


def test_the_library_names() -> None:
    assert hkft.attach is attach
    assert hkft.METHODS is METHODS


# --- PEFT -------------------------------------------------------------------------------------------------------------


def test_after_peft_the_lora_update_is_inside_what_is_dropped(zoo: Any) -> None:
    model = lora(zoo.build("llama"), "q_proj", "down_proj")
    seen: list[Tensor] = []
    with attach(model, Method([Site("hidden", "column", rate=0.5, layers="all")])) as attachment:
        layer = attachment.family.layers[0]
        assert isinstance(layer.ffn_output, peft.tuners.lora.Linear)
        handle = layer.ffn_output.register_forward_hook(lambda _m, _a, out: seen.append(out))
        zoo.run(model, zoo.inputs("llama"))
        handle.remove()
    rows = seen[0].abs().sum(-1)
    assert (rows == 0).any()
    assert (rows > 0).any()


def test_before_peft_what_lora_does_not_wrap_works_alike(zoo: Any) -> None:
    base, batch = zoo.build("llama"), zoo.inputs("llama")
    attachment = attach(base, "hiddenkey-", rate=0.4)
    model = lora(base, "q_proj", "v_proj")
    assert attached(model) is attachment
    assert not torch.equal(zoo.run(model, batch), zoo.run(model, batch))
    assert [r["calls"] for r in attachment.report()] == [2, 2]
    attachment.detach()
    assert torch.equal(zoo.run(model, batch), zoo.run(model, batch))


def test_before_peft_a_hidden_site_that_lora_escapes_is_refused(zoo: Any) -> None:
    base = zoo.build("llama")
    with attach(base, Method([Site("hidden", "column", rate=0.5, layers="all")])):
        model = lora(base, "down_proj")
        with pytest.raises(MethodError):
            zoo.run(model, zoo.inputs("llama"))


def test_before_peft_embeddings_that_lora_wraps_are_refused(zoo: Any) -> None:
    base = zoo.build("llama")
    with attach(base, Method([Site("input", rate=0.5)])):
        model = lora(base, "embed_tokens")
        with pytest.raises(MethodError) as caught:
            zoo.run(model, zoo.inputs("llama"))
    assert text_of(caught) == (
        "LlamaForCausalLM was wrapped after attaching, outside input\n"
        "  hint: attach() to the model that is trained, after PEFT has wrapped it"
    )


def test_detaching_after_the_adapter_is_gone_brings_nothing_back(zoo: Any) -> None:
    model = lora(zoo.build("bert"), "query")
    attachment = attach(model, "lora-dropout")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["query"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    attachment.detach()
    assert [n for n, _ in model.named_modules() if n.endswith("lora_dropout.default")] == []


def test_lora_dropout_is_pefts_own(zoo: Any) -> None:
    """Same modules, and under one seed the same numbers, as an adapter built with lora_dropout."""
    batch = zoo.inputs("bert")
    torch.manual_seed(2)
    theirs = lora(zoo.build("bert"), "query", "value", lora_dropout=0.3)
    torch.manual_seed(2)
    ours = lora(zoo.build("bert"), "query", "value")
    with attach(ours, "lora-dropout", rate=0.3) as attachment:
        for seed in range(3):
            assert torch.equal(zoo.run(ours, batch, seed), zoo.run(theirs, batch, seed))
        assert not torch.equal(zoo.run(ours, batch, 0), zoo.run(ours, batch, 1))
        assert dropouts(ours) == dropouts(theirs) == {("Dropout", 0.3)}
        (report,) = attachment.report()
        assert {k: report[k] for k in ("modules", "calls", "layers", "expected", "measured")} == {
            "modules": 4,
            "calls": 20,
            "layers": [0, 1],
            "expected": pytest.approx(0.3),
            "measured": None,
        }
        ours.eval()
        theirs.eval()
        assert torch.equal(zoo.run(ours, batch), zoo.run(theirs, batch))
        ours.train()
    assert dropouts(ours) == {("Identity", None)}
    assert torch.equal(zoo.run(ours, batch), zoo.run(ours, batch))


def dropouts(model: nn.Module) -> set[tuple[str, float | None]]:
    found = [m for n, m in model.named_modules() if n.split(".")[-2:-1] == ["lora_dropout"]]
    return {(type(m).__name__, getattr(m, "p", None)) for m in found}


def test_lora_dropout_in_expectation_is_no_dropout(zoo: Any) -> None:
    """The distribution: kept inputs of A are scaled by 1/(1-p), the share dropped is p."""
    model = lora(zoo.build("bert"), "query")
    with attach(model, "lora-dropout", rate=0.25):
        (module, *_) = [m for n, m in model.named_modules() if n.endswith("lora_dropout.default")]
        out = module(torch.ones(200, 200))
    assert float((out == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])


def test_lora_dropout_without_lora_or_beside_another_is_refused(zoo: Any) -> None:
    bare = zoo.build("bert")
    with pytest.raises(MethodError) as caught:
        attach(bare, "lora-dropout")
    assert text_of(caught) == (
        "lora_input drops in LoRA's update, and encoder.layer.0 has none\n"
        "  hint: wrap the model with peft.get_peft_model first; adapters such as AdaLoRA keep A and B in other modules"
    )
    own = lora(bare, "query", lora_dropout=0.2)
    with pytest.raises(MethodError) as caught:
        attach(own, "lora-dropout")
    assert text_of(caught) == (
        "the adapter already has a lora_dropout of its own\n"
        "  hint: build it with lora_dropout=0.0, and let the method set the rate"
    )
    assert attached(own) is None
    assert dropouts(own) == {("Dropout", 0.2)}


def test_prefix_tuning_brings_keys_that_no_query_stands_for(zoo: Any) -> None:
    """K > Q > 1: finite, different in train mode, and still causal."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(zoo.build("llama"), config).train()
    batch = zoo.inputs("llama")
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 8] = 5
    for name in ("dropkey", "dropattention"):
        with attach(model, name, rate=0.5):
            first, second = zoo.run(model, batch, 3), zoo.run(model, changed, 3)
            torch.testing.assert_close(first[:, :8], second[:, :8], atol=1e-5, rtol=1e-5)
            assert not torch.allclose(first[:, 8:], second[:, 8:])
            assert not torch.equal(first, zoo.run(model, batch, 4))


@pytest.mark.parametrize("name", ["dropkey", "dropattention", "hiddenkey-"])
def test_generating_in_train_mode_with_a_cache_works(zoo: Any, name: str) -> None:
    """Someone who forgets eval(): one query, many keys. Odd, but it must not fall over."""
    model, batch = zoo.build("llama"), zoo.inputs("llama", padding="left", real=5)
    with attach(model, name, rate=0.5):
        assert model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (2, 16)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["flash_attention_2", "flex_attention"])
def test_a_backend_that_would_bypass_the_method_is_refused(zoo: Any, backend: str) -> None:
    model, batch = zoo.build("llama"), zoo.inputs("llama")
    model.config._attn_implementation_internal = backend  # as if loaded so: neither is to be had on every machine
    with pytest.raises(MethodError) as caught:
        attach(model, "dropkey")
    assert text_of(caught) == (
        f"attn_implementation: the {backend} attention would bypass the method\n  found: {backend}\n"
        "  allowed: sdpa, eager\n  hint: model.set_attn_implementation('sdpa'), "
        "or load it with attn_implementation='sdpa'"
    )
    assert attached(model) is None
    assert model.config._attn_implementation == backend
    model.set_attn_implementation("sdpa")
    with attach(model, "hiddencut", rate=0.4):  # and what does not touch attention needs no backend
        zoo.run(model, batch)


def test_the_ffn_of_a_mixture_of_experts_is_refused_but_its_attention_works(zoo: Any) -> None:
    model, batch = zoo.build("mixtral"), zoo.inputs("mixtral")
    with pytest.raises(MethodError) as caught:
        attach(model, "hiddenkey-")
    assert text_of(caught) == (
        "hidden: the FFN output of model.layers.1 is not certain to be that of one linear map: it is a mixture of experts\n"
        "  hint: the attention positions work on this model"
    )
    assert attached(model) is None
    for name in ("dropkey", "dropattention"):
        with attach(model, name, rate=0.4) as attachment:
            assert not torch.equal(zoo.run(model, batch), zoo.run(model, batch))
            assert attachment.report()[0]["layers"] == [1]


def test_attention_sinks_are_refused(zoo: Any) -> None:
    with pytest.raises(MethodError) as caught:
        attach(zoo.build("gpt-oss", backend="eager"), "dropkey")
    assert text_of(caught) == (
        "model.layers.0.self_attn: GptOssAttention has attention sinks, which take part in the softmax"
    )


@pytest.mark.parametrize(("name", "kind"), [("falcon", "FalconForCausalLM"), ("bloom", "BloomForCausalLM")])
def test_attention_outside_the_interface_is_refused(zoo: Any, name: str, kind: str) -> None:
    model = zoo.build(name, backend="eager")
    with pytest.raises(MethodError) as caught:
        attach(model, "dropkey")
    assert text_of(caught) == (
        f"{kind} does not take its attention from transformers' AttentionInterface\n"
        "  hint: hkft acts there; families that write attention out in their own forward cannot be served"
    )
    assert attached(model) is None


def test_embeddings_that_are_a_convolution_are_refused() -> None:
    """CLIP's: its output is [B,D,H,W], where the last size is no token's."""
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(MethodError) as caught:
        attach(CLIPVisionModel(config), Method([Site("input", rate=0.5)]))
    assert text_of(caught) == (
        "input: CLIPVisionModel embeds its inputs by a convolution, whose output is not [B,L,D]\n"
        "  hint: use another position"
    )


def test_a_span_of_tokens_is_refused_where_samples_share_a_row() -> None:
    """Qwen2-VL's vision: the patches of all images stand in one [N,D]; elements and tokens may still be dropped."""
    sizes = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    config = Qwen2VLVisionConfig(**sizes, spatial_merge_size=2, temporal_patch_size=1)
    model = Qwen2VisionTransformerPretrainedModel(config).train()
    patches, grid = torch.randn(24, 48), torch.tensor([[1, 4, 4], [1, 2, 4]])
    for pattern in ("element", "column"):
        with attach(model, Method([Site("hidden", pattern, rate=0.5)])) as attachment:
            model(patches, grid)
            assert 0 < attachment.report()[0]["measured"] < 1
    with attach(model, Method([Site("hidden", "span", rate=0.5)])), pytest.raises(MethodError) as caught:
        model(patches, grid)
    assert text_of(caught) == (
        "pattern of hidden: this model has the tokens of all samples in one row, and a span would run across them\n"
        "  found: span\n  allowed: element, column"
    )


def test_a_model_that_is_not_of_transformers_is_refused() -> None:
    with pytest.raises(MethodError) as caught:
        attach(nn.Linear(2, 2), "dropkey")
    assert text_of(caught) == (
        "there is no transformers model in Linear\n  hint: pass a PreTrainedModel, or a PEFT model around one"
    )


# --- what happens inside ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["attention_logits", "attention_weights"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "llama", "mistral"])
def test_a_column_is_the_same_key_for_every_query_of_a_head(
    zoo: Any, name: str, position: Any, padding: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights as the kernel has them, read off by calling it once more with the identity for values."""
    function = "dropkey" if position == "attention_logits" else "dropattention"
    real = getattr(attention, function)
    weights: list[Tensor] = []
    rescued: list[Tensor | None] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, **kwargs: Any) -> Tensor:
        eye = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
        weights.append(real(q, k, eye, keep, **kwargs).detach())
        rescued.append(kwargs["rescued"])
        return real(q, k, v, keep, **kwargs)

    monkeypatch.setattr(attention, function, spy)
    model, batch = zoo.build(name), zoo.inputs(name, padding=padding, real=8)
    with attach(model, Method([Site(position, "column", rate=0.5, layers="all")])):
        zoo.run(model, batch)
        zoo.run(model, batch)
    assert len(weights) == 4
    seen = set()
    for w, rescue in zip(weights, rescued, strict=True):
        sample, length = 1, w.shape[-1]  # the one without padding
        may = torch.ones(length, length, dtype=torch.bool)
        if name in ("gpt2", "llama", "mistral"):
            may = may.tril()
        if name == "mistral":
            may = may.triu(-4)
        rows = torch.ones(4, length, dtype=torch.bool) if rescue is None else ~rescue[sample, :, :, 0]
        if name != "modernbert":  # its first layer is global, its second local: each its own window
            for head in range(4):
                gone = (w[sample, head] < 1e-9) & may
                for key in range(length):
                    concerned = may[:, key] & rows[head]
                    assert gone[concerned, key].all() or not gone[concerned, key].any(), (head, key)
        if name not in ("mistral", "modernbert"):
            seen |= {tuple((w[sample, head, -1] < 1e-9).tolist()) for head in range(4)}
        assert torch.allclose(w[sample].sum(-1), torch.ones(4, length), atol=1e-4)
    if seen:
        assert len(seen) > 8  # of 16: heads, layers and passes draw apart


def test_proof_a_site_that_cannot_fire_raises(zoo: Any) -> None:
    """Someone swaps a layer behind the attachment's back: the first training pass says so."""
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    with attach(model, "hiddencut", rate=0.3):
        model.encoder.layer[1].output.dense = nn.Linear(64, 32)
        with pytest.raises(MethodError) as caught:
            zoo.run(model, batch)
    assert text_of(caught) == (
        "BertModel went through a training pass without firing hidden of layer 1\n"
        "  hint: attach() to the model that is trained, after PEFT has wrapped it, with all its layers in train mode, "
        "and leave its attention implementation as it is"
    )


def test_proof_another_path_through_the_attention_raises(zoo: Any) -> None:
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    with attach(model, "dropkey", rate=0.3):
        model.set_attn_implementation("eager")
        with pytest.raises(
            MethodError, match=r"without firing attention_logits of layer 0, attention_logits of layer 1"
        ):
            zoo.run(model, batch)


def test_proof_looks_at_training_passes_only(zoo: Any) -> None:
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    with attach(model, "hiddenkey-", rate=0.3):
        zoo.run(model.eval(), batch)
        zoo.run(model.train(), batch)


def test_proof_through_peft_and_a_wrapper_of_ones_own(zoo: Any) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **batch: Tensor) -> Tensor:
            return self.inner(**batch)[0]

    model = Wrapper(lora(zoo.build("gpt2"), "c_attn", fan_in_fan_out=True)).train()
    with attach(model, "hiddenkey-", rate=0.3) as attachment:
        model(**zoo.inputs("gpt2"))
        assert [r["calls"] for r in attachment.report()] == [1, 1]


def test_a_forgotten_train_shows_in_the_report(zoo: Any) -> None:
    model, batch = zoo.build("llama").eval(), zoo.inputs("llama")  # as from_pretrained returns it
    with attach(model, "hiddenkey", rate=0.3) as attachment:
        for _ in range(3):
            zoo.run(model, batch).sum().backward()
        for report in attachment.report():
            assert (report["calls"], report["measured"]) == (0, None)
            assert report["expected"] == pytest.approx(0.3)


def test_report_record(zoo: Any) -> None:
    model = zoo.build("bert")
    with attach(model, "dropattention", rate=0.25) as attachment:
        zoo.run(model, zoo.inputs("bert"))
        (report,) = attachment.report()
        measured, protected = report.pop("measured"), report.pop("protected")
        assert report == {
            "position": "attention_weights",
            "pattern": "column",
            "rescale": "normalised",
            "layers": [0, 1],
            "modules": 2,
            "calls": 2,
            "expected": 0.25,
            "cost": None,
        }
        assert protected == 0  # with 12 keys, no row of BERT loses all of them
        assert measured == pytest.approx(0.25, abs=0.12)


@pytest.mark.parametrize("position", ["attention_logits", "attention_weights"])
@pytest.mark.parametrize("pattern", ["element", "column"])
def test_native_attention_dropout_is_kept_where_the_recipe_keeps_it(zoo: Any, position: Any, pattern: Any) -> None:
    """Rate 1e-12 of ours beside 0.5 of BERT's own: their dropout must still act."""
    model, batch = zoo.build("bert", layers=1), zoo.inputs("bert")
    with torch.no_grad():
        clean = zoo.run(model, batch)
        for module in model.modules():
            if isinstance(getattr(module, "attention_dropout", None), nn.Dropout):
                module.attention_dropout.p = 0.5
            elif type(module).__name__ == "BertSelfAttention":
                module.dropout.p = 0.5
        with attach(model, Method([Site(position, pattern, rate=1e-12)])):
            assert not torch.allclose(zoo.run(model, batch), clean, atol=1e-3)
