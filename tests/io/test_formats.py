"""Layouts: what each row becomes, which layout wins, and the reason for each row that cannot be used."""

import json

import pytest
import xxhash

from fastsel.errors import InputError, UsageError
from fastsel.io import Message, open_pool
from fastsel.io.examples import content_hash, well_formed
from fastsel.io.layout_options import FORMATS, read_layout_options

QUESTION, ANSWER = Message("user", "What is 2 + 2?"), Message("assistant", "4")
TURNS = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
GPT_TURNS = [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]


def read(row, **options):
    """The example of a row, in a pool that also holds a row which is fine."""
    return open_pool([row], **options).examples([0])[0]


def reason(row, **options):
    """Why the row is skipped, in a pool whose other row has the layout and is fine."""
    fine = {**dict.fromkeys(row), "messages": TURNS} if not options else options.pop("fine")
    pool = open_pool([fine, row], **options)
    assert pool.status.tolist() == [0, 2], dict(pool.reasons)
    assert pool.reasons[1].startswith("row_id 1: ")
    example = pool.examples([1])[0]
    assert example.status == "skipped" and example.messages == () and example.reason == pool.reasons[1]
    return pool.reasons[1].removeprefix("row_id 1: ")


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"messages": TURNS}, "messages"),
        ({"messages": GPT_TURNS}, "messages"),
        ({"conversations": GPT_TURNS}, "sharegpt"),
        ({"conversations": TURNS}, "sharegpt"),
        ({"dialogs": TURNS}, "mig"),
        ({"instruction": "What is 2 + 2?", "output": "4"}, "alpaca"),
        ({"instruction": "What is 2 + 2?", "input": "", "output": "4", "text": "rendered"}, "alpaca"),
        ({"instruction": "What is 2 + 2?", "input": None, "output": "4", "history": None}, "alpaca"),
        ({"instruction": "What is 2 + 2?", "output": "4", "processed_scores": {"IFD": 0.5}}, "oda"),
        ({"prompt": "What is 2 + 2?", "completion": "4"}, "prompt_completion"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt_completion"),
    ],
)
def test_every_layout_says_the_same(row, layout):
    example = read(row)
    assert (example.status, example.layout, example.messages) == ("ok", layout, (QUESTION, ANSWER))
    assert open_pool([row]).format == layout


def test_every_format_can_be_forced():
    rows = {
        "messages": {"messages": TURNS}, "tulu": {"messages": TURNS, "dataset": "flan"}, "mig": {"dialogs": TURNS},
        "sharegpt": {"conversations": GPT_TURNS}, "alpaca": {"instruction": QUESTION.content, "output": "4"},
        "oda": {"instruction": QUESTION.content, "output": "4"}, "text": {"text": "4"},
        "prompt_completion": {"prompt": QUESTION.content, "completion": "4"},
    }  # fmt: skip
    assert set(rows) | {"auto"} == set(FORMATS)
    for format, row in rows.items():
        example = read(row, format=format)
        assert example.layout == format and example.messages[-1] == ANSWER
    assert read(rows["tulu"], format="tulu").source == "flan"
    assert read(rows["oda"], format="scored").layout == "oda"


def test_text_is_one_answer_without_a_prompt():
    example = read({"text": " Some text.\n"})
    assert example.layout == "text" and example.messages == (Message("assistant", " Some text.\n"),)


def test_flat_rows_keep_instruction_and_input_apart():
    example = read({"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief.",
                    "history": [["Hello", "Hi"], ["And you?", "Fine"]]})  # fmt: skip
    assert (example.instruction, example.input) == ("Add.", "2, 2")
    assert [tuple(turn) for turn in example.messages] == [
        ("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", "And you?"), ("assistant", "Fine"),
        ("user", "Add.\n2, 2"), ("assistant", "4"),
    ]  # fmt: skip
    conversation = read({"messages": TURNS})
    assert (conversation.instruction, conversation.input) == (None, None)


def test_valid_messages_win_over_flat_fields_row_by_row():
    flat = {"instruction": "flat", "output": "flat answer"}
    both = {**flat, "messages": TURNS}
    broken = {**flat, "messages": TURNS[:1]}
    pool = open_pool([both, broken, flat])
    assert [example.layout for chunk in pool.chunks() for example in chunk] == ["messages", "alpaca", "alpaca"]
    assert pool.layouts == {"messages": 1, "alpaca": 2}
    assert read(both, format="alpaca").messages[0].content == "flat"


