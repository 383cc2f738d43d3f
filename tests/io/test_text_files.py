"""JSON Lines: the user's bytes come back as they were, whatever stands in them; bad lines are counted."""

import gzip
import hashlib
import json
import os

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.errors import InputError, RunFailedError
from fastsel.io import files, open_pool

GOOD = b'{"instruction": "q", "output": "a"}'


def row(output, **more):
    return json.dumps({"instruction": "q", "output": output, **more}).encode()


def write(folder, content, name="pool.jsonl"):
    path = folder / name
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return path


# name -> (the line's bytes, its status, what the reason says or the answer that is read)
NASTY = {
    "escaped lone surrogate": (rb'{"instruction": "q", "output": "a\ud800"}', "ok", "a\ufffd"),
    "surrogate pair": (rb'{"instruction": "q", "output": "\ud83d\ude00"}', "ok", "😀"),
    "escaped NUL": (rb'{"instruction": "q", "output": "a\u0000b"}', "ok", "a\x00b"),
    "raw NUL": (b'{"instruction": "q", "output": "a\x00b"}', "error", "Invalid control character at column 34"),
    "only NULs": (b"\x00" * 50, "error", "not JSON"),
    "30,000 characters": (row("x" * 30_000), "ok", "x" * 30_000),
    "huge": (row("yz" * 3_000_000), "ok", "yz" * 3_000_000),
    "other line separators": (row("a\u2028b\u0085c\x0bd\x0c").decode().encode(), "ok", "a\u2028b\u0085c\x0bd\x0c"),
    "raw line separators": ('{"instruction": "q", "output": "a\u2028b\u0085c"}'.encode(), "ok", "a\u2028b\u0085c"),
    "special tokens": (row("</s><|im_end|>{{ x }}"), "ok", "</s><|im_end|>{{ x }}"),
    "spaces around": (b'  {"instruction" : "q",\t"output": "a"} \t ', "ok", "a"),
    "duplicate keys": (b'{"output": "first", "instruction": "q", "output": "last"}', "ok", "last"),
    "NaN and Infinity": (b'{"instruction": "q", "output": "a", "x": NaN, "y": [-Infinity, 1e999]}', "ok", "a"),
    "NaN as answer": (b'{"instruction": "q", "output": NaN}', "skipped", "is a number, not text"),
    "not UTF-8": (b'{"instruction": "q", "output": "caf\xe9"}', "error",
                  "not UTF-8 (byte 0xe9 at position 36 of the line)"),
    "surrogate as UTF-8": (b'{"instruction": "q", "output": "\xed\xa0\x80"}', "error", "not UTF-8 (byte 0xed"),
    "cut off": (b'{"instruction": "q", "out', "error", "not JSON (Unterminated string starting at column 22)"),
    "two objects": (GOOD + GOOD, "error", "not JSON (Extra data at column 36)"),
    "plain text": (b"hello", "error", "not JSON (Expecting value at column 1)"),
    "single quotes": (b"{'instruction': 'q'}", "error", "not JSON"),
    "trailing comma": (b'{"instruction": "q", "output": "a",}', "error", "not JSON"),
    "too deep": (b"[" * 200_000, "error", "nested too deeply"),
    "endless number": (b'{"instruction": "q", "output": "a", "n": ' + b"9" * 5_000 + b"}", "error", "not usable JSON"),
    "a list": (b"[1, 2]", "skipped", "the row is a list, not an object"),
    "null": (b"null", "skipped", "the row is null, not an object"),
    "empty object": (b"{}", "skipped", "no known layout"),
    "nested nulls": (b'{"messages": [{"role": "user", "content": null}]}', "skipped", "messages[0].content is null"),
    "empty answer": (row(""), "skipped", "the answer (output) is empty"),
    "white answer": (row(" \u3000\n"), "skipped", "the answer (output) is only white space"),
    "wrong type": (row(5), "skipped", "the answer (output) is a number, not text"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["pool.jsonl", "pool.jsonl.gz", "pool.jsonl.zst"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_nasty_lines_are_all_there_and_come_back_as_they_were(tmp_path, name, line_end):
    lines = [raw for raw, _, _ in NASTY.values()]
    blank = [b"", b"   ", b"\t"]
    content = b"\xef\xbb\xbf" + line_end.join([*blank, *lines[:5], *blank, *lines[5:]])  # no line end after the last
    pool = open_pool(write(tmp_path, content, name), max_error_rate=1)
    assert len(pool) == len(lines)
    lines_before = [3] * 5 + [6] * (len(lines) - 5)
    for example, before, (raw, status, text) in zip(
        pool.examples(range(len(lines))), lines_before, NASTY.values(), strict=True
    ):
        assert example.status == status, (raw[:80], example.reason)
        if status == "ok":
            assert example.messages[-1].content == text
        else:
            assert example.reason.startswith(f"line {example.row_id + before + 1}: ") and text in example.reason
    out = pool.write_rows(range(len(lines)), tmp_path / "selected")
    assert out == tmp_path / "selected.jsonl" and out.read_bytes() == b"".join(raw + b"\n" for raw in lines)
    backwards = pool.write_rows(np.arange(len(lines))[::-1], tmp_path / "backwards.jsonl")
    assert backwards.read_bytes() == b"".join(raw + b"\n" for raw in lines[::-1])
    assert [example for chunk in pool.chunks(rows=7) for example in chunk] == pool.examples(range(len(lines)))


json_text = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["\ud800", "\x00", "\u2028", "\ufeff"])
line_bytes = st.one_of(
    st.builds(lambda q, a: json.dumps({"instruction": q, "output": a}).encode(), json_text, json_text),
    st.builds(
        lambda a: json.dumps({"instruction": "q", "output": a}, ensure_ascii=False).encode("utf-8", "replace"),
        json_text,
    ),
    st.binary(max_size=20),
)


@settings(deadline=None, max_examples=80)
@given(st.lists(line_bytes, max_size=8), st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.integers(1, 12))
def test_law_every_non_blank_line_comes_back(tmp_path_factory, lines, line_end, ends, block):
    """Whatever the bytes and wherever a block ends: rows are the non-blank lines, in order, byte for byte."""
    lines = [GOOD, *lines]
    content = line_end.join(lines) + (line_end if ends else b"")
    expected = [
        line[:-1] if line.endswith(b"\r") else line for line in content.split(b"\n") if line and not line.isspace()
    ]
    folder = tmp_path_factory.mktemp("law")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK_BYTES", block)
        pool = open_pool(write(folder, content), max_error_rate=1)
        assert len(pool) == len(expected)
        out = pool.write_rows(range(len(pool)), folder / "out").read_bytes()
        assert out == b"".join(line + b"\n" for line in expected)
        chunks = [example for chunk in pool.chunks(rows=3) for example in chunk]
        assert chunks == pool.examples(range(len(pool)))
    assert pool.inputs[0].sha256 == hashlib.sha256(content).hexdigest()
    assert open_pool(folder / "pool.jsonl", max_error_rate=1).fingerprint == pool.fingerprint


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_random_access_in_any_order(tmp_path, name):
    pool = open_pool(write(tmp_path, b"\n\n".join(row(str(i) * (1 + i % 50)) for i in range(500)), name))
    for wanted in ([499], [3, 3, 2, 400, 2], [], [0, 1, 2, 3, 10, 11], list(range(499, -1, -7))):
        assert [example.row_id for example in pool.examples(wanted)] == wanted
        assert [example.messages[-1].content for example in pool.examples(wanted)] == [
            str(i) * (1 + i % 50) for i in wanted
        ]
    assert [example.row_id for chunk in pool.chunks(120, 333, rows=50) for example in chunk] == list(range(120, 333))
    assert [len(chunk) for chunk in pool.chunks(120, 333, rows=50)] == [50, 50, 50, 50, 13]
    assert list(pool.chunks(500)) == [] and list(pool.chunks(5, 5)) == []
    with pytest.raises(IndexError, match=r"0\.\.499"):
        pool.examples([500])
    with pytest.raises(IndexError):
        pool.examples([-1])
    with pytest.raises(TypeError, match="integers"):
        pool.examples([0.5])


def test_shards_are_one_pool_in_order(tmp_path):
    for shard in range(3):
        write(
            tmp_path,
            b"".join(row(f"{shard}-{i}") + b"\n" for i in range(4)),
            f"shard-{shard}.jsonl" + (".gz" if shard else ""),
        )
    broken = write(tmp_path, row("3-0") + b"\noops\n", "shard-3.jsonl")
    pool = open_pool(str(tmp_path / "shard-*.jsonl*"), max_error_rate=0.5)
    answers = [f"{shard}-{i}" for shard in range(3) for i in range(4)] + ["3-0"]
    assert [example.messages[-1].content for example in pool.examples(range(13))] == answers
    assert [(entry.path, entry.rows) for entry in pool.inputs][-1] == (str(broken), 2) and len(pool.inputs) == 4
    assert pool.reasons[13] == f"{broken}, line 2: not JSON (Expecting value at column 1)"
    crossing = [example.messages[-1].content for chunk in pool.chunks(2, 11) for example in chunk]
    assert crossing == answers[2:11]
    assert (
        pool.write_rows([12, 0, 4], tmp_path / "out").read_bytes()
        == b"\n".join(map(row, ["3-0", "0-0", "1-0"])) + b"\n"
    )
    listed = open_pool([tmp_path / "shard-2.jsonl.gz", tmp_path / "shard-0.jsonl"])
    assert [example.messages[-1].content for example in listed.examples([0, 4])] == ["2-0", "0-0"]


def test_limit_reads_the_first_rows_only(tmp_path):
    path = write(tmp_path, b"".join(row(str(i)) + b"\n" for i in range(50)) + b"not json\n" * 50)
    pool = open_pool(path, limit=10)
    assert len(pool) == 10 and pool.inputs[0].rows == 10
    assert pool.inputs[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [example.messages[-1].content for chunk in pool.chunks(8) for example in chunk] == ["8", "9"]
    assert pool.fingerprint != open_pool(path, limit=11).fingerprint
    assert len(open_pool([path, write(tmp_path, GOOD, "b.jsonl")], limit=50).inputs) == 1


def test_too_many_errors_stop_the_run_once_all_is_read(tmp_path):
    path = write(tmp_path, b"\n".join([GOOD] * 98 + [b"oops", row("")]))
    assert open_pool(path).status.tolist() == [0] * 98 + [3, 2]
    two = write(tmp_path, b"\n".join([GOOD] * 97 + [b"oops", b"\xff", row("")]), "two.jsonl")
    with pytest.raises(
        RunFailedError, match="2 of 100 lines cannot be read, more than --max-error-rate 0.01"
    ) as failure:
        open_pool(two)
    assert "line 98: not JSON" in str(failure.value) and failure.value.exit_code == 1
    assert len(open_pool(two, max_error_rate=0.02)) == 100
    skipped = write(tmp_path, b"\n".join([GOOD] + [row("")] * 99), "skipped.jsonl")
    assert len(open_pool(skipped)) == 100


def test_on_error_fail_names_file_and_line(tmp_path):
    path = write(tmp_path, b"\n".join([GOOD, b"", row(""), b"oops"]))
    with pytest.raises(RunFailedError, match=r"pool\.jsonl, line 4: not JSON \(Expecting value at column 1\)"):
        open_pool(path, on_error="fail")


@pytest.mark.parametrize("name", ["pool.jsonl.gz", "pool.jsonl.zst", "pool.json.gz"])
def test_a_stream_that_ends_early_says_where(tmp_path, name):
    rng = np.random.default_rng(0)
    content = b"[" * name.startswith("pool.json.") + b",\n".join(row(rng.bytes(200).hex()) for _ in range(3000)) + b"]"
    path = write(tmp_path, content if ".json." in name else content.replace(b",\n", b"\n"), name)
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(
        InputError, match=rf"^\S+{name}: cannot be decompressed after [\d,]+ bytes of content \(.*\); the file is"
    ):
        open_pool(path, max_error_rate=1)
    path.write_bytes(b"not compressed at all" * 10)
    with pytest.raises(InputError, match="cannot be decompressed after 0 bytes"):
        open_pool(path)


def test_members_of_a_compressed_file_follow_each_other(tmp_path):
    path = tmp_path / "pool.jsonl.gz"
    path.write_bytes(gzip.compress(row("a") + b"\n") + gzip.compress(row("b") + b"\n"))
    assert [example.messages[-1].content for example in open_pool(path).examples([1, 0])] == ["b", "a"]


@pytest.mark.parametrize("content", [b"", b"\n", b"  \n\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_refuses_a_file_without_rows(tmp_path, content):
    with pytest.raises(InputError, match=r"pool\.jsonl has no rows"):
        open_pool(write(tmp_path, content))


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_refuses_utf_16(tmp_path, codec):
    content = ("\ufeff" + GOOD.decode() + "\n").encode(codec)
    with pytest.raises(InputError, match=r"pool\.jsonl is UTF-16, not UTF-8; convert it first"):
        open_pool(write(tmp_path, content))


def test_a_file_that_changes_is_noticed(tmp_path):
    path = write(tmp_path, GOOD + b"\n" + GOOD + b"\n")
    pool = open_pool(path)
    path.write_bytes(GOOD + b"\n")
    with pytest.raises(RunFailedError, match="changed while fastsel was using it"):
        pool.examples([0])
    path.unlink()
    with pytest.raises(RunFailedError, match="changed"):
        list(pool.chunks())


def test_fingerprint_sees_every_byte(tmp_path):
    original = open_pool(write(tmp_path, GOOD + b"\n" + GOOD + b"\n"))
    seen = {original.fingerprint}
    for other in (
        GOOD + b" \n" + GOOD,
        GOOD,
        GOOD.replace(b"q", b"Q") + b"\n" + GOOD,
        GOOD + b"\n" + GOOD + b"\n" + GOOD,
    ):
        seen.add(open_pool(write(tmp_path, other, "other.jsonl")).fingerprint)
    for options in (
        {"format": "alpaca"},
        {"columns": {"prompt": "instruction", "response": "output"}},
        {"tags": {"user_tag": "x"}},
    ):
        seen.add(open_pool(tmp_path / "pool.jsonl", **options).fingerprint)
    assert len(seen) == 8
    assert open_pool(write(tmp_path, GOOD + b"\r\n\r\n" + GOOD, "ends.jsonl")).fingerprint == original.fingerprint
    assert open_pool(write(tmp_path, GOOD + b"\n" + GOOD, "pool.jsonl.gz")).fingerprint == original.fingerprint


def test_a_file_that_nobody_may_read_or_name_is_bad_input(tmp_path, monkeypatch):
    path = write(tmp_path, row("a") + b"\n")
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="the name is not UTF-8"):
        open_pool(f"{tmp_path}/caf*")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="no permission to read it"):
        open_pool(path)
