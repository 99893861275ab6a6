"""In every training pass each site fires in each layer that runs: a method that stops acting is found at once."""

from __future__ import annotations

import itertools
import sys
import threading
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import hkft
from hkft import Method, Site, attach
from hkft.dropout import interface
from hkft.errors import MethodError

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PIXELS = torch.zeros(1, 3, 24, 24)


def llava() -> Any:
    """A decoder with eyes: two towers in one model, of which a batch without images runs one."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**SIZE, vocab_size=64)
    vision = transformers.CLIPVisionConfig(**SIZE, image_size=24, patch_size=8)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=5)
    config.vision_feature_layer = -1
    return transformers.LlavaForConditionalGeneration(config).train()


def lora(model: Any, *targets: str) -> Any:
    return get_peft_model(model, LoraConfig(target_modules=list(targets))).train()


def backends(model: Any) -> tuple[str, ...]:
    config = model.config
    return tuple(each._attn_implementation for each in (config, config.vision_config, config.text_config))


@pytest.mark.parametrize("name", ["dropkey", "dropattention"])
def test_an_attention_set_by_somebody_else_is_found_and_stays_theirs(zoo: Any, name: str) -> None:
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    with attach(model, name, rate=0.3):
        zoo.run(model, batch)
        model.set_attn_implementation("eager")
        with pytest.raises(MethodError, match="without firing attention_") as caught:
            zoo.run(model, batch)
        assert "leave its attention implementation as it is" in str(caught.value)
    assert model.config._attn_implementation == "eager"


def test_another_adapter_made_active_is_found(zoo: Any) -> None:
    model, batch = lora(zoo.build("llama"), "q_proj"), zoo.inputs("llama")
    with attach(model, "lora-dropout", rate=0.5):
        model(**batch)
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
        model.set_adapter("other")
        with pytest.raises(MethodError, match="without firing lora_input"):
            model(**batch)
        model.delete_adapter("default")  # detaching is no trouble
    model(**batch)


def test_a_layer_in_eval_mode_is_found(zoo: Any) -> None:
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    with attach(model, "hiddencut", rate=0.3):
        zoo.run(model, batch)
        model.encoder.layer[0].eval()
        with pytest.raises(MethodError, match="without firing hidden of layer 0") as caught:
            zoo.run(model, batch)
        assert "with all its layers in train mode" in str(caught.value)


def test_a_reference_pass_without_adapters_is_not_judged(zoo: Any) -> None:
    model, batch = lora(zoo.build("llama"), "q_proj"), zoo.inputs("llama")
    with attach(model, "lora-dropout", rate=0.3) as attachment:
        for _ in range(2):
            with model.disable_adapter(), torch.no_grad():
                model(**batch)
            model(**batch)
        assert attachment.report()[0]["calls"] == 2 * 2


@pytest.mark.parametrize("seed", range(6))
def test_layers_that_the_model_drops_itself_need_not_fire(seed: int) -> None:
    config = transformers.M2M100Config(
        vocab_size=64, d_model=32, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        encoder_layerdrop=0.5, decoder_layerdrop=0.5,
    )  # fmt: skip
    model = transformers.M2M100ForConditionalGeneration(config).train()
    tokens = torch.randint(6, 64, (2, 6))
    with attach(model, Method([Site("attention_logits", "column", layers="all"), Site("hidden", layers="all")])):
        torch.manual_seed(seed)
        for _ in range(3):
            model(input_ids=tokens, labels=tokens).loss.backward()


def test_a_batch_without_images_spares_the_tower_that_sees() -> None:
    model, tokens = llava(), torch.randint(6, 64, (1, 8))
    with attach(model, "dropkey", rate=0.3) as attachment:
        model(input_ids=tokens)
        seeing = torch.cat([torch.full((1, 9), 5), tokens], 1)
        model(input_ids=seeing, pixel_values=PIXELS)
        layers = {attachment.family.layers[n].name.split(".")[1] for n in attachment.report()[0]["layers"]}
        assert layers == {"vision_tower", "language_model"}
        assert attachment.report()[0]["calls"] == 1 + (1 + 2)  # the latter half of the decoder, all of the encoder


def test_every_part_gets_its_own_backend_back() -> None:
    model = llava()
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    before = backends(model)
    assert before[1:] == ("eager", "sdpa")
    with attach(model, "dropkey"):
        assert backends(model)[1:] == ("hkft_eager", "hkft_sdpa")
    assert backends(model) == before


def test_what_somebody_sets_within_stays_theirs_and_a_shared_part_stays_hkfts() -> None:
    model = llava()
    with attach(model, "dropkey"):
        model.config.vision_config._attn_implementation = "eager"
    assert backends(model) == ("sdpa", "eager", "sdpa")
    other = transformers.LlamaForCausalLM(model.config.text_config).train()
    first, second = attach(model, "dropkey"), attach(other, "dropkey", rate=0.3)
    first.detach()
    other(input_ids=torch.full((1, 8), 7))  # raises where nothing fires
    assert second.report()[0]["calls"] == 1
    second.detach()
    assert backends(model) == ("sdpa", "eager", "sdpa")


def test_a_frozen_tower_in_eval_mode_was_put_to_rest_on_purpose() -> None:
    model = llava()
    model.model.vision_tower.requires_grad_(False).eval()
    seeing = torch.cat([torch.full((1, 9), 5), torch.randint(6, 64, (1, 8))], 1)
    with attach(model, "dropkey", rate=0.3) as attachment:
        model(input_ids=seeing, pixel_values=PIXELS)
        assert attachment.report()[0]["calls"] == 1
        model.model.vision_tower.requires_grad_(True)
        with pytest.raises(MethodError, match="without firing attention_logits of layer 0"):
            model(input_ids=seeing, pixel_values=PIXELS)


def test_embeddings_looked_up_before_the_model_is_called(zoo: Any) -> None:
    model, batch = zoo.build("llama"), zoo.inputs("llama")
    with attach(model, Method([Site("input", "column", 0.5)])) as attachment:
        for _ in range(2):
            embedded = model.get_input_embeddings()(batch["input_ids"])
            model(inputs_embeds=embedded, attention_mask=batch["attention_mask"])
        assert attachment.report()[0]["calls"] == 2
        with torch.no_grad():
            bare = model.get_input_embeddings().weight[batch["input_ids"]]
        with pytest.raises(MethodError, match="without firing input"):
            model(inputs_embeds=bare)


def test_stages_and_groups_are_one_stack() -> None:
    swin = transformers.SwinModel(
        transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=[2, 2, 2], num_heads=[1, 2, 4], window_size=2
        )
    )
    groups = transformers.AlbertModel(
        transformers.AlbertConfig(
            **{**SIZE, "num_hidden_layers": 4}, vocab_size=64, embedding_size=16, num_hidden_groups=4
        )
    )
    for model, half in ((swin, [3, 4, 5]), (groups, [2, 3])):
        site = Site("attention_logits", "column", rate=0.4, layers="latter-half", schedule="linear_up")
        with attach(model, Method([site])) as attachment:
            assert [d.layer for d in attachment.droppers] == half
            assert [d.rate for d in attachment.droppers] == pytest.approx(
                [0.4 * (n + 1) / len(half) for n in range(len(half))]
            )


def test_an_encoder_and_its_decoder_are_two_stacks() -> None:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4, dropout_rate=0.0
    )
    model = transformers.T5ForConditionalGeneration(config)
    halves = {"latter-half": [(2, 3), (2, 3)], "auto": [(0, 1, 2, 3), (2, 3)], "all": [(0, 1, 2, 3), (0, 1, 2, 3)]}
    for layers, expected in halves.items():
        with attach(model, Method([Site("hidden", rate=0.4, layers=layers, schedule="linear_up")])) as attachment:
            names = [attachment.family.layers[d.layer].name for d in attachment.droppers if d.layer is not None]
            rates = [round(d.rate, 6) for d in attachment.droppers]
        assert names == [
            f"{stack}.block.{n}"
            for stack, numbers in zip(("encoder", "decoder"), expected, strict=True)
            for n in numbers
        ]
        by_hand = [0.4 * (n + 1) / len(numbers) for numbers in expected for n in range(len(numbers))]
        assert rates == pytest.approx(by_hand)  # each stack grows to the full rate


def test_two_models_in_one_module_are_refused(zoo: Any) -> None:
    pair = nn.ModuleList([zoo.build("bert"), zoo.build("llama")])
    with pytest.raises(MethodError) as caught:
        attach(pair, "dropkey")
    assert str(caught.value) == (
        "ModuleList holds several transformers models: BertModel, LlamaForCausalLM\n  hint: attach to each of them"
    )


@pytest.mark.parametrize("name", ["Splinter", "ClapText", "AlignText"])
def test_eager_attention_without_a_mask_sees_both_ways(name: str) -> None:
    """Such an encoder never says that it is none, and its eager attention never asks."""
    config = getattr(transformers, f"{name}Config")(
        **SIZE, vocab_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
        tokens = torch.randint(3, 64, (2, 12))
        own = model(input_ids=tokens)[0]
        for method in ("dropkey", "dropattention"):
            with attach(model, method, rate=1e-12) as attachment:
                torch.testing.assert_close(model(input_ids=tokens)[0], own, atol=1e-4, rtol=1e-4)
                assert attachment.report()[0]["calls"] == 2


def test_an_attention_whose_eager_form_has_a_name_of_its_own() -> None:
    """Phi-4 multimodal's vision tower: in its file stands a second eager attention that is not its."""
    config = transformers.models.phi4_multimodal.configuration_phi4_multimodal.Phi4MultimodalVisionConfig(
        **SIZE, image_size=16, patch_size=8
    )
    kind = transformers.models.phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalVisionModel
    model = kind._from_config(config, attn_implementation="eager").eval()
    pixels, mask = torch.randn(1, 3, 16, 16), torch.ones(1, 2, 2, dtype=torch.bool)
    own = model(pixels, patch_attention_mask=mask).last_hidden_state
    with attach(model, "dropkey", rate=0.3):
        assert torch.equal(model(pixels, patch_attention_mask=mask).last_hidden_state, own)