def test_roles_of_every_dialect():
    words = ["developer", "human", "function_call", "observation", "GPT"]
    contents = ["s", "q", '{"name": "f"}', "r", "a"]
    row = {"conversations": [{"from": word, "value": content} for word, content in zip(words, contents, strict=True)]}
    assert [turn.role for turn in read(row).messages] == ["system", "user", "assistant", "tool", "assistant"]


def test_repeated_roles_and_a_greeting_are_kept():
    roles = ["assistant", "user", "user", "assistant", "assistant"]
    row = {"messages": [{"role": role, "content": str(i)} for i, role in enumerate(roles)]}
    assert [turn.role for turn in read(row).messages] == roles


def test_system_column_is_used_unless_the_conversation_has_its_own():
    assert read({"conversations": GPT_TURNS, "system": "S"}).messages[0] == ("system", "S")
    own = [{"from": "system", "value": "own"}, *GPT_TURNS]
    assert [turn.content for turn in read({"conversations": own, "system": "S"}).messages][:2] == [
        "own",
        QUESTION.content,
    ]


def test_tool_calls_and_text_parts_become_text():
    call = [{"function": {"name": "add", "arguments": "{}"}}]
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                        {"role": "assistant", "content": None, "tool_calls": call},
                        {"role": "tool", "content": "4"}, TURNS[1]], "tools": [{"name": "add"}]}  # fmt: skip
    example = read(row)
    assert [turn.content for turn in example.messages] == ["ab", json.dumps(call), "4", "4"]
    assert example.tools == '[{"name": "add"}]'
    assert read({"messages": TURNS, "tools": "as it is"}).tools == "as it is"
    assert read({"messages": TURNS, "tools": []}).tools is None


def test_only_the_completion_counts_when_the_prompt_has_answers():
    example = read({"prompt": TURNS + TURNS[:1], "completion": TURNS[1:]})
    assert example.trained == (3,)
    assert read({"prompt": TURNS[:1], "completion": TURNS[1:]}).trained is None


def test_marks_of_turns_to_train_on():
    turns = [{**turn, "train": turn["role"] == "assistant" and i > 1} for i, turn in enumerate(TURNS + TURNS)]
    options = {"tags": {"message_field_training": "train"}}
    assert read({"messages": turns, "system": "S"}, **options).trained == (4,)
    unmarked = [{**turn, "train": False} for turn in TURNS]
    assert "train: true" in reason({"messages": unmarked}, fine={"messages": TURNS}, **options)


