"""The output folder: every file, equal bytes for equal runs, nothing half written, nothing overwritten unasked."""

import dataclasses
import hashlib
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fastsel.errors import InputError, RunFailedError, UsageError
from fastsel.io import bundled_pool_path, open_pool
from fastsel.io.dataset_card import dataset_card
from fastsel.io.writers import config_sha256, save_selection
from fastsel.selection import Selection, build_selection, choose

SAME_BYTES = ("selected.jsonl", "selection.parquet", "indices.npy", "scores.npy", "dataset_info.json", "README.md")
ALWAYS = {*SAME_BYTES, "config.yaml", "manifest.json", "report.html", "report.json", "run.log"}


def scored(pool, budget="10%", *, per=None, config=None, method="toy"):
    """A selection with made-up scores: a fifth above 1, which the rule keeps out."""
    n = len(pool)
    status = np.array(pool.status)
    scores = np.random.default_rng(0).random(n) * 1.25
    scores[status > 1] = np.nan
    tokens = np.where(status > 1, -1, np.arange(n) % 700 + 3).astype(np.int32)
    eligible = scores <= 1
    return build_selection(
        pool=pool,
        method=method,
        indices=choose(scores, eligible, budget, pool=pool, n_tokens=tokens, per=per),
        scores=scores,
        status=status,
        reasons=dict(pool.reasons),
        n_tokens=tokens,
        budget=budget,
        per=per,
        metrics={"toy": scores, "loss": scores * 2},
        config=config or {"budget": budget, "per": per},
        timings={"score": 1.25},
        seed=0,
        notes=["a note for the user"],
        eligible=eligible,
        rule="toy above 1",
        provenance={
            "model": {"name": "tiny", "revision": "abc"},
            "template": {"id": "alpaca", "sha256": "0" * 64},
            "device": "cpu",
        },
    )


@pytest.fixture(scope="module")
def bundled():
    return open_pool(bundled_pool_path())


def write_pool(path, rows):
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


def flat(i, **more):
    return {"instruction": f"question {i}", "input": "", "output": f"answer {i}", **more}


def test_every_file_is_there_and_says_what_it_should(bundled, tmp_path):
    selection = scored(bundled)
    folder = save_selection(selection, tmp_path / "out", argv=["fastsel", "select", "toy"])
    assert {path.name for path in folder.iterdir()} == ALWAYS
    assert np.load(folder / "indices.npy").dtype == np.int64
    assert np.load(folder / "indices.npy").tolist() == selection.indices.tolist()
    np.testing.assert_array_equal(np.load(folder / "scores.npy"), selection.scores)
    assert pq.read_table(folder / "selection.parquet").equals(selection.table)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["schema_version"] == 1
    assert {"fastsel", "numpy", "pyarrow", "python"} <= set(manifest["versions"])
    assert manifest["argv"] == ["fastsel", "select", "toy"]
    assert manifest["config"] == {"budget": "10%", "per": None}
    assert manifest["config_sha256"] == config_sha256({"per": None, "budget": "10%"})
    assert manifest["model"] == {"name": "tiny", "revision": "abc"}
    assert manifest["template"]["id"] == "alpaca" and manifest["device"] == "cpu" and manifest["seed"] == 0
    assert manifest["counts"] == {"ok": 256, "truncated": 0, "skipped": 0, "error": 0}
    assert manifest["timings"]["score"] == 1.25 and manifest["timings"]["write"] > 0
    source = bundled_pool_path()
    assert manifest["inputs"] == [
        {"path": str(source), "rows": 256, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    ]
    assert set(manifest["files"]) == ALWAYS - {"manifest.json"}
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"method": "toy", "budget": "10%", "per": None}
    assert "kept 25 of 256 rows" in (folder / "run.log").read_text()
    assert json.loads((folder / "report.json").read_text())["summary"]["kept"] == 25


def test_without_a_report_there_is_none(bundled, tmp_path):
    folder = scored(bundled).save(tmp_path / "out", report=False)
    assert {path.name for path in folder.iterdir()} == ALWAYS - {"report.html", "report.json"}


