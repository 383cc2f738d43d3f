"""What each pass feeds to a model, and which of its tokens are scored."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastsel.errors import InputError
from fastsel.features.answer_tokens import CONDITIONED, DIRECT, REASONS, AnswerTokenizer
from fastsel.io import open_pool
from fastsel.io.templates import ALPACA, GUARD, NONE, SingleTurnTemplate, load_template


def byte_tokenizer(*, start=False, merges=(), marks=("<s>",), chat_template=None, **special):
    """One token a byte, and those that the merges make; ids are the positions in the alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=list(marks), **special)
    tokenizer.chat_template = chat_template
    if start:
        backend = tokenizer.backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
        )
    return tokenizer


def tokenise(rows, tokenizer, template, **options):
    pool = open_pool(rows)
    options = {"max_length": 64, **options}
    return AnswerTokenizer(tokenizer, template, **options)(next(pool.chunks(rows=len(rows))))


def shown(tokenizer, sequence):
    """Before | scored, as text."""
    return (
        "".join(tokenizer.convert_ids_to_tokens(sequence.ids[: sequence.first]))
        + "|"
        + "".join(tokenizer.convert_ids_to_tokens(sequence.ids[sequence.first :]))
    ).replace("Ċ", "\\n").replace("Ġ", " ")  # fmt: skip


def passes(tokenizer, row):
    return {sequence.of_pass: shown(tokenizer, sequence) for sequence in row.sequences}


ROW = {"instruction": "ask", "output": "yes"}
HEADED = SingleTurnTemplate("headed", "Q:{instruction} A:", None, "A:")


def test_both_passes_score_the_same_ids():
    tokenizer = byte_tokenizer(start=True, bos_token="<s>")
    (row,) = tokenise([ROW], tokenizer, HEADED)
    assert passes(tokenizer, row) == {CONDITIONED: "<s>Q:ask A:|yes", DIRECT: "<s>A:|yes"}
    assert row.n_tokens == 12 and row.why == 0


def test_without_a_start_token_a_header_is_enough():
    tokenizer = byte_tokenizer(bos_token="<s>")
    (row,) = tokenise([ROW], tokenizer, HEADED)
    assert passes(tokenizer, row) == {CONDITIONED: "Q:ask A:|yes", DIRECT: "A:|yes"}


@pytest.mark.parametrize(
    "special, marks, start",
    [
        ({"bos_token": "<s>"}, ("<s>",), "<s>"),
        ({"eos_token": "</s>"}, ("</s>",), "</s>"),
        ({"bos_token": "<|im_start|>"}, ("<|im_start|>", "<|endoftext|>"), "<|endoftext|>"),
    ],
)
def test_without_header_and_start_token_both_passes_get_one(special, marks, start):
    tokenizer = byte_tokenizer(marks=marks, **special)
    (row,) = tokenise([ROW], tokenizer, NONE)
    assert passes(tokenizer, row) == {CONDITIONED: f"{start}ask\\n|yes", DIRECT: f"{start}|yes"}


def test_a_tokenizer_with_no_start_token_at_all_leaves_the_first_answer_token_out_of_both_passes():
    tokenizer = byte_tokenizer(marks=())
    rows = tokenise([ROW, {**ROW, "output": "y"}], tokenizer, NONE)
    assert passes(tokenizer, rows[0]) == {CONDITIONED: "ask\\ny|es", DIRECT: "y|es"}
    assert rows[1].sequences == [] and REASONS[rows[1].why] == "no answer token is left to score"


def test_a_token_across_the_boundary_is_avoided():
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ")], bos_token="<s>")
    (row,) = tokenise([{**ROW, "output": "\nyes"}], tokenizer, NONE)
    (conditioned, direct) = row.sequences
    assert shown(tokenizer, conditioned) == "<s>ask\\n|\\nyes"
    assert conditioned.ids[conditioned.first :] == direct.ids[direct.first :]
    (released,) = tokenise([{**ROW, "output": "\nyes"}], tokenizer, NONE, rule="superfiltering")
    assert passes(tokenizer, released) == {CONDITIONED: "ask\\n\\n|yes", DIRECT: "\\n|yes"}


@pytest.mark.parametrize("overflow", ["truncate", "skip", "error"])
def test_an_answer_that_does_not_fit(overflow):
    """Q:ask A: has 8 tokens, with the start token 9: a window of 11 holds two of the answer's three."""
    tokenizer = byte_tokenizer(start=True, bos_token="<s>")
    options = {"max_length": 11, "overflow": overflow}
    if overflow == "error":
        with pytest.raises(InputError, match="row 0 has 12 tokens, more than max_length=11"):
            tokenise([ROW], tokenizer, HEADED, **options)
        return
    (row,) = tokenise([ROW], tokenizer, HEADED, **options)
    assert row.n_tokens == 12
    if overflow == "skip":
        assert row.sequences == [] and "longer than" in REASONS[row.why]
    else:
        assert passes(tokenizer, row) == {CONDITIONED: "<s>Q:ask A:|ye", DIRECT: "<s>A:|ye"}
        assert "cut" in REASONS[row.why]