NO_ANSWER = {"instruction": "x", "input": ""}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "x", "output": ""}, "the answer (output) is empty"),
        ({"instruction": "x", "output": " \n\t\u00a0"}, "the answer (output) is only white space"),
        ({"instruction": "x", "output": None}, "the answer (output) is null, not text"),
        ({"instruction": "x", "output": 4}, "the answer (output) is a number, not text"),
        ({"instruction": "x", "output": ["a"]}, "the answer (output) is a list, not text"),
        ({"instruction": None, "output": "a"}, "instruction is null, not text"),
        ({"instruction": "x", "input": 3, "output": "a"}, "input is a number, not text"),
        ({"instruction": "x", "input": {"a": 1}, "output": "a"}, "input is an object, not text"),
        ({"instruction": "x", "output": "a", "system": 1}, "system is a number, not text"),
        ({"instruction": "x", "output": "a", "history": "old"}, "history is text, not a list of pairs"),
        ({"instruction": "x", "output": "a", "history": [["q"]]}, "history[0] is not a pair of question and answer"),
        ({"instruction": "x", "output": "a", "history": [["q", None]]},
         "history[0] is not a pair of question and answer"),
        ({"instruction": "x", "input": ""}, "no known layout: the row's keys are instruction, input"),
        ({"instruction": "x", "output": "", "text": "x"}, "the answer (output) is empty"),
        ({"prompt": TURNS[:1], "completion": "4"},
         "prompt and completion must both be text or both be lists of messages"),
        ({"prompt": TURNS[:1], "completion": TURNS}, "completion holds messages that are not the assistant's"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": "hello"}, "messages is text, not a list of messages"),
        ({"messages": [None]}, "messages[0] is null, not a message with a role and a content"),
        ({"messages": [TURNS[0], {"role": None, "content": "a"}]}, "messages[1] has no role (its role is null)"),
        ({"messages": [TURNS[0], {"content": "a"}]}, "messages[1] has no role (its role is null)"),
        ({"messages": [TURNS[0], {"role": "oracle", "content": "a"}]},
         "messages[1] has the unknown role 'oracle'; name it with --tags"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": None}]}, "messages[1].content is null, not text"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": ["a"]}]},
         "messages[1].content has a part that is text, not an object with a type and a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TURNS[1]]},
         "messages[0].content has a part of type image_url; only text can be scored"),
        ({"messages": TURNS[:1]}, "the last message of messages is the user's, not the assistant's"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": " "}]},
         "the answer (the last message of messages) is empty"),
        ({"messages": TURNS[1:]}, "messages has no user message before the answer"),
        ({"conversations": [{"from": "human", "value": None}, GPT_TURNS[1]]},
         "conversations[0].value is null, not text"),
        ({"conversations": 3, "messages": None}, "conversations is a number, not a list of messages"),
        ({"unrelated": 1}, "no known layout: the row's keys are unrelated"),
        ({}, "no known layout: the row's keys are none"),
        ({"instruction": "x", "output": "y", "prompt": "x", "completion": "z"},
         "the row can be read as alpaca and as prompt_completion; say which with --format"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_skipped_with_a_reason(row, expected):
    assert reason(row) == expected


@pytest.mark.parametrize(
    ("row", "kind"), [(7, "a number"), ("text", "text"), (None, "null"), ([1], "a list"), (True, "a boolean")]
)
def test_rows_that_are_not_objects_are_skipped(row, kind, tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n" + json.dumps(row) + "\n")
    assert dict(open_pool(path).reasons) == {1: f"line 2: the row is {kind}, not an object"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "q", "answer": "a"}], "keys are question, answer; the nearest format is alpaca: name the "
         "columns with --columns prompt=question response=answer"),
        ([{"turns": TURNS}], "the nearest format is messages: name the column with --columns messages=turns"),
        ([{"instructions": "q", "outputs": "a"}], "the nearest format is alpaca (instruction, input, output, history)"),
        ([{"prompt": "q", "response": "a"}], "--columns prompt=prompt response=response"),
        ([{"instruction": "q", "output": "a", "prompt": "q", "completion": "b"}],
         "the row can be read as alpaca and as prompt_completion; say which with --format; the first row's keys are"),
    ],
)  # fmt: skip
def test_refuses_a_pool_of_unknown_layout(rows, message):
    with pytest.raises(InputError, match="the layout is not known") as refusal:
        open_pool(rows * 3)
    assert message in str(refusal.value) and refusal.value.exit_code == 2


def test_a_forced_format_that_no_row_has_is_said_to_be_the_reason():
    with pytest.raises(InputError, match="--format sharegpt reads conversations: leave --format out"):
        open_pool([{"instruction": "q", "output": "a"}], format="sharegpt")


def test_refuses_a_long_pool_of_unknown_layout_early():
    rows = iter([{"question": "q"}] * 12_000)

    class Counted(list):
        def __getitem__(self, key):
            return rows if isinstance(key, slice) else list.__getitem__(self, key)

    with pytest.raises(InputError, match="nearest format"):
        open_pool(Counted([{"question": "q"}]))
    assert len(list(rows)) == 2_000


def test_columns_name_fields_and_reset_the_others():
    row = {"question": "q", "input": "not asked for", "answer": "a", "uid": 7, "origin": "web"}
    example = read(row, columns="prompt=question response=answer id=uid source=origin")
    assert [turn.content for turn in example.messages] == ["q", "a"]
    assert (example.id, example.source, example.input) == ("7", "web", "")
    with_input = read(row, columns={"prompt": "question", "query": "input", "response": "answer"})
    assert with_input.messages[0].content == "q\nnot asked for"
    assert (
        read({"question": "q", "answer": "a"}, columns=["prompt=question", "completion=answer"]).layout
        == "prompt_completion"
    )
    assert read({"body": "b"}, columns={"field": "body"}, format="text").messages == (Message("assistant", "b"),)


