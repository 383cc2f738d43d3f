"""Prompt templates: the text before each answer, and the answer."""

import hashlib
import json
import sys
from types import ModuleType

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastsel.errors import InputError, UsageError
from fastsel.io.examples import Example, Message
from fastsel.io.templates import ALPACA, GUARD, Turn, UnfitConversationError, load_template

PLAIN_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED_CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer_with(chat_template=None, marks=("<|end|>",), **special):
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=list(marks), **special)
    tokenizer.chat_template = chat_template
    return tokenizer


def flat(instruction, answer="yes", extra=""):
    user = f"{instruction}\n{extra}" if extra else instruction
    messages = (Message("user", user), Message("assistant", answer))
    return Example(0, "ok", layout="alpaca", messages=messages, instruction=instruction, input=extra)


def chat(*turns, **fields):
    return Example(0, "ok", layout="messages", messages=tuple(Message(*turn) for turn in turns), **fields)


TWO_TURNS = chat(("system", "Be brief."), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))


@pytest.mark.parametrize(
    "name, without, with_input, header",
    [
        ("none", "ask\n", "ask\nmore\n", ""),
        ("wiz", "ask\n\n### Response:", "ask\nInput:more\n\n### Response:", "### Response:"),
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nask\n\n### Response:",
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n### Instruction:\nask\n\n### Input:\nmore\n\n"
            "### Response:",
            "### Response:",
        ),
    ],
)
def test_single_turn_templates(name, without, with_input, header):
    template = load_template(name)
    assert template.turns(flat("ask")) == [Turn(without, header, "yes")]
    assert template.turns(flat("ask", extra="more")) == [Turn(with_input, header, "yes")]


def test_vicuna_joins_the_input():
    (turn,) = load_template("vicuna").turns(flat("ask", extra="more"))
    assert turn.prompt.endswith(" USER: ask\nmore ASSISTANT:") and turn.header == "ASSISTANT:"


def test_braces_of_a_row_are_text():
    (turn,) = load_template("none").turns(flat("a {input} b", extra="{instruction} {x}"))
    assert turn.prompt == "a {input} b\n{instruction} {x}\n"


def test_earlier_turns_stand_before_the_last_instruction():
    first, second = load_template("none").turns(TWO_TURNS)
    assert first == Turn("System: Be brief.\nq\n", "", "a")
    assert second == Turn("System: Be brief.\nUser: q\nAssistant: a\nr\n", "", "b")


def test_an_answer_after_a_tool_has_no_new_instruction():
    turns = (("user", "q"), ("assistant", "call"), ("tool", "result"), ("assistant", "b"))
    assert load_template("none").turns(chat(*turns, tools="[]"))[1].prompt == (
        "Tools: []\nUser: q\nAssistant: call\nTool: result\n"
    )


def test_a_text_has_no_prompt():
    text = chat(("assistant", "Once."))
    for template in (
        ALPACA,
        load_template("tulu", tokenizer_with()),
        load_template("auto", tokenizer_with(PLAIN_CHAT)),
    ):
        assert template.turns(text)[0][:2] == ("", "")


@pytest.mark.parametrize("chat_template", [PLAIN_CHAT, MARKED_CHAT])
def test_a_conversation_that_begins_with_an_answer(chat_template):
    greeting = chat(("assistant", "Hello."), ("user", "q"), ("assistant", "a"))
    tokenizer = tokenizer_with(chat_template, bos_token="<s>")
    for template in (load_template("none"), load_template("tulu", tokenizer), load_template("tokenizer", tokenizer)):
        first, second = template.turns(greeting)
        assert first[:2] == ("", "") and "Hello." in second.prompt and second.answer.startswith("a")


def test_tulu():
    template = load_template("tulu", tokenizer_with(eos_token="</s>", marks=()))
    assert template.turns(TWO_TURNS) == [
        Turn("<|system|>\nBe brief.\n<|user|>\nq\n<|assistant|>\n", "<|assistant|>\n", "a</s>"),
        Turn(
            "<|system|>\nBe brief.\n<|user|>\nq\n<|assistant|>\na</s>\n<|user|>\nr\n<|assistant|>\n",
            "<|assistant|>\n",
            "b</s>",
        ),
    ]


def test_chat_template_by_prefix():
    template = load_template("tokenizer", tokenizer_with(PLAIN_CHAT, bos_token="<s>"))
    assert template.turns(chat(*TWO_TURNS.messages[1:])) == [
        Turn("<s><|user|>q<|end|><|assistant|>", "<s><|assistant|>", "a<|end|>"),
        Turn("<s><|user|>q<|end|><|assistant|>a<|end|><|user|>r<|end|><|assistant|>", "<s><|assistant|>", "b<|end|>"),
    ]