def test_an_eager_attention_that_hangs_on_its_name_is_refused() -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, reorder_and_upcast_attn=True)
    model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    with pytest.raises(MethodError, match="reorder_and_upcast_attn"):
        attach(model, "dropkey")
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    attach(model, "dropkey").detach()


def test_copies_in_threads_are_refused(zoo: Any) -> None:
    """What nn.DataParallel does with a model on several GPUs: its replicas share the masks of one."""
    model = zoo.build("bert")
    with attach(model, "dropkey"):
        replica = model._replicate_for_data_parallel()
        with pytest.raises(MethodError, match="nn.DataParallel runs copies of the model in threads"):
            replica(**zoo.inputs("bert"))


def test_attaching_in_one_thread_does_not_disturb_another(zoo: Any) -> None:
    models, errors, done, interval = (
        [zoo.build("bert"), zoo.build("llama")],
        [],
        threading.Event(),
        sys.getswitchinterval(),
    )

    def churn() -> None:
        while not done.is_set():
            with attach(models[0], "dropkey"):
                pass

    other = threading.Thread(target=churn)
    sys.setswitchinterval(1e-5)
    other.start()
    try:
        for _ in range(60):
            with attach(models[1], "dropkey"):
                zoo.run(models[1], zoo.inputs("llama"))
    except Exception as error:
        errors.append(error)
    finally:
        done.set()
        other.join()
        sys.setswitchinterval(interval)
    assert not errors