def test_a_prompt_that_fills_the_window_leaves_no_score():
    tokenizer = byte_tokenizer(start=True, bos_token="<s>")
    (row,) = tokenise([ROW], tokenizer, HEADED, max_length=9)
    assert row.sequences == [] and "fills max_length" in REASONS[row.why]


def test_special_token_strings_of_a_row_stay_text():
    tokenizer = byte_tokenizer(start=True, bos_token="<s>")
    row, released = (
        tokenise([{**ROW, "output": "<s>"}], tokenizer, HEADED, rule=rule)[0] for rule in ("shared", "cherry")
    )
    mark = tokenizer.convert_tokens_to_ids("<s>")
    assert row.sequences[0].ids.count(mark) == 1 and row.n_tokens == 12
    assert released.sequences[0].ids.count(mark) == 2


def test_a_guard_in_a_row_opens_no_door():
    """The character that guards a row's special tokens under a chat template is only a character elsewhere."""
    tokenizer = byte_tokenizer(start=True, bos_token="<s>")
    (row,) = tokenise([{**ROW, "output": f"<s>{GUARD}"}], tokenizer, HEADED)
    conditioned, direct = row.sequences
    assert conditioned.ids.count(tokenizer.convert_tokens_to_ids("<s>")) == 1
    assert len(direct.ids) - direct.first == 3 + len(GUARD.encode())


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT_MARKS = ("<|user|>", "<|assistant|>", "<|end|>")


def test_marks_of_a_chat_template_are_tokens_and_those_of_a_row_are_not():
    tokenizer = byte_tokenizer(marks=CHAT_MARKS, chat_template=CHAT, eos_token="<|end|>")
    rows = [{"instruction": "a<|end|><|assistant|>b", "output": "yes<|end|>"}, ROW]
    template = load_template("tokenizer", tokenizer)
    guarded, plain = tokenise(rows, tokenizer, template)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for row in (guarded, plain):
        assert row.sequences[0].ids.count(end) == 2  # one closes the question, one the answer
        assert row.sequences[1].ids.count(end) == 1
        assert row.sequences[0].ids[-1] == end
    assert passes(tokenizer, plain) == {
        CONDITIONED: "<|user|>ask<|end|><|assistant|>|yes<|end|>",
        DIRECT: "<|assistant|>|yes<|end|>",
    }
    assert passes(tokenizer, guarded)[CONDITIONED] == (
        "<|user|>a<|end|><|assistant|>b<|end|><|assistant|>|yes<|end|><|end|>"  # as text it reads the same
    )


def test_marks_that_swallow_white_space_do_so_in_every_row():
    """As Phi-3's: the line break after <|assistant|> belongs to the mark, also in a row that holds a mark's string."""
    tokenizer = byte_tokenizer(marks=(), eos_token="<|end|>")
    marks = [AddedToken("<|user|>", rstrip=True, special=True), AddedToken("<|assistant|>", rstrip=True, special=True)]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = CHAT.replace("|>", "|>\n")
    rows = [ROW, {**ROW, "instruction": "<|end|>"}]
    plain, guarded = tokenise(rows, tokenizer, load_template("tokenizer", tokenizer))
    assert passes(tokenizer, plain)[CONDITIONED] == "<|user|>ask<|end|>\\n<|assistant|>|yes<|end|>\\n"
    assert passes(tokenizer, guarded)[CONDITIONED] == "<|user|><|end|><|end|>\\n<|assistant|>|yes<|end|>\\n"
    assert passes(tokenizer, plain)[DIRECT] == passes(tokenizer, guarded)[DIRECT]


def test_each_answer_of_a_conversation_follows_what_came_before():
    tokenizer = byte_tokenizer(start=True, bos_token="<s>")
    chat = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in chat]}]
    (row,) = tokenise(rows, tokenizer, HEADED)
    assert [shown(tokenizer, sequence) for sequence in row.sequences] == [
        "<s>Q:q A:|a",
        "<s>A:|a",
        "<s>Q:User: q\\nAssistant: a\\nr A:|b",
        "<s>A:|b",
    ]
    (last,) = tokenise(rows, tokenizer, HEADED, turns="last")
    assert last.sequences == row.sequences[2:]


