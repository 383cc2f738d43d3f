"""LLaMA-Factory's dataset_info.json names a pool with its columns and tags."""

import json

import pytest

from fastsel.errors import FastselWarning, InputError
from fastsel.io import open_pool
from fastsel.io.dataset_info import names_entry, read_entry

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def make(folder, entry, rows=None, name="rows.jsonl"):
    if rows is not None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry, "other": {"hf_hub_url": "who/what"}}))
    return f"{folder}/dataset_info.json#mine"


@pytest.mark.parametrize(
    ("entry", "row", "expected"),
    [
        ({}, {"instruction": "q", "input": "i", "output": "a"}, ["q\ni", "a"]),
        (
            {"columns": {"prompt": "ask", "response": "say", "history": None}},
            {"ask": "q", "input": "i", "say": "a"},
            ["q", "a"],
        ),
        ({"columns": {"prompt": "body"}}, {"body": "a"}, ["a"]),
        ({"formatting": "sharegpt"}, {"conversations": TURNS, "system": "s"}, ["s", "q", "a"]),
        (
            {
                "formatting": "sharegpt",
                "columns": {"messages": "messages"},
                "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "u", "assistant_tag": "m"},
            },
            {"messages": [{"role": "u", "content": "q"}, {"role": "m", "content": "a"}]},
            ["q", "a"],
        ),
        (
            {"formatting": "openai", "columns": {"messages": "chat"}},
            {"chat": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            ["q", "a"],
        ),
    ],
)
def test_entries_of_every_formatting(tmp_path, entry, row, expected):
    source = make(tmp_path, {"file_name": "rows.jsonl", **entry}, [row])
    for spelling in (source, "LF:" + source):
        pool = open_pool(spelling)
        assert [turn.content for turn in pool.examples([0])[0].messages] == expected
        assert pool.inputs[0].path == str(tmp_path / "rows.jsonl")


def test_options_of_the_user_win_over_the_entry(tmp_path):
    source = make(tmp_path, {"file_name": "rows.jsonl"}, [{"instruction": "x", "output": "y", "ask": "q", "say": "a"}])
    assert open_pool(source, columns={"prompt": "ask", "response": "say"}).examples([0])[0].instruction == "q"


def test_a_folder_means_all_its_files(tmp_path):
    rows = [{"instruction": "q", "output": "a"}]
    make(tmp_path, {"file_name": "part"}, rows, "part/b.jsonl")
    assert len(open_pool(make(tmp_path, {"file_name": "part"}, rows * 2, "part/a.jsonl"))) == 3


def test_num_samples_is_said_to_be_ignored(tmp_path):
    source = make(tmp_path, {"file_name": "rows.jsonl", "num_samples": 1}, [{"instruction": "q", "output": "a"}] * 2)
    with pytest.warns(FastselWarning, match="num_samples is not applied"):
        assert len(open_pool(source)) == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hf_hub_url": "who/what"}, "names rows that are not local files"),
        ({"file_name": "rows.jsonl", "ranking": True}, "holds preferences"),
        ({"file_name": "rows.jsonl", "columns": {"images": "pictures"}}, "has images; fastsel scores text only"),
        ({"file_name": "rows.jsonl", "formatting": "mystery"}, "formatting 'mystery' is not known"),
        ({"file_name": "gone.jsonl"}, r"gone\.jsonl: no such file \(named by .*dataset_info\.json#mine\)"),
    ],
)
def test_refuses_entries_it_cannot_use(tmp_path, entry, message):
    with pytest.raises(InputError, match=message):
        open_pool(make(tmp_path, entry, [{"instruction": "q", "output": "a"}]))


def test_refuses_missing_files_and_entries(tmp_path):
    source = make(tmp_path, {"file_name": "rows.jsonl"})
    with pytest.raises(InputError, match="has no entry 'mien'; it has mine, other"):
        open_pool(source.replace("mine", "mien"))
    with pytest.raises(InputError, match=r"no such file \(working directory"):
        open_pool(f"{tmp_path}/nowhere.json#mine")
    with pytest.raises(InputError, match=r"lists data sets and holds no rows: name one of them, as in .*json#NAME"):
        open_pool(source.partition("#")[0])
    (tmp_path / "dataset_info.json").write_text('{"mine": 3}')
    with pytest.raises(InputError, match="must hold one object a data set"):
        read_entry(source)
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        read_entry(source)
    assert names_entry("a/dataset_info.json#x") and not names_entry("a.jsonl") and not names_entry([{}])
