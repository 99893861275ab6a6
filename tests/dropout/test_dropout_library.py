"""hkft.attach in the hands of others: a plain loop, transformers' Trainer, TRL, every PEFT adapter, several processes."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from hkft import attach, attached
from hkft.errors import MethodError


@pytest.fixture(autouse=True)
def registries_end_empty() -> Iterator[None]:
    yield
    registries = (AttentionInterface, AttentionMaskInterface)
    assert [name for registry in registries for name in registry._global_mapping if "hkft" in name] == []


def state(model: nn.Module) -> dict[str, Any]:
    """All of hkft's that attaching could leave behind, and nothing that a trainer may set or hook."""
    return {name: _state_of(module) for name, module in model.named_modules()}


def _state_of(module: nn.Module) -> tuple[Any, ...]:
    hooks = [hook for table in (module._forward_hooks, module._forward_pre_hooks) for hook in table.values()]
    owners = [type(getattr(hook, "__self__", hook)) for hook in hooks]
    return (
        type(module).__name__,
        [key for key in module.__dict__ if "hkft" in key],
        [owner.__name__ for owner in owners if owner.__module__.startswith("hkft")],
        getattr(getattr(module, "config", None), "_attn_implementation", None),
    )


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def calls(attachment: Any) -> list[int]:
    return [record["calls"] for record in attachment.report()]


def lora(*targets: str, **more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=list(targets), **more)


# --- a plain loop -----------------------------------------------------------------------------------------------------


def test_a_plain_loop_learns_a_batch_by_heart(zoo: Any) -> None:
    model, batch = zoo.build("llama"), zoo.inputs("llama")
    batch["labels"] = batch["input_ids"]
    before = state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with attach(model, "hiddenkey-", rate=0.1) as attachment:
        losses = []
        for _ in range(40):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        for record in attachment.report():
            assert (record["layers"], record["calls"]) == ([1], 40)
            assert record["measured"] == pytest.approx(0.1, abs=0.04)
    assert losses[-1] < 0.2 * losses[0]
    assert len(set(losses[-5:])) == 5
    assert state(model) == before
    assert torch.equal(zoo.run(model, batch), zoo.run(model, batch))


def test_attaching_and_detaching_again_and_again_leaves_the_model_as_it_was(zoo: Any) -> None:
    model, batch = peft.get_peft_model(zoo.build("bert"), lora("query", "dense")).train(), zoo.inputs("bert")
    before, bare = state(model), zoo.run(model, batch)
    for method in ("hiddenkey", "dropattention", "lora-dropout"):
        with attach(model, method, rate=0.3):
            assert state(model) != before
            zoo.run(model, batch).square().mean().backward()
            model.eval()
            zoo.run(model.train(), batch)
        assert state(model) == before
        assert torch.equal(zoo.run(model, batch), bare)


def test_two_models_trained_by_turns_learn_what_each_learns_alone(zoo: Any) -> None:
    def learner(name: str, method: str, seed: int) -> tuple[Callable[[], float], Any]:
        model, batch = zoo.build(name), zoo.inputs(name)
        attachment = attach(model, method, rate=0.3, seed=seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def step() -> float:
            loss = zoo.run(model, batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        return step, attachment

    plans = [("bert", "hiddenkey-", 1), ("llama", "dropattention", 2)]
    alone = []
    for plan in plans:
        step, attachment = learner(*plan)
        with attachment:
            alone.append([step() for _ in range(4)])
    (first, one), (second, two) = (learner(*plan) for plan in plans)
    with one, two:
        turns = [(first(), second()) for _ in range(4)]
    assert [list(losses) for losses in zip(*turns, strict=True)] == alone
    assert len(set(alone[0])) == len(set(alone[1])) == 4


# --- transformers' Trainer --------------------------------------------------------------------------------------------


def test_transformers_own_trainer(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(vocab_size=64, **sizes))
    model = peft.get_peft_model(base, lora("query", "value", task_type="SEQ_CLS"))
    tokens = torch.randint(3, 64, (24, 10))
    rows = [{"input_ids": row, "labels": row[1] % 2} for row in tokens]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        eval_strategy="steps", eval_steps=2, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:8])  # type: ignore[arg-type]
    before, weights = state(model), trainable(model)
    with attach(model, "hiddenkey-", rate=0.2) as attachment:
        trainer.train()
        assert calls(attachment) == [3 * 4 * 2] * 2  # layers x steps x accumulated passes, and none of evaluation
        assert [record["measured"] for record in attachment.report()] == pytest.approx([0.2, 0.2], abs=0.04)
        evaluated = trainer.evaluate()["eval_loss"]
    assert state(model) == before
    assert trainer.evaluate()["eval_loss"] == evaluated
    assert all(not torch.equal(now, weights[name]) for name, now in trainable(model).items())