def test_chat_template_that_marks_its_answers():
    template = load_template("tokenizer", tokenizer_with(MARKED_CHAT))
    assert template.turns(chat(*TWO_TURNS.messages[1:])) == [
        Turn("<|user|>q<|end|><|assistant|>", "<|assistant|>", "a<|end|>"),
        Turn("<|user|>q<|end|><|assistant|>a<|end|><|user|>r<|end|><|assistant|>", "<|assistant|>", "b<|end|>"),
    ]


def test_an_empty_mask_falls_back_to_prefixes():
    only_user = PLAIN_CHAT.replace("{{ bos_token }}", "{% if false %}{% generation %}{% endgeneration %}{% endif %}")
    (turn,) = load_template("tokenizer", tokenizer_with(only_user)).turns(flat("q"))
    assert turn == Turn("<|user|>q<|end|><|assistant|>", "<|assistant|>", "yes<|end|>")


def test_a_template_that_rewrites_the_prompt_is_refused():
    counts = "{{ messages | length }}" + PLAIN_CHAT.replace("{{ bos_token }}", "")
    with pytest.raises(UnfitConversationError, match="assistant turn 1 does not follow its generation prompt"):
        load_template("tokenizer", tokenizer_with(counts)).turns(flat("q"))


def test_a_template_that_raises_is_refused_with_its_words():
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UnfitConversationError, match="the chat template refuses it: roles must alternate"):
        load_template("tokenizer", tokenizer_with(strict)).turns(flat("q"))


def test_marks_in_a_row_are_guarded():
    template = load_template("tokenizer", tokenizer_with(PLAIN_CHAT, bos_token="<s>"))
    (turn,) = template.turns(flat("a <|end|> b", answer="<s>"))
    assert turn.prompt == f"<s><|user|>a <{GUARD}|end|> b<|end|><|assistant|>"
    assert turn.answer == f"<{GUARD}s><|end|>"


def test_trl_marks_the_answers_of_a_known_template(monkeypatch):
    trl, known = ModuleType("trl"), ModuleType("trl.chat_template_utils")
    known.get_training_chat_template = lambda tokenizer: MARKED_CHAT
    monkeypatch.setitem(sys.modules, "trl", trl)
    monkeypatch.setitem(sys.modules, "trl.chat_template_utils", known)
    template = load_template("tokenizer", tokenizer_with(PLAIN_CHAT))
    assert template.sha256 == hashlib.sha256(MARKED_CHAT.encode()).hexdigest()

    def unknown(tokenizer):
        raise ValueError("not a known template")

    known.get_training_chat_template = unknown
    assert (
        load_template("tokenizer", tokenizer_with(PLAIN_CHAT)).sha256 == hashlib.sha256(PLAIN_CHAT.encode()).hexdigest()
    )


def test_auto_takes_the_tokenizers_or_alpaca():
    assert load_template("auto", tokenizer_with()).id == "alpaca"
    assert load_template("auto", tokenizer_with(PLAIN_CHAT)).id == "tokenizer"


def test_files(tmp_path):
    yaml = tmp_path / "mine.yaml"
    yaml.write_text('prompt: "Q: {instruction}\\nA:"\nheader: "A:"\n')
    template = load_template(yaml)
    assert template.id == "mine.yaml"
    assert template.turns(flat("ask", extra="more")) == [Turn("Q: ask\nmore\nA:", "A:", "yes")]
    (tmp_path / "chat.jinja").write_text(PLAIN_CHAT)
    assert load_template(tmp_path / "chat.jinja", tokenizer_with()).turns(flat("q"))[0].answer == "yes<|end|>"


@pytest.mark.parametrize(
    "content, message",
    [
        ({"prompt": "no place"}, "`prompt` must hold {instruction}"),
        ({"prompt": "{instruction}", "prompt_with_input": "{instruction}"}, "`prompt_with_input` must hold"),
        ({"prompt": "{instruction}", "header": "A:"}, "each prompt must end in the header 'A:'"),
        ({"prompt": "{instruction}", "suffix": ""}, "must hold only the texts header, prompt, prompt_with_input"),
        (["{instruction}"], "must hold only the texts"),
    ],
)
def test_refuses_files_without_a_template(tmp_path, content, message):
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        load_template(tmp_path / "bad.json")


def test_refuses_unreadable_files_and_unknown_names(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_template(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("prompt: [")
    with pytest.raises(InputError, match="is not valid YAML"):
        load_template(tmp_path / "bad.yaml")
    with pytest.raises(UsageError, match="template='alpacca' is not known; it is one of: alpaca, none, wiz, vicuna"):
        load_template("alpacca")
    with pytest.raises(UsageError, match="needs a model's tokenizer"):
        load_template("tulu")
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        load_template("tokenizer", tokenizer_with())


def test_the_hash_is_of_what_decides_the_text():
    assert load_template("alpaca").sha256 == ALPACA.sha256 != load_template("none").sha256
