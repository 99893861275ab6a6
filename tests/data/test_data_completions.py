"""What is learned of a completion and of a chat, to the token, and what is said of the rest."""

from __future__ import annotations

import copy
import json
from itertools import groupby, takewhile

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hkft.data.completions import IGNORED, Encoded, Encoder, examples_of, fit
from hkft.data.prompts import columns_of
from hkft.data.tokenise import collator, tokenise
from hkft.errors import DataError, SetupError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}" + ALTERNATE + "{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if system and loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role"
    " + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}" + ALTERNATE + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role)"
    " + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (  # the system turn stands in the last user turn, and nowhere once that has been answered
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if system and loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (  # thoughts are kept after the last question only, where there is always a place for them
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set said = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (  # asks for thoughts, and writes none
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
PLAIN = (  # says nothing of where an answer ends
    "{% for m in messages %}{{ 'A: ' if m.role == 'assistant' else 'Q: ' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
SPECIAL = (
    "<|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn> <|User|> <|Assistant|>".split()
)

TURNS = [("user", "One?"), ("assistant", "<b>1</b> ✓"), ("user", "Two?"), ("assistant", "<i>2</i> 🙂é")]
TALK = [{"role": role, "content": content} for role, content in TURNS]
RULED = [{"role": "system", "content": "Be brief."}, *TALK]


@pytest.fixture
def bytes_(tiny_llama):
    """A tokenizer of single bytes: every text can be read from its tokens, and no two texts share one."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    return tokenizer


def with_template(tokenizer, template: str):
    tokenizer.chat_template = template
    return tokenizer


def chats(*turns) -> datasets.Dataset:
    source = datasets.Dataset.from_dict({"messages": [json.dumps(chat) for chat in turns]})
    ids = list(range(len(turns)))
    data = type("Data", (), {"messages": "messages", "prompt": None, "completion": None})
    return datasets.Dataset.from_dict({"id": ids, **columns_of(source, data, True, "here", ids)})


def pairs(*rows: tuple[str, str]) -> datasets.Dataset:
    prompts, completions = zip(*rows, strict=True)
    return datasets.Dataset.from_dict({"id": list(range(len(rows))), "prompt": prompts, "completion": completions})


def learned(tokenizer, example) -> list[str]:
    """What is learned, piece by piece; that all other labels are the tokens themselves is checked on the way."""
    marked = zip(example["labels"], example["input_ids"], strict=True)
    assert all(label in (IGNORED, token) for label, token in marked)
    runs = groupby(zip(example["labels"], example["input_ids"], strict=True), lambda pair: pair[0] != IGNORED)
    return [tokenizer.decode([token for _, token in run]) for yes, run in runs if yes]


def asked(tokenizer, example) -> str:
    return tokenizer.decode(example["input_ids"][: example["prompt_length"]])


# --- prompts and completions ------------------------------------------------------------------------------------------


def test_the_completion_and_the_end_of_text_are_learned_and_nothing_else(bytes_, tell):
    got = tokenise(pairs(("a ->", " bé"), ("cc ->", " 🙂")), bytes_, 64, tell, "train")
    assert [learned(bytes_, row) for row in got] == [[" bé</s>"], [" 🙂</s>"]]
    assert [asked(bytes_, row) for row in got] == ["a ->", "cc ->"]
    assert got["length"][:] == [len(row["input_ids"]) for row in got] == [9, 11]
    assert [row["attention_mask"] for row in got] == [[1] * 9, [1] * 11]
    assert (got["prompt"][:], got["completion"][:], got["id"][:]) == (["a ->", "cc ->"], [" bé", " 🙂"], [0, 1])
    assert tell.notices == []


def test_the_end_of_text_is_a_label_where_it_pads_too(bytes_, tell):
    bytes_.pad_token = bytes_.eos_token
    got = tokenise(pairs(("a", "b"), ("a", "bcd")), bytes_, 64, tell)
    batch = collator(bytes_, "right")(list(got))
    assert batch["labels"][:, :5].tolist() == [
        [IGNORED, *bytes_("b")["input_ids"], 2, IGNORED, IGNORED],
        [IGNORED, *bytes_("bcd")["input_ids"], 2],
    ]


def test_a_completion_that_ends_itself_is_ended_once(bytes_, tell):
    got = tokenise(pairs(("a</s>", "b</s>")), bytes_, 64, tell)
    assert learned(bytes_, got[0]) == ["b</s>"]
    assert asked(bytes_, got[0]) == "a</s>"  # written by whoever wrote the prompt


@pytest.mark.parametrize(
    ("single", "front"),
    [("<s> $A </s>", "<s>"), ("$A </s>", ""), ("<s> $A", "<s>"), ("<s> $A <pad>", "<s>"), ("$A", "")],
)
def test_a_prompt_has_what_the_tokenizer_puts_in_front_and_not_what_it_puts_behind(bytes_, tell, single, front):
    bytes_.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<pad>", 0), ("<s>", 1), ("</s>", 2)]
    )
    got = tokenise(pairs(("a", "b")), bytes_, 64, tell)
    assert (asked(bytes_, got[0]), learned(bytes_, got[0])) == (f"{front}a", ["b</s>"])
    assert got[0]["input_ids"][:-2] == Encoder(bytes_, False).prompts(["a"])[0]


def test_one_token_for_both_ends_of_a_text(bytes_, tell):
    bytes_.bos_token = "</s>"  # as OPT has
    bytes_.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    got = tokenise(pairs(("a", "b")), bytes_, 64, tell)
    assert (asked(bytes_, got[0]), learned(bytes_, got[0])) == ("</s>a", ["b</s>"])


def test_no_end_of_text_can_be_learned_where_there_is_none(bytes_, tell):
    bytes_.eos_token = None
    got = tokenise(pairs(("a", "b")), bytes_, 64, tell)
    assert learned(bytes_, got[0]) == ["b"]
    assert tell.notices == ["the tokenizer has no end-of-sequence token: no end of text can be learned"]


def test_prompts_alone_for_prediction(bytes_, tell):
    got = tokenise(datasets.Dataset.from_dict({"id": [7], "prompt": ["ab"]}), bytes_, 64, tell)
    assert sorted(got.column_names) == ["attention_mask", "id", "input_ids", "length", "prompt", "prompt_length"]
    assert (asked(bytes_, got[0]), got[0]["length"], got[0]["id"]) == ("ab", 2, 7)


def merged(boundary: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that has learned one merge, that of `boundary`."""
    words = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), boundary]
    core = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [tuple(boundary)]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")


def test_no_token_reaches_from_the_prompt_into_the_completion(tell):
    words = merged(">x")
    assert len(words("a>x")["input_ids"]) == 2
    got = tokenise(pairs(("a>", "x")), words, 64, tell)
    assert words.convert_ids_to_tokens(got[0]["input_ids"]) == ["a", ">", "x", "</s>"]
    assert got[0]["input_ids"][: got[0]["prompt_length"]] == Encoder(words, False).prompts(["a>"])[0]


@pytest.mark.parametrize("scheme", ["first", "always", "never", "normalized"])
def test_the_space_between_prompt_and_completion_is_the_recipes_own(tell, scheme):
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    if scheme == "normalized":  # as Llama 2's was
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.train_from_iterator(["to -> be\n"] * 9, trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"]))
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    words = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    got = tokenise(pairs(("to ->", " be"), ("to\n", "be"), ("to\n", "\nbe")), words, 64, tell)
    pieces = [words.convert_ids_to_tokens(row["input_ids"][row["prompt_length"] :]) for row in got]
    assert ["".join(row) for row in pieces] == ["▁be</s>", "be</s>", "\nbe</s>"]
    for row, prompt in zip(got, ("to ->", "to\n", "to\n"), strict=True):
        assert row["input_ids"][: row["prompt_length"]] == words(prompt)["input_ids"][:-1]


def test_a_completion_that_begins_with_a_merged_line_break_is_whole(tell):
    words = ["</s>", "▁", "\n", "a", "b", "\n\n"]
    core = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [("\n", "\n")]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    (example,) = tokenise(pairs(("a", "\nb")), fast, 64, tell)
    assert fast.convert_ids_to_tokens(example["input_ids"]) == ["▁", "a", "▁", "\n", "b", "</s>"]


# --- chats ------------------------------------------------------------------------------------------------------------

FIRST, LAST = "<b>1</b> ✓", "<i>2</i> 🙂é"
TEMPLATES = {
    "chatml": (CHATML, RULED, [f"{FIRST}<|im_end|>", f"{LAST}<|im_end|>"], "<|im_start|>assistant\n"),
    "llama 2": (LLAMA2, RULED, [f" {FIRST} </s>", f" {LAST} </s>"], "[INST] Two? [/INST]"),
    "llama 3": (
        LLAMA3,
        RULED,
        [f"{FIRST}<|eot_id|>", f"{LAST}<|eot_id|>"],
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma": (GEMMA, TALK, [f"{FIRST}<end_of_turn>", f"{LAST}<end_of_turn>"], "<start_of_turn>model\n"),
    "mistral": (MISTRAL, TALK, [f" {FIRST}</s>", f" {LAST}</s>"], "[INST] Two?[/INST]"),
    "mistral, ruled": (MISTRAL, RULED, [f"{FIRST}</s>", f" {LAST}</s>"], "[INST] Be brief.\n\nTwo?[/INST]"),
    "qwen 3": (
        QWEN3,
        RULED,
        [f"{FIRST}<|im_end|>", f"<think>\n\n</think>\n\n{LAST}<|im_end|>"],
        "Two?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "r1": (R1, RULED, [f"{FIRST}</s>", f"{LAST}</s>"], "Two?<|Assistant|><think>\n"),
    "r1, in lines": (
        R1.replace("'<|Assistant|>' +", "'<|Assistant|>\n' +"),
        RULED,
        [f"{FIRST}</s>", f"{LAST}</s>"],
        "Two?<|Assistant|><think>\n",
    ),
    "plain": (PLAIN, RULED, [FIRST, f"{LAST}</s>"], "Q: Two?\nA: "),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_assistant_says_is_learned_and_nothing_else(bytes_, tell, name):
    template, turns, said, end = TEMPLATES[name]
    words = with_template(bytes_, template)
    (example,) = tokenise(chats(turns), words, 512, tell)
    assert learned(words, example) == said
    assert asked(words, example).endswith(end)
    prompt = example["input_ids"][: example["prompt_length"]]
    assert prompt == Encoder(words, True).chat_prompt(turns[:-1])
    assert words.decode(prompt) == words.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    warned = "in 1 chats of rows the chat template does not begin the answer as it asks for one"
    assert [notice.startswith(warned) for notice in tell.notices] == [True] * (
        name in ("r1", "r1, in lines", "mistral, ruled")
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_alone(bytes_, tell, name):
    template, turns, said, _ = TEMPLATES[name]
    words = with_template(bytes_, template)
    (example,) = tokenise(chats([turns[-2], turns[-1]]), words, 512, tell)
    assert learned(words, example) == said[-1:]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_token_that_ends_a_turn(bytes_, name):
    template, _, said, _ = TEMPLATES[name]
    end = Encoder(with_template(bytes_, template), False).turn_end()
    assert end == (None if name == "plain" else bytes_(said[-1])["input_ids"][-1])


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_assistant_says_is_found_in_what_it_writes(bytes_, tell, name):
    """The tokens that are learned, read as generation reads them, are the answer as the data has it."""
    template, turns, _, _ = TEMPLATES[name]
    words = with_template(bytes_, template)
    encoder = Encoder(words, True)
    (example,) = encoder.chats([turns], ["here"])
    stops = {encoder.end, encoder.turn_end()}
    assert stops & {*example.completion}  # generation ends there
    written = list(takewhile(lambda token: token not in stops, example.completion))
    said = turns[-1]["content"].rpartition("</think>")[2].strip() if "think" in name else turns[-1]["content"].strip()
    assert encoder.said(words.decode(written, skip_special_tokens=True)) == said


def test_an_end_that_is_part_text_is_cut_off(bytes_):
    words = with_template(bytes_, "{% for m in messages %}[{{ m.content }}###</s>{% endfor %}")
    encoder = Encoder(words, True)
    (example,) = encoder.chats([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]], ["here"])
    assert words.decode(example.completion).count("</s>") == 1
    assert encoder.said("b c###") == "b c"


def test_a_turns_end_need_not_be_called_special(bytes_):
    bytes_.add_tokens(["<|end|>"])
    words = with_template(bytes_, CHATML.replace("<|im_end|>", "<|end|>"))
    assert Encoder(words, False).turn_end() == words.convert_tokens_to_ids("<|end|>")


def test_no_end_of_a_turn_without_a_template_or_where_it_refuses(bytes_):
    assert Encoder(with_template(bytes_, "{{ raise_exception('no') }}"), True).turn_end() is None
    assert Encoder(with_template(bytes_, None), False).turn_end() is None


def test_thoughts_are_learned_where_the_template_keeps_them(bytes_, tell):
    thought = [turn | {"content": f"<think>\nhm\n</think>\n\n{turn['content']}"} for turn in TALK[1::2]]
    words = with_template(bytes_, QWEN3)
    (example,) = tokenise(chats([TALK[0], thought[0], TALK[2], thought[1]]), words, 512, tell)
    assert learned(words, example) == [f"<think>\nhm\n</think>\n\n{LAST}<|im_end|>"]
    assert tell.notices == [
        "1 earlier answers of rows, which the chat template writes otherwise once past, are not learned"
    ]


def test_a_template_that_hides_the_answer(bytes_, tell):
    words = with_template(
        bytes_, "{% if add_generation_prompt %}Q{% else %}{{ messages[-1].content | length }}{% endif %}"
    )
    with pytest.raises(
        DataError, match=r"data.messages, rows, row 0 .*: the chat template hides where the last answer"
    ):
        tokenise(chats(TALK), words, 512, tell)


def test_an_assistant_who_speaks_first_is_learned_too(bytes_, tell):
    (example,) = tokenise(chats([{"role": "assistant", "content": "Hello!"}, *TALK]), bytes_, 512, tell)
    assert learned(bytes_, example) == ["Hello!<|im_end|>", f"{FIRST}<|im_end|>", f"{LAST}<|im_end|>"]


def test_tools(bytes_, tell):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    words = with_template(
        bytes_,
        CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].name }}{% endif %}"),
    )
    turns = [TALK[0], call, {"role": "tool", "content": "1"}, TALK[1]]
    (example,) = tokenise(chats(turns), words, 512, tell)
    assert learned(words, example) == ["add<|im_end|>", f"{FIRST}<|im_end|>"]
    assert asked(words, example).endswith("<|im_start|>tool\n1<|im_end|>\n<|im_start|>assistant\n")


def test_a_call_that_the_template_writes_otherwise_once_past_is_not_learned(bytes_, tell):
    words = with_template(bytes_, QWEN3.replace("{{ said + '", "{{ said + (m.tool_calls or '') | string + '"))
    call = {"role": "assistant", "content": "", "tool_calls": "add"}
    (example,) = tokenise(chats([TALK[0], call, {"role": "tool", "content": "1"}, TALK[1]]), words, 512, tell)
    assert "add<|im_end|>" in asked(words, example)
    assert learned(words, example) == [f"<think>\n\n</think>\n\n{FIRST}<|im_end|>"]
    assert [notice.split(",")[0] for notice in tell.notices] == ["1 earlier answers of rows"]


def test_spaces_of_an_earlier_answer_are_learned_where_offsets_are_trimmed(bytes_, tell):
    bytes_.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    words = with_template(bytes_, LLAMA2)
    (example,) = tokenise(
        chats([TALK[0], {"role": "assistant", "content": "if x:\n    y"}, *TALK[2:]]), words, 512, tell
    )
    assert learned(words, example)[0] == " if x:\n    y </s>"


def test_a_token_across_the_boundary_of_an_answer_is_parted(tell):
    words = with_template(merged(":<"), PLAIN.replace(": ", ":"))
    (example,) = tokenise(chats(TALK), words, 512, tell)
    prompt = example["input_ids"][: example["prompt_length"]]
    assert prompt == Encoder(words, True).chat_prompt(TALK[:-1])
    assert words.decode(prompt).endswith("Q:Two?\nA:")
    assert learned(words, example)[-1] == f"{LAST}</s>"
    assert learned(words, example)[0] == f":{FIRST}"  # an earlier answer is learned from its first token on


def test_an_answer_that_looks_like_the_end_of_a_turn_is_ended_by_the_template(bytes_, tell):
    (example,) = tokenise(chats([TALK[0], {"role": "assistant", "content": ">"}]), bytes_, 512, tell)
    assert learned(bytes_, example) == ["><|im_end|>"]


def test_a_chat_to_be_answered(bytes_, tell):
    rows = datasets.Dataset.from_dict({"id": [0], "prompt": [json.dumps(TALK[:3])], "messages": [json.dumps(TALK[:3])]})
    (example,) = tokenise(rows, bytes_, 512, tell)
    assert example["input_ids"] == Encoder(bytes_, True).chat_prompt(TALK[:3])
    assert "labels" not in example


def test_a_chat_that_the_template_refuses_is_named(bytes_, tell):
    words = with_template(bytes_, GEMMA)
    with pytest.raises(DataError) as caught:
        tokenise(chats(TALK, RULED), words, 512, tell, "train")
    assert str(caught.value).splitlines() == [
        "data.messages, train, row 1 (the first is 0): the chat template refuses a chat",
        '  found: System role not supported: [{"role": "system", "content": "Be brief."}, {"role": "user", "content": '
        '"One?"}, {"role": "assistant", "content": "<b>1',
        "  hint: templates differ in the roles they take, and in their order",
    ]


def test_chats_need_a_chat_template(bytes_, tell):
    with pytest.raises(SetupError, match="the tokenizer has no chat template"):
        tokenise(chats(TALK), with_template(bytes_, None), 512, tell)


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("longest", "start", "expected", "cut"),
    [
        (7, 1, ([1, 4, 5, 6], [7, 8, 2]), None),
        (6, 1, ([1, 5, 6], [7, 8, 2]), "prompt"),
        (5, 1, ([1, 6], [7, 8, 2]), "prompt"),
        (4, 1, ([1, 6], [7, 8]), "completion"),
        (3, 1, ([1, 6], [7]), "completion"),
        (2, 1, ([1], [7]), "completion"),
        (1, 1, ([1], []), "completion"),
        (6, None, ([4, 5, 6], [7, 8, 2]), "prompt"),
        (4, None, ([6], [7, 8, 2]), "prompt"),
        (2, None, ([6], [7]), "completion"),
        (1, None, ([6], []), "completion"),
    ],
)
def test_the_prompt_loses_its_beginning_before_the_completion_its_end(longest, start, expected, cut):
    example = Encoded([1, 4, 5, 6], [IGNORED, 4, IGNORED, 6], [7, 8, 2])
    got, what = fit(example, longest, start)
    assert ((got.prompt, got.completion), what) == (expected, cut)
    labels = {1: IGNORED, 4: 4, 5: IGNORED, 6: 6}
    assert got.prompt_labels == [labels[token] for token in got.prompt]


def test_a_prompt_without_a_completion_is_cut_to_length():
    assert fit(Encoded([1, 4, 5, 6], [IGNORED] * 4, []), 2, 1) == (Encoded([1, 6], [IGNORED] * 2, []), "prompt")


@pytest.mark.parametrize(("total", "level"), [(4, "warning"), (40, "info")])
def test_what_is_cut_is_counted(bytes_, tell, total, level):
    rows = pairs(("abcdef", "xy"), ("abcdef", "xyzxyzxyz"), *[("a", "b")] * (total - 2))
    got = tokenise(rows, bytes_, 7, tell, "train")
    assert [bytes_.decode(row["input_ids"]) for row in got][:2] == ["cdefxy</s>", "fxyzxyz"]
    share = f"1 of {total} train rows ({1 / total:.1%}) are longer than 7 tokens and lost"
    both = "all but the end of their prompt, and the end of their completion with the end of text"
    assert [(event.text, event.level) for event in tell[1:]] == [
        (f"{share} the beginning of their prompt: data.max_length", level),
        (f"{share} {both}: data.max_length", "warning"),
    ]


def test_no_end_of_text_to_learn_is_an_error(bytes_, tell):
    rows = pairs(("abcdef", "xyzxyzxyz"), ("a", "xyzxyzxyz"))
    with pytest.raises(DataError, match="every completion is cut, so that no end of text would be learned"):
        tokenise(rows, bytes_, 7, tell, "train")
    assert len(tokenise(rows, bytes_, 7, tell, "validation")) == 2


def test_earlier_answers_are_cut_in_step(bytes_, tell):
    (example,) = tokenise(chats(RULED), bytes_, 45, tell)
    assert learned(bytes_, example) == [" ✓<|im_end|>", f"{LAST}<|im_end|>"]


def test_an_example_with_nothing_to_learn():
    assert not Encoded([4, 5], [IGNORED, IGNORED], []).learned
    assert not Encoded([], [], [7]).learned  # the first token is never predicted
    assert Encoded([4], [IGNORED], [7]).learned
    assert Encoded([4, 5], [IGNORED, 5], []).learned


def test_left_out_rows_are_counted(bytes_, tell):
    bytes_.eos_token, bytes_.backend_tokenizer.normalizer = None, normalizers.Replace("x", "")
    got = tokenise(pairs(("a", "x"), ("a", "b"), ("x", "bb")), bytes_, 7, tell, "train")
    assert (got["id"][:], got["completion"][:], learned(bytes_, got[0])) == ([1], ["b"], ["b"])
    assert tell.notices[0] == "2 of 3 train rows were left out: nothing in them would be learned"


def test_no_row_is_left(bytes_, tell):
    bytes_.eos_token, bytes_.backend_tokenizer.normalizer = None, normalizers.Replace("x", "")
    with pytest.raises(DataError) as caught:
        tokenise(pairs(("a", "x"), ("b", "x")), bytes_, 7, tell, "train")
    assert str(caught.value) == "train: no row has a token to learn\n  found: 2 of 2 train rows"
    with pytest.raises(DataError, match="hint: data.max_length 1 leaves no room"):
        examples_of(pairs(("a", "b")), copy.deepcopy(bytes_), 1, tell, "train")