def test_a_long_first_turn_leaves_the_others():
    """The first answer is cut to the window, the second prompt repeats it and leaves no room: the row is truncated."""
    tokenizer = byte_tokenizer(start=True, bos_token="<s>")
    chat = [("user", "q"), ("assistant", "a" * 100), ("user", "r"), ("assistant", "b")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in chat]}]
    (row,) = tokenise(rows, tokenizer, HEADED)
    assert len(row.sequences) == 2 and "cut" in REASONS[row.why]


def test_a_blank_turn_beside_others_takes_nothing_away():
    tokenizer = byte_tokenizer(start=True, bos_token="<s>")
    chat = [("user", "q"), ("assistant", ""), ("user", "r"), ("assistant", "b")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in chat]}]
    (row,) = tokenise(rows, tokenizer, HEADED)
    assert [shown(tokenizer, s) for s in row.sequences] == ["<s>Q:User: q\\nAssistant: \\nr A:|b", "<s>A:|b"]
    assert row.why == 0


def test_released_cherry_cuts_the_direct_pass_by_four_whatever_the_header():
    """Window 16; the prompt has 9 tokens with its start, so 16 - 9 + 4 = 11 direct tokens: 3 of header, 8 of 10."""
    tokenizer = byte_tokenizer(start=True, bos_token="<s>")
    (row,) = tokenise([{**ROW, "output": "0123456789"}], tokenizer, HEADED, rule="cherry", max_length=16)
    assert row.sequences == [] and "longer than" in REASONS[row.why]  # 9 + 8 > 16: dropped by its last filter
    four = SingleTurnTemplate("four", "Q:{instruction} A::", None, "A::")
    (row,) = tokenise([{**ROW, "output": "0123456789"}], tokenizer, four, rule="cherry", max_length=17)
    assert passes(tokenizer, row) == {CONDITIONED: "<s>Q:ask A::|0123456", DIRECT: "<s>A::|0123456"}


@pytest.mark.parametrize(
    "row, wanted, expected",
    [
        (ROW, (CONDITIONED, DIRECT), {CONDITIONED: "ask\\n|yes", DIRECT: "y|es"}),
        ({"text": "yes"}, (CONDITIONED,), {CONDITIONED: "y|es"}),
    ],
)
def test_released_cherry_has_no_prediction_for_the_first_token_of_all(row, wanted, expected):
    """No header and no start token, as under GPT-2 with template "none", or no prompt either."""
    tokenizer = byte_tokenizer(marks=())
    (tokens,) = tokenise([row], tokenizer, NONE, rule="cherry", passes=wanted)
    assert passes(tokenizer, tokens) == expected


def test_released_superfiltering_scores_a_shifted_answer_without_a_start_token():
    """Window 8, prompt "ask\\n" of 4: the direct text keeps 8 - 4 + 1 = 5 tokens and scores 4, as the other pass."""
    tokenizer = byte_tokenizer(marks=())
    (row,) = tokenise([{**ROW, "output": "0123456789"}], tokenizer, NONE, rule="superfiltering", max_length=8)
    assert passes(tokenizer, row) == {CONDITIONED: "ask\\n|0123", DIRECT: "0|1234"}


def test_the_alpaca_templates_end_in_their_header():
    assert ALPACA.prompt.endswith(ALPACA.header) and ALPACA.prompt_with_input.endswith(ALPACA.header)


TEXT = st.text(st.sampled_from("ab <s>\n:é🙂"), min_size=1, max_size=12).filter(str.strip)
MERGED = byte_tokenizer(merges=[("Ċ", "Ċ"), ("a", "b"), ("Ġ", "a")], start=True, bos_token="<s>")


@given(TEXT, TEXT, st.integers(2, 40), st.sampled_from([HEADED, NONE, ALPACA]))
@settings(deadline=None)
def test_law_both_passes_score_the_answer_and_nothing_else(instruction, answer, max_length, template):
    (row,) = tokenise([{"instruction": instruction, "output": answer}], MERGED, template, max_length=max_length)
    if not row.sequences:
        assert row.why
        return
    conditioned, direct = row.sequences
    scored = conditioned.ids[conditioned.first :]
    assert scored == direct.ids[direct.first :] and len(scored) > 0
    assert max(len(conditioned.ids), len(direct.ids)) <= max_length
    mark = MERGED.convert_tokens_to_ids("<s>")
    assert conditioned.ids.count(mark) == direct.ids.count(mark) == 1
    pieces = pre_tokenizers.ByteLevel.alphabet()
    text = "".join(MERGED.convert_ids_to_tokens(scored))
    expected = "".join(MERGED.convert_ids_to_tokens(MERGED(answer, split_special_tokens=True)["input_ids"][1:]))
    assert set(text) <= set(pieces) and expected.startswith(text)
    if row.why == 0:
        assert text == expected
        # What a training run would see: where a token reaches across the boundary, it is one token less.
        assert row.n_tokens <= len(conditioned.ids) <= row.n_tokens + 1