def test_a_column_that_no_row_has_is_said_at_once():
    with pytest.raises(InputError, match="keys are question, answer; the nearest format is alpaca"):
        open_pool([{"question": "q", "answer": "a"}], columns="prompt=question response=anwser")
    with pytest.raises(InputError, match="keys are turns; the nearest format is messages"):
        open_pool([{"turns": TURNS}], columns="messages=turn")


def test_columns_may_be_paths_into_objects():
    row = {"data": {"turns": TURNS, "origin": "web"}}
    example = read(row, columns={"messages": "data.turns", "source": "data.origin"})
    assert example.messages == (QUESTION, ANSWER) and example.source == "web"


def test_tags_in_llama_factory_and_axolotl_words():
    turns = [{"who": "Q", "says": "What is 2 + 2?"}, {"who": "A", "says": "4"}]
    llama_factory = {"role_tag": "who", "content_tag": "says", "user_tag": "Q", "assistant_tag": "A"}
    axolotl = {
        "message_property_mappings": {"role": "who", "content": "says"},
        "roles_to_train": ["A"],
        "roles": {"user": ["Q"], "assistant": "A"},
    }
    for tags in (llama_factory, axolotl):
        assert read({"dialog": turns}, columns={"field_messages": "dialog"}, tags=tags).messages == (QUESTION, ANSWER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "sharegtp"}, "--format sharegtp is not known; choose one of auto, messages"),
        ({"columns": {"mesages": "x"}}, "unknown word 'mesages'; did you mean messages?"),
        ({"columns": "messages"}, "WORD=COLUMN pairs"),
        ({"columns": {"prompt": "q"}}, "no response or completion column"),
        ({"columns": {"response": "a"}}, "no prompt column"),
        ({"columns": {"prompt": "q", "instruction": "i", "response": "a"}}, "names the prompt column twice"),
        ({"columns": {"prompt": "q", "response": "a", "completion": "c"}}, "both a response and a completion column"),
        ({"columns": {"prompt": 3, "response": "a"}}, "must be the name of a column"),
        ({"columns": {"text": "t"}, "format": "messages"}, "--format messages needs the columns messages"),
        ({"tags": {"roles_to_train": ["user"]}}, "only the assistant's turns can be scored"),
    ],
)
def test_refuses_options_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match="--") as refusal:
        read_layout_options(**options)
    assert message in str(refusal.value)


def test_content_hash_is_the_documented_one():
    r"""xxh3_128 of the JSON that JavaScript's JSON.stringify would write, here spelt out by hand."""
    messages = (Message("user", 'a "b"\n\\ é\x00\x7f\u2028/'), ANSWER)
    canonical = (
        r'[{"role":"user","content":"a \"b\"\n\\ é\u0000' + "\x7f\u2028/" + r'"},{"role":"assistant","content":"4"}]'
    )
    assert content_hash(messages) == xxhash.xxh3_128(canonical.encode()).digest()
    pool = open_pool(
        [{"messages": TURNS}, {"instruction": "What is 2 + 2?", "output": "4"}, {"instruction": "", "output": ""}]
    )
    assert pool.content_hash[0].tobytes() == pool.content_hash[1].tobytes() == content_hash((QUESTION, ANSWER))
    assert not pool.content_hash[2].any()


def test_lone_surrogates_are_replaced_for_scoring_only():
    assert well_formed("a\ud800b\ude00\ud83d\ude00") == "a\ufffdb\ufffd😀"
    assert well_formed("plain é") == "plain é"
    example = read(
        {"id": "x\udc00", "source": "s\ud800", "instruction": "q\ud800", "input": "\udfff", "output": "a\ud83d"}
    )
    assert (example.id, example.source) == ("x\ufffd", "s\ufffd")
    assert example.messages == (Message("user", "q\ufffd\n\ufffd"), Message("assistant", "a\ufffd"))
    in_turns = [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "\ud800"}]
    assert read({"messages": in_turns, "system": "\ud800", "tools": "\ud800"}).messages[0].content == "\ufffd"
    odd_role = {"messages": [{"role": "\ud800", "content": "x"}]}
    assert "unknown role" in reason(odd_role) and reason(odd_role).encode()