def test_protected_counts_rows_that_had_something_to_lose(zoo: Any) -> None:
    model, batch = zoo.build("llama"), zoo.inputs("llama", padding="left", real=3)
    for method in ("dropkey", "dropattention"):
        with attach(model, method, rate=1e-9) as attachment:
            zoo.run(model, batch)
            assert attachment.report()[0]["protected"] == 0.0  # padding queries lose nothing
    with attach(zoo.build("bert"), Method([Site("attention_weights", "column", 0.3, rescale="none")])) as attachment:
        zoo.run(attachment.family.model, zoo.inputs("bert"))
        assert attachment.report()[0]["protected"] is None  # no row can come to be NaN


@pytest.mark.parametrize("name", ["mistral", "llama", "bert"])
def test_protected_is_the_share_of_rows_that_were_given_a_key_back(
    zoo: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, row by row: mistral's window of 5 hides the first key from most queries."""
    model, batch = zoo.build(name), zoo.inputs(name, rows=4, padding="left", real=2)
    drawn, real = [], interface.protect
    monkeypatch.setattr(
        interface, "protect", lambda keep, may, *how: drawn.append((keep, may)) or real(keep, may, *how)
    )
    with attach(model, Method([Site("attention_logits", "column", 0.6, layers="all")])) as attachment:
        zoo.run(model, batch)
        measured = attachment.report()[0]["protected"]
    acted = rows = 0
    for keep, may in drawn:
        may = torch.ones(4, 1, 12, 12, dtype=torch.bool) if may is None else may.expand(4, 1, 12, 12)
        for b, h, q in itertools.product(range(4), range(4), range(12)):
            allowed, kept = may[b, 0, q], keep[b, h, 0]
            first = int(may[b, 0, -1].int().argmax())
            lost_first = name != "bert" and bool(allowed[first]) and not bool(kept[first])
            kept = kept | ((torch.arange(12) == first) if name != "bert" else False)
            lost_all = bool(allowed.any()) and not bool((allowed & kept).any())
            acted, rows = acted + (lost_first or lost_all), rows + 1
    assert 0 < acted < rows
    assert measured == pytest.approx(acted / rows)


def test_a_first_pass_in_inference_mode(zoo: Any) -> None:
    model, batch = zoo.build("bert"), zoo.inputs("bert")
    with attach(model, "dropkey", rate=0.3) as attachment:
        with torch.inference_mode():
            zoo.run(model, batch)
        zoo.run(model, batch).sum().backward()
        assert attachment.report()[0]["calls"] == 4


def test_pefts_own_dropout_is_counted_in_a_compiled_graph(zoo: Any) -> None:
    model = lora(zoo.build("llama"), "q_proj")
    with attach(model, "lora-dropout", rate=0.3) as attachment:
        compiled = torch.compile(model, backend="eager")
        for _ in range(3):
            compiled(**zoo.inputs("llama"))
        assert (attachment.report()[0]["calls"], attachment.report()[0]["measured"]) == (6, None)


def test_noise_tells_the_rate_that_was(zoo: Any) -> None:
    model, batch = zoo.build("llama"), zoo.inputs("llama")
    batch["labels"] = batch["input_ids"]
    own = Method([Site("attention_logits", "column", rate=0.5)])
    assert hkft.gradient_noise(model, batch, [own, "dropkey"], rate=0.2, draws=2)[0].rate == 0.5
    assert hkft.gradient_noise(model, batch, [own, "dropkey"], rate=0.2, draws=2)[1].rate == 0.2
    with pytest.raises(ValueError, match="no trainable parameter"):
        hkft.gradient_noise(model.requires_grad_(False), batch, draws=2)