# --- TRL --------------------------------------------------------------------------------------------------------------

SENTENCES = [
    "the plot is warm and funny",
    "a dull film with a cold story",
    "the actor is very good in this scene",
    "it was quite awful and grey",
] * 4
STEPS = 3
quiet_trl = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",  # TRL sets it
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",  # on import
)


def sft_trainer(folder: Path, model: Any, *targets: str, **more: Any) -> Any:
    """TRL's own trainer around a tiny Llama: TRL itself wraps the model in PEFT."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>", "</s>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, max_length=16,
        logging_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, **more,
    )  # fmt: skip
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": SENTENCES}),
        processing_class=tokenizer,
        peft_config=lora(*targets, task_type="CAUSAL_LM"),
    )


@quiet_trl
@pytest.mark.parametrize(
    ("more", "passes"),
    [
        ({"gradient_checkpointing": False}, STEPS),
        ({"gradient_checkpointing": True}, 2 * STEPS),  # each layer is run twice: TRL's default
        ({"gradient_checkpointing": False, "packing": True}, STEPS),
    ],
    ids=["plain", "checkpointing", "packing"],
)
@pytest.mark.parametrize("method", ["hiddenkey-", "dropattention"])
def test_trls_trainer(zoo: Any, tmp_path: Path, method: str, more: dict[str, Any], passes: int) -> None:
    trainer = sft_trainer(tmp_path, zoo.build("llama", layers=4), "q_proj", "down_proj", **more)
    model = trainer.model
    before, weights = state(model), trainable(model)
    with attach(model, method, rate=0.2) as attachment:
        trainer.train()
        for record in attachment.report():
            assert (record["layers"], record["calls"]) == ([2, 3], 2 * passes)
            assert record["measured"] == pytest.approx(0.2, abs=0.06)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert all(0 < loss < 100 for loss in losses)
    assert weights
    assert all(not torch.equal(now, weights[name]) for name, now in trainable(model).items())
    assert state(model) == before


@quiet_trl
def test_attached_before_trl_wraps_what_lora_leaves_alone_works_alike(zoo: Any, tmp_path: Path) -> None:
    base = zoo.build("llama", layers=4)
    with attach(base, "hiddenkey-", rate=0.2) as attachment:
        trainer = sft_trainer(tmp_path, base, "q_proj", "v_proj", gradient_checkpointing=False)
        assert attached(trainer.model) is attachment
        trainer.train()
        assert calls(attachment) == [2 * STEPS] * 2
    assert not any(keys for _, keys, *_ in state(trainer.model).values())


@quiet_trl
def test_attached_before_trl_wraps_an_ffn_output_is_refused_in_the_first_step(zoo: Any, tmp_path: Path) -> None:
    base = zoo.build("llama", layers=4)
    with attach(base, "hiddenkey-", rate=0.2):
        trainer = sft_trainer(tmp_path, base, "q_proj", "down_proj", gradient_checkpointing=False)
        with pytest.raises(MethodError) as caught:
            trainer.train()
    assert trainer.state.global_step == 0
    assert str(caught.value) == (
        "LlamaForCausalLM was wrapped after attaching, outside hidden of layer 2, hidden of layer 3\n"
        "  hint: attach() to the model that is trained, after PEFT has wrapped it"
    )


@pytest.mark.parametrize("method", ["dropkey", "dropattention", "hiddenkey-"])
def test_samples_packed_into_one_row_never_see_one_another(zoo: Any, method: str) -> None:
    """As TRL packs them: no mask, one row, and position numbers that begin again."""
    model = zoo.build("llama")
    tokens = torch.randint(3, 64, (1, 12))
    places = torch.arange(6).repeat(2).unsqueeze(0)
    for changed, other in ((slice(0, 6), slice(6, 12)), (slice(6, 12), slice(0, 6))):
        twin = tokens.clone()
        twin[:, changed] = (twin[:, changed] + 7) % 61 + 3
        with attach(model, method, rate=0.7), torch.no_grad():
            outs = [
                zoo.run(model, {"input_ids": each, "position_ids": places, "use_cache": False}, seed=3)
                for each in (tokens, twin)
            ]
        torch.testing.assert_close(outs[0][:, other], outs[1][:, other], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(outs[0][:, changed], outs[1][:, changed])


# --- PEFT's adapters --------------------------------------------------------------------------------------------------

# what to wrap: (everywhere, in IA3 the maps whose input is scaled)
TARGETS = {
    "llama": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    "bert": (["query", "value", "output.dense"], ["output.dense"]),
}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("", {}),
    "lora": ("LoraConfig", {"r": 4}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "rslora": ("LoraConfig", {"r": 4, "use_rslora": True}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "tinit": 2, "tfinal": 2}),
    "vera": ("VeraConfig", {"r": 4}),
    "loha": ("LoHaConfig", {"r": 4}),
    "ia3": ("IA3Config", {}),
    "prefix": ("PrefixTuningConfig", PROMPT),
    "prompt": ("PromptTuningConfig", PROMPT),
    "p-tuning": ("PromptEncoderConfig", {**PROMPT, "encoder_hidden_size": 16}),
}
PROMPTS = {"prefix", "prompt", "p-tuning"}  # for the decoder only


def adapted(model: Any, family: str, name: str) -> Any:
    kind, fields = ADAPTERS[name]
    if name == "none":
        return model
    targets, scaled_inside = TARGETS[family]
    if name not in PROMPTS:
        fields = {**fields, "target_modules": targets[:1] if name == "vera" else targets}  # maps of one shape
    if name == "ia3":
        fields = {**fields, "feedforward_modules": scaled_inside}
    return peft.get_peft_model(model, getattr(peft, kind)(**fields)).train()


@pytest.mark.parametrize("method", ["hiddenkey-", "dropattention"])
@pytest.mark.parametrize(
    ("base", "name"),
    [("llama", name) for name in ADAPTERS] + [("bert", name) for name in ADAPTERS if name not in PROMPTS],
)
def test_every_adapter_trains(zoo: Any, base: str, name: str, method: str) -> None:
    model, batch, steps = adapted(zoo.build(base), base, name), zoo.inputs(base, padding="right", real=5), 3
    before, weights = state(model), trainable(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with attach(model, method, rate=0.2) as attachment:
        for _ in range(steps):
            loss = zoo.run(model, batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert torch.isfinite(loss)
        for record in attachment.report():
            assert record["layers"] == ([1] if base == "llama" else [0, 1])
            assert record["calls"] == steps * record["modules"] == steps * len(record["layers"])
            assert record["measured"] == pytest.approx(0.2, abs=0.08)
        first, second = zoo.run(model, batch), zoo.run(model, batch)
        assert not torch.equal(first, second)
        evaluated = zoo.run(model.eval(), batch)
    assert state(model) == before
    assert torch.equal(zoo.run(model, batch), evaluated)
    still = [n for n, now in trainable(model).items() if torch.equal(now, weights[n]) and "pooler" not in n]
    assert weights
    assert still == []


# --- several processes ------------------------------------------------------------------------------------------------

RANK = """
import peft, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification
import hkft

torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=(folder / "meet").as_uri(), rank=rank, world_size=2)
sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
batch = dict(input_ids=torch.arange(3, 51).view(4, 12), labels=torch.tensor([0, 1, 0, 1]))

def build():
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**sizes, **quiet))
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    return peft.get_peft_model(base, config).train()

def weights(model):
    return {n.removeprefix("module."): p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

def train(seed, around):
    model = build()
    start, wrapped = weights(model), DistributedDataParallel(model)
    attachment = hkft.attach(wrapped if around else model, "hiddenkey-", rate=0.4, seed=seed)
    masks, hidden = [], attachment.family.layers[0].ffn_output
    handle = hidden.register_forward_hook(lambda _m, _a, out: masks.append(out.detach() != 0))
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    torch.manual_seed(5)
    losses = []
    for _ in range(3):
        loss = wrapped(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    report = attachment.report()
    attachment.detach()
    handle.remove()
    evaluated = model.eval()(**batch).logits.detach()
    return dict(
        start=start, end=weights(model), losses=torch.stack(losses), masks=torch.stack(masks), report=report,
        evaluated=evaluated,
    )

def gradients(checkpointing):
    model = build()
    if checkpointing:
        base = model.get_base_model()
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    with hkft.attach(model, "hiddenkey-", rate=0.4) as attachment:
        torch.manual_seed(5)
        model(**batch).loss.backward()
        calls = attachment.report()[0]["calls"]
    return dict(gradients={n: p.grad for n, p in model.named_parameters() if p.grad is not None}, calls=calls)

found = {
    "default": train(None, around=False), "seeded": train(3, around=True),
    "plain": gradients(False), "checkpointed": gradients(True),
}
torch.save(found, folder / f"{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes of data-parallel training, begun with one seed, found. They are forked: torch is loaded already."""
    folder = tmp_path_factory.mktemp("ranks")
    running = []
    for rank in (0, 1):
        running.append(os.fork())
        if not running[-1]:
            code = 1
            try:
                warnings.simplefilter("ignore")
                exec(RANK, {"folder": folder, "rank": rank})
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in running] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("seed", ["default", "seeded"])
def test_ranks_drop_apart_and_stay_one_model(ranks: list[dict[str, Any]], seed: str) -> None:
    one, two = (rank[seed] for rank in ranks)
    torch.testing.assert_close(one["start"], two["start"], atol=0, rtol=0)
    torch.testing.assert_close(one["end"], two["end"], atol=0, rtol=0)
    assert torch.equal(one["evaluated"], two["evaluated"])  # the same rows: only the masks tell the ranks apart
    assert all(not torch.equal(one["end"][name], start) for name, start in one["start"].items())
    assert torch.isfinite(one["losses"]).all()
    assert not (one["losses"] == two["losses"]).any()
    for mine, other in zip(one["masks"], two["masks"], strict=True):
        assert float((mine != other).float().mean()) > 0.3  # alike: 0; by chance: 0.48
    for rank in (one, two):
        assert [record["calls"] for record in rank["report"]] == [2 * 3] * 2
        assert [record["measured"] for record in rank["report"]] == pytest.approx([0.4, 0.4], abs=0.04)


def test_in_every_rank_checkpointing_replays_its_own_masks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["checkpointed"]["calls"] == 2 * rank["plain"]["calls"]
        torch.testing.assert_close(rank["checkpointed"]["gradients"], rank["plain"]["gradients"], atol=1e-7, rtol=1e-5)
    one, two = (rank["plain"]["gradients"] for rank in ranks)
    assert all(not torch.equal(one[name], two[name]) for name in one)
