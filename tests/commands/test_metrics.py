"""`fastsel metrics`: which rows are measured, what stands beside them, and what is said of the rest."""

import json
import math
import sys

import numpy as np
import pytest

from fastsel import metrics as of
from fastsel.cli import main
from fastsel.commands.metrics import METRICS, measure
from fastsel.errors import InputError, MissingExtraError, UsageError
from fastsel.io import open_pool

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "eats", "big", "small", "old", "house", "tree"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """80 rows with vectors; the subset is rows 5, 9, ..., and row 3 has no answer, so it cannot be used."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    rows = [
        {"instruction": f"Row {chr(97 + i % 26)}{chr(97 + i // 26)}: " + " ".join(generator.choice(WORDS, 70)),
         "input": "", "output": "" if i == 3 else " ".join(generator.choice(WORDS, 8))}
        for i in range(80)
    ]  # fmt: skip
    write = lambda name, some: (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in some))  # noqa: E731
    write("pool.jsonl", rows)
    write("subset.jsonl", rows[5::4])
    np.save("pool.npy", generator.standard_normal((80, 6)).astype(np.float32))
    np.save("rows.npy", np.arange(5, 80, 4))
    return tmp_path


def run(**options):
    options = {"reference": "pool.jsonl", "encoder": "pool.npy", "progress": "none"} | options
    return measure(options.pop("subset", "subset.jsonl"), **options)


def test_every_metric_of_a_subset_found_by_content(data):
    found = run()
    vectors, rows = np.load("pool.npy"), np.arange(5, 80, 4)
    x = vectors[rows]
    usable = np.delete(vectors, 3, axis=0)
    texts = [example.messages[0].content for example in open_pool("pool.jsonl").examples(rows)]
    values = {line.name: line.value for line in found.lines}
    assert list(values) == list(METRICS) and found.rows == 19
    expected = {
        "ttr": of.ttr(texts), "vocd_d": of.vocd_d(texts), "dist_sum": of.dist_sum(x, average="pairs"),
        "dist_sum_l2": of.dist_sum(x, metric="euclidean", average="pairs"), "knn": of.knn(x), "radius": of.radius(x),
        "vendi": of.vendi(x), "log_determinant": of.log_determinant(x),
        "facility_location": of.facility_location(x, usable, average=True), "novelsum": of.novelsum(x, usable),
    }  # fmt: skip
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-9), name
    for line in found.lines:
        assert line.seconds is not None and line.note is None and line.random_std >= 0
        assert math.isfinite(line.random_mean)


def test_the_clusters_of_the_reference(data):
    pytest.importorskip("faiss")
    (line,) = run(metrics=["partition_entropy"]).lines
    vectors = np.load("pool.npy")
    expected = of.partition_entropy(vectors[5:80:4], np.delete(vectors, 3, axis=0))
    assert line.value == pytest.approx(expected, rel=1e-9)


def test_random_draws_are_of_usable_rows_and_follow_the_seed(data):
    (line,) = run(metrics=["vendi"], draws=3, seed=7).lines
    usable = np.delete(np.arange(80), 3)
    vectors = np.load("pool.npy")
    draws = [np.sort(np.random.default_rng([7, i]).choice(usable, 19, replace=False)) for i in range(3)]
    values = [of.vendi(vectors[rows]) for rows in draws]
    assert line.random_mean == pytest.approx(np.mean(values)) and line.random_std == pytest.approx(np.std(values))
    assert run(metrics=["vendi"], draws=3, seed=7).lines[0].random_mean == line.random_mean
    assert run(metrics=["vendi"], draws=3, seed=8).lines[0].random_mean != line.random_mean


def test_a_file_a_folder_and_row_numbers_are_the_same_subset(data):
    by_content = run(metrics=["vendi"]).lines[0].value
    assert run(subset="rows.npy", metrics=["vendi"]).lines[0].value == by_content
    assert main(["select", "random", "--pool", "pool.jsonl", "--budget", "12", "-o", "out", "-q"]) == 0
    chosen = np.load("out/indices.npy")
    expected = of.vendi(np.load("pool.npy")[np.sort(chosen)])
    assert run(subset="out", metrics=["vendi"]).lines[0].value == pytest.approx(expected, rel=1e-12)
    alone = measure("out", metrics=["ttr"], progress="none")
    assert alone.rows == 12 and alone.lines[0].random_mean is None


def test_without_a_reference_what_needs_one_says_so(data):
    found = measure("pool.jsonl", encoder="pool.npy", progress="none")
    lines = {line.name: line for line in found.lines}
    for name in ("facility_location", "partition_entropy"):
        assert lines[name].value is None and lines[name].note == "compares with a pool: --reference POOL"
    assert lines["vendi"].value == pytest.approx(of.vendi(np.delete(np.load("pool.npy"), 3, axis=0)))
    assert "1 rows of pool.jsonl cannot be used and are left out" in found.notes
    with pytest.raises(UsageError, match="facility_location compares with a pool"):
        measure("pool.jsonl", metrics=["facility_location"], encoder="pool.npy")


def test_rows_that_are_not_in_the_reference(data):
    (data / "other.jsonl").write_text(json.dumps({"instruction": "elsewhere here", "input": "", "output": "y"}) + "\n")
    found = run(subset="other.jsonl", metrics=["ttr"])
    assert found.lines[0].value == 1.0 and "1 rows of the subset are not in the reference" in found.notes[0]
    with pytest.raises(InputError, match="1 of its rows are not in pool.jsonl, so the matrix has no vector"):
        run(subset="other.jsonl", metrics=["vendi"])


def test_without_faiss_the_table_says_what_to_install(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    lines = {line.name: line for line in run().lines}
    assert "pip install 'fastsel[diversity]'" in lines["cluster_inertia"].note
    assert lines["vendi"].value > 0
    with pytest.raises(MissingExtraError):
        run(metrics=["cluster_inertia"])


def test_the_command_prints_a_table_or_json_and_writes_a_file(data, capsys):
    words = ["metrics", "subset.jsonl", "--reference", "pool.jsonl", "--encoder", "pool.npy", "--metrics", "ttr,vendi"]
    assert main([*words, "--draws", "2", "-o", "out.json", "-q"]) == 0
    table = capsys.readouterr().out
    assert "19 rows of subset.jsonl, beside 2 random draws of as many from pool.jsonl" in table
    assert "effective number of different rows" in table and "±" in table and "cluster" not in table
    written = json.loads((data / "out.json").read_text())
    assert main([*words, "--draws", "2", "--json", "-q"]) == 0
    printed = json.loads(capsys.readouterr().out)
    for result in (written, printed):
        assert [line["name"] for line in result["lines"]] == ["ttr", "vendi"] and result["status"] == "done"
        for line in result["lines"]:
            line.pop("seconds")
    assert written == printed


def test_numbers_that_are_none_are_null(data):
    text = json.dumps(run(metrics=["vocd_d"], text="answer").as_dict(), allow_nan=False)
    assert json.loads(text)["lines"][0]["value"] is None  # no answer has more than 50 words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["vendi", "vendy"]}, "there is no metric 'vendy'; the metrics are: ttr"),
        ({"metrics": []}, "which metrics"),
        ({"draws": 0}, "draws=0 must be at least 1"),
        ({"subset": "rows.npy", "reference": None}, "rows.npy holds row numbers: name the pool"),
        ({"subset": "pool.npy"}, "must hold row numbers from 0 to 79"),
        ({"subset": "."}, "holds no selected.jsonl"),
        ({"text": "title", "metrics": ["ttr"]}, "text='title' is not known"),
    ],
)
def test_refuses(options, message, data):
    with pytest.raises((UsageError, InputError), match=message):
        run(**options)
