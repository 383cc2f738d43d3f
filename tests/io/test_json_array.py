"""JSON arrays: the same rows as JSON Lines, wherever a block ends, and a mistake is refused with its line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.errors import InputError
from fastsel.io import files, open_pool
from fastsel.io.json_array import split_array

ROWS = [
    {"id": "é😀", "instruction": "q]},[{", "output": 'a "quoted" \\ \n answer\u2028', "n": [1.5, -0, 10**30, 1e-300]},
    {"instruction": "q", "output": "", "deep": {"a": [{"b": None}, True]}},
    {"instruction": "q", "output": "x" * 5000},
]
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def blocks_of(content, size):
    return (content[i : i + size] for i in range(0, len(content), size))


@settings(deadline=None, max_examples=100)
@given(st.lists(values, max_size=6), st.sampled_from([None, 1, "\t"]), st.booleans(), st.integers(1, 9), st.data())
def test_law_elements_and_offsets_are_those_of_the_whole(elements, indent, ascii, size, data):
    """Split in blocks of any size, each element parses to its value, lies at its offset and begins on its line."""
    text = " \n" + json.dumps(elements, indent=indent, ensure_ascii=ascii) + "\n"
    content = data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode("utf-8", "surrogatepass")
    pieces = list(split_array(blocks_of(content, size), 0, True))
    assert [json.loads(piece.raw.decode()) for piece in pieces] == elements
    for piece in pieces:
        assert content[piece.offset : piece.offset + len(piece.raw)] == piece.raw
        assert piece.line == 1 + content[: piece.offset].count(b"\n")
    if pieces:
        start = data.draw(st.integers(0, len(pieces) - 1))
        from_there = content[pieces[start].offset :]
        again = split_array(blocks_of(from_there, size), pieces[start].offset, False)
        assert [piece[::2] for piece in again] == [piece[::2] for piece in pieces[start:]]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("block", [7, 1 << 22])
def test_an_array_gives_the_rows_of_its_elements(tmp_path, monkeypatch, indent, block):
    monkeypatch.setattr(files, "BLOCK_BYTES", block)
    path = tmp_path / "pool.json"
    path.write_text(json.dumps(ROWS, indent=indent, ensure_ascii=False), encoding="utf-8")
    pool = open_pool(path)
    assert pool.status.tolist() == [0, 2, 0]
    assert pool.reasons[1] == f"line {1 if indent is None else 13}: the answer (output) is empty"
    assert [example.messages[-1].content for example in pool.examples([2, 0])] == [ROWS[2]["output"], ROWS[0]["output"]]
    out = pool.write_rows([2, 0, 1], tmp_path / "selected.json")
    assert out == tmp_path / "selected.jsonl"
    assert [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]] == [ROWS[2], ROWS[0], ROWS[1]]
    assert [row for row in pool.rows([0, 1])] == ROWS[:2]


def test_numbers_keep_their_spelling(tmp_path):
    path = tmp_path / "pool.json"
    path.write_text('[{"instruction": "q",\n "output": "a", "n": 1.50, "n": 2e400}]')
    assert open_pool(path).write_rows([0], tmp_path / "out").read_text() == (
        '{"instruction": "q","output": "a", "n": 1.50, "n": 2e400}\n'
    )


def test_bytes_that_are_not_utf_8_cost_one_row(tmp_path):
    path = tmp_path / "pool.json"
    good = '{"instruction": "é", "output": "ü"}'.encode()
    path.write_bytes(b"[" + good + b",\n" + good.replace("ü".encode(), b"\xfc") + b",\n" + good + b"]")
    pool = open_pool(path, max_error_rate=0.5)
    assert pool.status.tolist() == [0, 3, 0] and pool.reasons[1].startswith("line 2: not UTF-8 (byte 0xfc")
    out = pool.write_rows([1, 2], tmp_path / "out").read_bytes()
    assert out == good.replace("ü".encode(), b"\xfc") + b"\n" + good + b"\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n{"a": 2}', "line 2: the file ends before the closing ]"),
        ('[{"a": 1},\n{"a": 2},\n{"a', "line 3: Unterminated string"),
        ('[{"a": 1}\n{"a": 2}]', "line 2: a comma or ] was expected, not '{'"),
        ('[{"a": 1},\n]', "line 2: Expecting value"),
        ('[{"a": 1}]\n[2]', "line 2: nothing after the closing ] was expected, not '['"),
        ('[{"a": 1},\n{"a": 1,}, {"a": 3}' + " " * 100 + "]", "line 2: "),
        ("[" + "[" * 200_000, "line 1: an element cannot be parsed: "),
    ],
)
def test_refuses_a_broken_array(tmp_path, content, message):
    path = tmp_path / "pool.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"pool\.json is not a sound JSON array: ") as refusal:
        open_pool(path, max_error_rate=1)
    assert message in str(refusal.value) and "one row on each line" in str(refusal.value)


def test_a_mistake_is_found_without_reading_on():
    blocks = iter([b'[{"a": 1}, {"a": nonsense' + b"x" * 100] + [b"x" * 100] * 50)
    with pytest.raises(ValueError, match="Expecting value"):
        list(split_array(blocks, 0, True))
    assert len(list(blocks)) == 50


def test_json_files_that_are_lines_or_neither(tmp_path):
    path = tmp_path / "pool.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert open_pool(path).status.tolist() == [0, 2, 0]
    path.write_text(json.dumps(ROWS[0]))
    assert len(open_pool(path)) == 1
    path.write_text(json.dumps({"data": ROWS}, indent=2))
    with pytest.raises(InputError, match="neither an array of rows nor one row a line"):
        open_pool(path)
    for empty in ("", "[]", "[\n]"):
        path.write_text(empty)
        with pytest.raises(InputError, match="has no rows"):
            open_pool(path)
