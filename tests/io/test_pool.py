"""A pool as a whole: what it refuses to open, ready scores, ids and sources, and how little memory it keeps."""

import json
import os
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from fastsel.errors import InputError, UsageError
from fastsel.io import STATUS, Pool, bundled_pool_path, open_pool

ROW = {"instruction": "q", "output": "a"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_bundled_pool_opens():
    pool = open_pool(bundled_pool_path())
    assert len(pool) == 256 and not pool.reasons and (pool.status == STATUS.index("ok")).all()
    assert pool.name == "pool_small.jsonl" and pool.format == "alpaca"
    assert sum(pool.layouts.values()) == 256 and pool.layouts["messages"] > 0
    assert len(set(pool.ids().to_pylist())) == 256 and None not in pool.sources().to_pylist()
    assert "256 rows" in repr(pool) and isinstance(pool, Pool)


def test_refuses_a_missing_file_and_names_its_neighbours(tmp_path, monkeypatch):
    write(tmp_path / "training.jsonl", [ROW])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refusal:
        open_pool("trainning.jsonl")
    assert str(refusal.value) == (
        f"trainning.jsonl: no such file (working directory: {tmp_path}); near names in .: training.jsonl"
    )
    with pytest.raises(InputError, match=r"; the folder nowhere does not exist"):
        open_pool("nowhere/training.jsonl")
    with pytest.raises(InputError, match=r"no file matches \*\.parquet"):
        open_pool("*.parquet")
    with pytest.raises(InputError, match=r"gone\.jsonl: no such file"):
        open_pool(["training.jsonl", "gone.jsonl"])
    with pytest.raises(InputError, match=r"training\.jsonl is named twice"):
        open_pool(["training.jsonl", "train*.jsonl"])


def test_refuses_folders_and_other_kinds_of_files(tmp_path):
    with pytest.raises(InputError, match="is a folder, and not one made by .*: it holds no file that fastsel reads"):
        open_pool(tmp_path)
    write(tmp_path / "a.jsonl", [ROW])
    with pytest.raises(InputError, match=r"is a folder.*name its files, such as '.*/\*\.jsonl'"):
        open_pool(tmp_path)
    for name in ("pool.csv", "pool.pkl", "pool.pt", "pool", "pool.parquet.gz"):
        (tmp_path / name).write_bytes(b"anything")
        with pytest.raises(InputError, match="not a kind of file that fastsel reads"):
            open_pool(tmp_path / name)
    write(tmp_path / "b.parquet", [ROW])
    with pytest.raises(InputError, match="cannot mix kinds of files"):
        open_pool([tmp_path / "a.jsonl", tmp_path / "b.parquet"])
    with pytest.raises(InputError, match="is a folder: a pool of several parts"):
        open_pool([tmp_path / "a.jsonl", tmp_path])
    with pytest.raises(InputError, match=r"a pool is a path.*this is a builtins\.int"):
        open_pool(3)


def test_pickles_are_never_loaded(tmp_path):
    """Neither as a pool file nor inside one: unpickling this object would write a file."""

    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    for name in ("pool.jsonl", "pool.json", "pool.arrow", "pool.parquet", "pool.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
        with pytest.raises(Exception, match=r"pool\."):
            open_pool(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_a_pool_is_returned_as_it_is():
    pool = open_pool([ROW])
    assert open_pool(pool) is pool
    with pytest.raises(UsageError, match="give the pool options where it is opened"):
        open_pool(pool, format="alpaca")
    with pytest.raises(UsageError, match="limit must be at least 1"):
        open_pool([ROW], limit=0)


def test_ready_scores_come_from_a_nested_column():
    scores = [0.25, 1, None, "0.5", True, float("nan"), float("inf"), [0.5], 10**400, np.float32(0.5), -3.0]
    rows = [{**ROW, "processed_scores": {"IFD": score}} for score in scores]
    rows += [{**ROW, "processed_scores": None}, ROW, {**ROW, "output": "", "processed_scores": {"IFD": 0.5}}]
    rows += [{**ROW, "processed_scores.IFD": 0.75}]
    pool = open_pool(rows, score_column="processed_scores.IFD")
    assert pool.scores.dtype == np.float64
    usable = {0: 0.25, 1: 1.0, 9: 0.5, 10: -3.0, 14: 0.75}
    assert {row: pool.scores[row] for row in np.flatnonzero(pool.status == 0).tolist()} == usable
    assert np.isnan(np.delete(pool.scores, list(usable))).all()
    assert (
        pool.reasons[2] == pool.reasons[11].replace("11", "2") == "row_id 2: there is no score in processed_scores.IFD"
    )
    assert pool.reasons[3] == "row_id 3: the score in processed_scores.IFD is not a number: '0.5'"
    assert [pool.reasons[row].rpartition(" ")[2] for row in (4, 5, 6, 7, 8)] == [
        "'True'",
        "nan",
        "inf",
        "'[0.5]'",
        "inf",
    ]
    assert pool.reasons[13] == "row_id 13: the answer (output) is empty"
    assert open_pool(rows).scores is None and open_pool(rows).status.tolist() == [0] * 13 + [2, 0]


def test_ids_and_sources():
    ids = ["a", "a", 7, None, {"x": 1}, 2.5, float("nan"), True]
    pool = open_pool(
        [{**ROW, "id": own_id, "source": "s", "dataset": "d"} for own_id in ids] + [{**ROW, "dataset": "d"}, {}]
    )
    assert pool.ids().to_pylist() == ["a", "a", "7", None, None, "2.5", None, None, None, None]
    assert pool.sources().to_pylist() == ["s"] * 8 + ["d", None]
    bare = open_pool([ROW])
    assert bare.ids() is None and bare.sources() is None
    skipped = open_pool([ROW, {"id": "bad", "source": "s", "instruction": "q", "output": ""}])
    example = skipped.examples([1])[0]
    assert (example.id, example.source, example.status) == ("bad", "s", "skipped")
    assert skipped.ids().to_pylist() == [None, "bad"]


def test_reasons_are_a_mapping_of_the_bad_rows_only():
    pool = open_pool([{**ROW, "output": "" if i % 3 else "a"} for i in range(10)])
    assert list(pool.reasons) == [1, 2, 4, 5, 7, 8] and len(pool.reasons) == 6
    assert dict(pool.reasons)[4] == "row_id 4: the answer (output) is empty"
    assert 3 not in pool.reasons and pool.reasons.get(100) is None
    with pytest.raises(KeyError):
        pool.reasons[0]


def test_arrays_cannot_be_changed():
    pool = open_pool([{**ROW, "s": 1}], score_column="s")
    for values in (pool.status, pool.content_hash, pool.scores):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1


def test_a_pool_travels_to_another_process(tmp_path):
    for pool in (open_pool(write(tmp_path / "pool.jsonl", [ROW] * 3)), open_pool([ROW] * 3)):
        copy = pickle.loads(pickle.dumps(pool))
        assert copy.examples([2]) == pool.examples([2]) and copy.fingerprint == pool.fingerprint


def test_fingerprint_is_the_same_in_every_process(tmp_path):
    path = write(tmp_path / "pool.jsonl", [ROW, {**ROW, "output": "é"}])
    options = {"columns": {"prompt": "instruction", "response": "output"}, "tags": {"user_tag": "x"}}
    code = f"from fastsel.io import open_pool; print(open_pool({str(path)!r}, **{options!r}).fingerprint)"
    seen = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True,
                       text=True, check=True).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert seen == {open_pool(path, **options).fingerprint} and len(seen.pop()) == 32


def test_chunks_of_long_rows_are_shorter(tmp_path):
    path = write(tmp_path / "pool.jsonl", [{**ROW, "output": "x" * 9_000_000}] * 9)
    assert [len(chunk) for chunk in open_pool(path).chunks()] == [4, 4, 1]


def test_progress_is_counted_in_bytes_of_the_file(tmp_path, capsys):
    path = write(tmp_path / "pool.jsonl", [ROW] * 10_000)
    open_pool(path, progress="json")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[-1]["done"] == lines[-1]["total"] == path.stat().st_size and lines[-1]["unit"] == "B"


def test_importing_the_reader_needs_no_model_package():
    code = (
        "import sys, fastsel.io.pool; print(sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


MEASURE = """
import json, sys
from fastsel.io import open_pool

path, rows, bad = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with open(path, "w") as out:
    for i in range(rows):
        answer = " " if bad and i % 2 else "It is a number, and a long one at that. " * 5
        row = {"id": f"some-data-{i:08d}", "source": f"set-{i % 24}", "instruction": f"Describe {i}.", "output": answer}
        out.write(json.dumps(row) + "\\n")

def memory(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))

before = memory("VmRSS")
pool = open_pool(path)
kept = memory("VmRSS")
for chunk in pool.chunks():
    pass
pool.write_rows(range(len(pool)), path + ".out")
print(len(pool), kept - before, memory("VmHWM") - before)
"""


def measured_memory(folder, rows, bad=0):
    if not os.path.exists("/proc/self/status"):
        pytest.skip("reads memory from /proc")
    command = [sys.executable, "-c", MEASURE, str(folder / f"{rows}.jsonl"), str(rows), str(bad)]
    n, kept, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert n == rows
    return kept, peak


def test_a_pool_keeps_less_than_90_bytes_a_row(tmp_path):
    """Counted by the allocators of Python and Arrow: offset 8, hash 16, status 1, id 25, source 4, and slack."""
    rows = 20_000
    path = tmp_path / "pool.jsonl"
    with open(path, "w") as out:
        for i in range(rows):
            row = {"id": f"some-data-{i:08d}", "source": f"set-{i % 24}", **ROW, "output": "a long answer " * 20}
            out.write(json.dumps(row) + "\n")
    open_pool([ROW])
    in_arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        pool = open_pool(path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    kept += pa.total_allocated_bytes() - in_arrow
    assert len(pool) == rows and rows * 50 < kept < rows * 90
    assert peak < 40e6  # a block of the file, and its lines


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0, 1])
def test_memory_of_a_large_pool_is_bounded(tmp_path, bad):
    """Resident memory, a difference of two sizes: about 100 bytes a row here, with what the allocator cannot reuse."""
    kept_small, peak_small = measured_memory(tmp_path, 100_000, bad)
    kept_large, peak_large = measured_memory(tmp_path, 500_000, bad)
    assert kept_large - kept_small < 400_000 * 150
    assert peak_large - peak_small < 400_000 * 200