def test_a_run_that_only_scores_has_no_chosen_rows_and_can_be_chosen_from(bundled, tmp_path):
    selection = scored(bundled)
    nothing = dataclasses.replace(selection, indices=np.zeros(0, np.int64), requested=0, short={})
    folder = save_selection(nothing, tmp_path / "scores", rows=False, report=False, config_yaml="method: toy\n")
    chosen = {"selected.jsonl", "dataset_info.json", "README.md", "report.html", "report.json"}
    assert {path.name for path in folder.iterdir()} == ALWAYS - chosen
    assert (folder / "config.yaml").read_text() == "method: toy\n"
    again = Selection.load(folder, bundled).choose_again("10%")
    assert again.indices.tolist() == selection.indices.tolist()


def test_twice_gives_the_same_bytes(tmp_path):
    everything = ["oda", "dataflex", "instructlab", "less"]
    names = {*SAME_BYTES, "oda.jsonl", "step_0.json", "top_indices.npy", "sorted.csv"}
    first, second = (
        scored(open_pool(bundled_pool_path()), per="source").save(tmp_path / name, also=everything)
        for name in ("a", "b")
    )
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize("order", ["pool", "rank"])
def test_the_chosen_rows_are_the_users_own_bytes(tmp_path, order):
    odd = b'{"instruction" :  "sp\\u00e4t \\ud800",\t"output":"a \\u0000 b","source":"a","n":1.50}\n'
    lines = [json.dumps(flat(i)).encode() + b"\n" for i in range(6)] + [odd] * 3
    pool = open_pool(write_pool(tmp_path / "pool.jsonl", lines))
    selection = scored(pool, 4)
    folder = selection.save(tmp_path / "out", order=order)
    rows = selection.indices if order == "rank" else np.sort(selection.indices)
    assert (folder / "selected.jsonl").read_bytes() == b"".join(lines[row] for row in rows)


def test_rows_that_failed_have_no_score_but_a_reason(tmp_path):
    lines = [flat(0), b"not json\n", flat(2, output=" "), flat(3), b'{"instruction": "x", "output": "\xff"}\n', flat(5)]
    pool = open_pool(write_pool(tmp_path / "pool.jsonl", lines), max_error_rate=1.0)
    folder = scored(pool, "1.0").save(tmp_path / "out")
    scores = np.load(folder / "scores.npy")
    columns = pq.read_table(folder / "selection.parquet").to_pydict()
    for row in np.flatnonzero(np.isnan(scores)):
        assert columns["score"][row] is None and columns["toy"][row] is None and columns["n_tokens"][row] is None
        assert columns["status"][row] in ("skipped", "error")
        assert f"line {row + 1}" in columns["reason"][row]
    assert columns["status"][1] == "error" and columns["status"][2] == "skipped"
    assert columns["row_id"] == list(range(6))
    assert scores.tobytes() == np.where(np.isnan(scores), np.nan, scores).tobytes()


def test_a_parquet_pool_gives_a_parquet_selection(tmp_path):
    table = pa.table(
        {"instruction": ["a", "b", "c"], "output": ["x", "y", "z"], "when": pa.array([1, 2, 3], pa.timestamp("ms"))}
    )
    pq.write_table(table, tmp_path / "pool.parquet")
    selection = scored(open_pool(tmp_path / "pool.parquet"), 2)
    folder = selection.save(tmp_path / "out", annotate=True)
    written = pq.read_table(folder / "selected.parquet")
    rows = np.sort(selection.indices)
    assert written.select(table.column_names).equals(table.take(pa.array(rows)))
    assert [note["score"] for note in written["fastsel"].to_pylist()] == selection.scores[rows].tolist()
    assert json.loads((folder / "dataset_info.json").read_text())["pool_toy"]["file_name"] == "selected.parquet"


def test_annotate_adds_one_key_and_keeps_the_bytes_before_it(tmp_path):
    lines = [
        b'{"instruction": "a",  "output": "x"}\n',
        b'{"instruction": "b", "output": "y", "fastsel": {"score": 9}, "t": "\\ud800"}\n',
    ]
    selection = scored(open_pool(write_pool(tmp_path / "pool.jsonl", lines)), "1.0")
    assert len(selection) == 2
    folder = selection.save(tmp_path / "out", annotate=True)
    first, second = (folder / "selected.jsonl").read_bytes().splitlines()
    assert first.startswith(lines[0].rstrip()[:-1] + b', "fastsel": {')
    for row, line in enumerate((first, second)):
        note = json.loads(line)["fastsel"]
        rank = selection.indices.tolist().index(row)
        assert note == {
            "method": "toy",
            "score": selection.scores[row],
            "rank": rank,
            "toy": selection.scores[row],
            "loss": selection.scores[row] * 2,
        }
    assert second.count(b'"fastsel"') == 1 and json.loads(second)["t"] == "\ud800"
    assert "with their scores under the key `fastsel`" in (folder / "README.md").read_text()
    plain = selection.save(tmp_path / "plain") / "README.md"
    assert "The rows are the pool's own, unchanged" in plain.read_text()


def test_exports_hold_what_the_other_tools_read(bundled, tmp_path):
    selection = scored(bundled)
    folder = selection.save(tmp_path / "out", also=["oda", "dataflex", "instructlab", "less"])
    lines = [json.loads(line) for line in (folder / "oda.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == bundled.ids().to_pylist()
    assert [line["score"] for line in lines] == selection.scores.tolist()
    step = json.loads((folder / "step_0.json").read_text())
    assert step["indices"] == selection.indices.tolist()
    top = np.load(folder / "top_indices.npy")
    assert (
        top.shape == (1, 25) and np.issubdtype(top.dtype, np.integer) and top[0].tolist() == selection.indices.tolist()
    )
    arrays = np.load(folder / "instructlab.npz")
    assert arrays["indices"].tolist() == selection.indices.tolist()
    assert arrays["gains"].tolist() == selection.scores[selection.indices].tolist()
    header, *rows = (folder / "sorted.csv").read_text().splitlines()
    assert header == "file name, index, score"
    ranked = [(name, int(row), float(score)) for name, row, score in (line.split(", ") for line in rows)]
    assert len(ranked) == 256 and {name for name, _, _ in ranked} == {"pool_small"}
    assert [score for _, _, score in ranked] == sorted((score for _, _, score in ranked), reverse=True)
    assert all(abs(score - selection.scores[row]) <= 5e-7 for _, row, score in ranked)


def test_an_export_names_rows_without_ids_by_their_number_and_failed_rows_by_null(tmp_path):
    pool = open_pool(write_pool(tmp_path / "pool.jsonl", [flat(0), flat(1, output=""), flat(2, id="own")]))
    folder = scored(pool, 1).save(tmp_path / "out", also=["oda"])
    lines = [json.loads(line) for line in (folder / "oda.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [0, 1, "own"] and lines[1]["score"] is None


def entry_of(tmp_path, rows, **options):
    pool = open_pool(write_pool(tmp_path / "pool.jsonl", rows), **options)
    folder = scored(pool, "1.0").save(tmp_path / "out", report=False)
    path = folder / "dataset_info.json"
    if not path.exists():
        return None
    info = json.loads(path.read_text())
    assert list(info) == ["pool_toy"] and info["pool_toy"].pop("file_name") == "selected.jsonl"
    assert "dataset: pool_toy" in (folder / "README.md").read_text()
    return info["pool_toy"]


def chat(role, content, *turns):
    return [{role: word, content: text} for word, text in turns]


def test_llama_factory_reads_alpaca_rows(tmp_path):
    rows = [flat(i, input="with input" if i % 2 else "", history=[["q", "a"]], system="be kind") for i in range(8)]
    assert entry_of(tmp_path, rows) == {
        "formatting": "alpaca",
        "columns": {
            "prompt": "instruction",
            "query": "input",
            "response": "output",
            "history": "history",
            "system": "system",
        },
    }


def test_llama_factory_reads_conversations_in_the_rows_own_words(tmp_path):
    turns = (("system", "be kind"), ("user", "hi"), ("assistant", "hello"))
    assert entry_of(tmp_path, [{"messages": chat("role", "content", *turns)}] * 8) == {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "system_tag": "system",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    }


def test_llama_factory_reads_sharegpt_with_tools(tmp_path):
    turns = (("human", "hi"), ("function_call", "{}"), ("observation", "1"), ("gpt", "done"))
    rows = [{"conversations": chat("from", "value", *turns), "tools": "[]", "system": "be kind"}] * 8
    assert entry_of(tmp_path, rows) == {
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "system": "system", "tools": "tools"},
        "tags": {
            "role_tag": "from",
            "content_tag": "value",
            "user_tag": "human",
            "function_tag": "function_call",
            "observation_tag": "observation",
            "assistant_tag": "gpt",
        },
    }


def test_llama_factory_reads_renamed_columns(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"a{i}", "kind": "x"} for i in range(8)]
    assert entry_of(tmp_path, rows, columns={"prompt": "question", "response": "answer"}) == {
        "formatting": "alpaca",
        "columns": {"prompt": "question", "response": "answer"},
    }


def test_rows_with_flat_fields_and_some_conversations_are_read_as_flat(tmp_path):
    rows = [flat(i) for i in range(8)]
    rows += [
        flat(i) | {"messages": chat("role", "content", ("user", f"question {i}"), ("assistant", f"answer {i}"))}
        for i in range(8)
    ]
    assert entry_of(tmp_path, rows)["columns"] == {"prompt": "instruction", "response": "output"}


def test_there_is_no_entry_for_rows_llama_factory_cannot_read(tmp_path):
    mixed = [flat(i) for i in range(8)] + [{"messages": chat("role", "content", ("user", "q"), ("assistant", "a"))}] * 8
    assert entry_of(tmp_path, mixed) is None


def test_the_card_is_one_that_load_dataset_reads(bundled, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    folder = scored(bundled).save(tmp_path / "out", report=False)
    front = (folder / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front)["configs"] == [{"config_name": "default", "data_files": "selected.jsonl"}]
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 25 and "instruction" in rows.column_names and "score" not in rows.column_names


def test_the_card_cannot_be_broken_by_names_from_the_pool(tmp_path):
    rows = [flat(i, source="a|b <script>`x`\n# heading") for i in range(3)]
    card = dataset_card(scored(open_pool(rows), "1.0"), "selected.jsonl", has_dataset_info=False)
    assert "<script>" not in card and "\n# heading" not in card and "a\\|b" in card


def test_a_finished_run_is_read_back(bundled, tmp_path):
    selection = scored(bundled, per="source")
    folder = selection.save(tmp_path / "out")
    for pool in (None, bundled):
        loaded = Selection.load(folder, pool)
        assert loaded.indices.tolist() == selection.indices.tolist()
        np.testing.assert_array_equal(loaded.scores, selection.scores)
        np.testing.assert_array_equal(loaded.eligible, selection.eligible)
        assert loaded.table.equals(selection.table)
        assert loaded.baseline.tolist() == selection.baseline.tolist()
        ours, theirs = selection.summary(), loaded.summary()
        assert ours.pop("timings") | {"write": theirs["timings"]["write"]} == theirs.pop("timings")
        assert ours == theirs


@pytest.mark.parametrize("budget", ["5%", 7, "3ktok"])
def test_choosing_again_from_a_finished_run_equals_a_new_run(tmp_path, budget):
    lines = [flat(i, source="ab"[i % 2]) for i in range(60)] + [flat(60, output="")]
    path = write_pool(tmp_path / "pool.jsonl", lines)
    first = scored(open_pool(path), "50%").save(tmp_path / "first")
    again = Selection.load(first, open_pool(path)).choose_again(budget, per="source").save(tmp_path / "again")
    fresh = scored(open_pool(path), budget, per="source").save(tmp_path / "fresh")
    for name in SAME_BYTES:
        assert (again / name).read_bytes() == (fresh / name).read_bytes(), name


def test_a_run_read_without_its_pool_says_that_it_has_no_texts(bundled, tmp_path):
    loaded = Selection.load(scored(bundled).save(tmp_path / "out"))
    with pytest.raises(InputError, match="scores, not texts"):
        loaded.save(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*"))
    with pytest.raises(InputError, match="scores, not texts"):
        loaded.report(tmp_path / "report.html")


def test_refuses_another_pool_and_folders_that_are_no_run(bundled, tmp_path):
    folder = scored(bundled).save(tmp_path / "out")
    with pytest.raises(InputError, match="another pool"):
        Selection.load(folder, open_pool([flat(0)]))
    with pytest.raises(InputError, match="no finished run"):
        Selection.load(tmp_path)
    (folder / "scores.npy").unlink()
    with pytest.raises(InputError, match="not a complete run"):
        Selection.load(folder)
    (folder / "manifest.json").write_text('{"schema_version": 99}')
    with pytest.raises(InputError, match="schema_version"):
        Selection.load(folder)


def test_no_pickle_is_loaded(bundled, tmp_path):
    folder = scored(bundled).save(tmp_path / "out")
    np.save(folder / "scores.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="not a complete run"):
        Selection.load(folder)


def test_refuses_orders_and_exports_it_does_not_know(bundled, tmp_path):
    with pytest.raises(UsageError, match="--also hf is not known; choose from oda, dataflex, instructlab, less"):
        scored(bundled).save(tmp_path / "out", also=["hf"])
    with pytest.raises(UsageError, match="pool or rank"):
        scored(bundled).save(tmp_path / "out", order="score")
    assert not (tmp_path / "out").exists()


def test_a_finished_run_of_the_same_request_is_left_alone(bundled, tmp_path):
    folder = scored(bundled).save(tmp_path / "out")
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}
    scored(bundled).save(folder)
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()} == before


@pytest.mark.parametrize("other", [{"budget": "5%"}, {"method": "other"}, {"config": {"x": 1}}])
def test_refuses_the_folder_of_another_finished_run(bundled, tmp_path, other):
    folder = scored(bundled).save(tmp_path / "out")
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="another request"):
        scored(bundled, **other).save(folder)
    with pytest.raises(InputError, match="another request"):
        scored(bundled).save(folder, order="rank")
    assert (folder / "manifest.json").read_bytes() == before


def test_refuses_a_folder_with_other_files(bundled, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"not empty \(thesis.tex\)"):
        scored(bundled).save(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        scored(bundled).save(tmp_path / "thesis.tex")


def test_overwriting_removes_the_old_runs_files_and_nothing_else(bundled, tmp_path):
    folder = scored(bundled).save(tmp_path / "out", also=["oda"])
    (folder / "thesis.tex").write_text("mine")
    scored(bundled, 5).save(folder, overwrite=True, report=False)
    assert {path.name for path in folder.iterdir()} == {*ALWAYS, "thesis.tex"} - {"report.html", "report.json"}
    assert len(np.load(folder / "indices.npy")) == 5
    assert "kept 5 of" in (folder / "run.log").read_text()
    (folder / "manifest.json").write_text("not JSON")
    with pytest.raises(InputError, match="cannot be read"):
        scored(bundled).save(folder)
    assert len(Selection.load(scored(bundled, 6).save(folder, overwrite=True))) == 6


def test_an_unfinished_run_is_finished_in_its_folder(bundled, tmp_path):
    for name in ("state", "features"):
        (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / "features" / "shard.npy").write_bytes(b"kept")
    (tmp_path / "out" / "run.log").write_text("begun\n")
    (tmp_path / "out" / "selection.parquet").write_text("half of an earlier try")
    folder = scored(bundled).save(tmp_path / "out")
    assert (folder / "run.log").read_text() == "begun\n"
    assert (folder / "features" / "shard.npy").read_bytes() == b"kept"
    assert pq.read_table(folder / "selection.parquet").num_rows == 256


def test_a_failed_write_leaves_nothing_behind(bundled, tmp_path, monkeypatch):
    folder = scored(bundled).save(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundled, "write_rows", full)
    with pytest.raises(RunFailedError, match=r"cannot write to .*No space left on device"):
        scored(bundled, 5).save(folder, overwrite=True)
    with pytest.raises(RunFailedError):
        scored(bundled, 5).save(tmp_path / "new")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list((tmp_path / "new").iterdir()) == []


def test_a_run_killed_while_files_are_moved_is_not_finished(bundled, tmp_path, monkeypatch):
    folder = scored(bundled).save(tmp_path / "out")
    moved = []

    def killed(source, target):
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(target)
        os.rename(source, target)

    monkeypatch.setattr("fastsel.io.writers.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        scored(bundled, 5).save(folder, overwrite=True)
    assert not (folder / "manifest.json").exists()
    monkeypatch.undo()
    with pytest.raises(InputError, match="no finished run"):
        Selection.load(folder)
    scored(bundled, 5).save(folder, overwrite=True)
    assert len(Selection.load(folder)) == 5


def test_surrogates_in_ids_and_reasons_do_not_stop_the_writing(tmp_path):
    line = b'{"id": "\\ud800", "instruction": "q", "output": "a", "source": "\\udfff"}\n'
    selection = scored(open_pool(write_pool(tmp_path / "pool.jsonl", [line] * 3)), "1.0")
    selection.reasons = {0: "starts with \ud800"}
    selection.status[0] = 1
    folder = selection.save(tmp_path / "out", also=["oda", "less"], annotate=True)
    assert pq.read_table(folder / "selection.parquet")["reason"].to_pylist()[0].endswith("starts with \\ud800")
