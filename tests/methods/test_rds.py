"""RDS+: vectors weighted by position, targets taking turns, leaks, and the command line."""

import json

import numpy as np
import pytest
import torch

import fastsel
from fastsel.cli import main
from fastsel.errors import FastselWarning, InputError, UsageError
from fastsel.features.embeddings import embed_texts
from fastsel.io import open_pool

WORDS = ["alpha", "beta", "gamma", "delta", "red", "blue", "green", "one", "two", "three", "cat", "dog"]


def rows(seed, n):
    draw = np.random.default_rng(seed)
    texts = [" ".join(draw.choice(WORDS, size=draw.integers(2, 6))) for _ in range(2 * n)]
    return [
        {"instruction": texts[2 * i], "output": texts[2 * i + 1], "source": f"s{i % 2}", "task": f"t{i % 3}"}
        for i in range(n)
    ]


@pytest.fixture
def pool(tmp_path):
    lines = [json.dumps(row) for row in rows(0, 30)]
    lines[7] = json.dumps({"instruction": "red", "output": "", "source": "s1"})
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return open_pool(path)


TARGET = rows(1, 7)


def vectors(pair, examples):
    """Each text alone through the model in float64: the t-th of T tokens weighs t / (1 + ... + T)."""
    model, tokenizer = pair
    found = []
    for row in examples:
        ids = tokenizer(f"{row['instruction']}\n{row['output']}")["input_ids"]
        with torch.no_grad():
            states = model.double().base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        model.float()
        weights = np.arange(1, len(ids) + 1)
        vector = (weights / weights.sum()) @ states.numpy()
        found.append(vector / np.linalg.norm(vector))
    return np.array(found)


def turns(similarity, k):
    picks = []
    for turn in range(k):
        of_turn = similarity[turn % len(similarity)].copy()
        of_turn[picks] = -np.inf
        picks.append(int(of_turn.argmax()))
    return picks


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_matches_a_slow_transcription(tiny, pool, kind):
    examples = [row for i, row in enumerate(rows(0, 30)) if i != 7]
    place = np.delete(np.arange(30), 7)
    similarity = vectors(tiny(kind), TARGET) @ vectors(tiny(kind), examples).T
    options = dict(target=TARGET, encoder=tiny(kind), leaks="none", budget=12, progress="none")
    selection = fastsel.rds(pool, **options)
    assert selection.indices.tolist() == place[turns(similarity, 12)].tolist()
    expected = np.full(30, np.nan)
    expected[place] = similarity.max(0)
    assert selection.scores == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert selection.config["pooling"] == "weighted"

    tasks = [similarity[[i for i in range(7) if i % 3 == t]] for t in range(3)]
    by_task = np.stack([similarities.max(0) for similarities in tasks])
    grouped = fastsel.rds(pool, **options, subtask_column="task")
    assert grouped.indices.tolist() == place[turns(by_task, 12)].tolist()

    best = fastsel.rds(pool, **options, aggregate="max")
    assert best.indices.tolist() == place[np.argsort(-similarity.max(0), kind="stable")[:12]].tolist()

    means = np.stack([similarities.mean(0) for similarities in tasks]).max(0)
    mean = fastsel.rds(pool, **options, subtask_column="task", aggregate="mean")
    assert mean.indices.tolist() == place[np.argsort(-means, kind="stable")[:12]].tolist()
    assert mean.scores[mean.indices] == pytest.approx(np.sort(means)[::-1][:12], abs=1e-5)
    assert mean.gains[mean.indices] == pytest.approx(mean.scores[mean.indices])


def test_weighted_pooling_is_for_language_models_and_others_take_their_own(tiny, pool):
    weighted = embed_texts(["red cat two"], tiny("gpt2"), pooling="weighted")
    assert not np.allclose(weighted, embed_texts(["red cat two"], tiny("gpt2"), pooling="mean"))
    pytest.importorskip("sentence_transformers")
    selection = fastsel.rds(pool, target=TARGET, encoder="bundled", leaks="none", budget=3, progress="none")
    assert selection.config["pooling"] == "mean" and len(selection) == 3
    with pytest.raises(UsageError, match="pooling='weighted' is for language models"):
        fastsel.rds(pool, target=TARGET, encoder="bundled", pooling="weighted", leaks="none", progress="none")


def test_quotas_and_tokens_hold(tiny, pool):
    options = dict(target=TARGET, encoder=tiny("llama"), leaks="none", progress="none")
    by_source = fastsel.rds(pool, **options, budget=10, per="source=equal")
    assert np.bincount(by_source.indices % 2).tolist() == [5, 5]
    tokens = fastsel.rds(pool, **options, budget="60tok")
    assert 0 < tokens.n_tokens[tokens.indices].sum() <= 60
    first = fastsel.rds(pool, **options, budget=len(tokens))
    assert tokens.indices.tolist() == first.indices.tolist()


def test_leaks_are_left_out(tiny, pool):
    long = {"instruction": "one two three one two three one two three", "output": "cat"}
    leaky = open_pool([*pool.rows(range(30)), long])
    target = [*TARGET, {**long, "output": "dog"}]
    options = dict(target=target, encoder=tiny("llama"), leaks="equal", budget=8, progress="none")
    with pytest.warns(FastselWarning, match="1 pool rows hold 1 of 8 target rows"):
        assert 30 in fastsel.rds(leaky, **options).indices
    with pytest.warns(FastselWarning, match="they are left out"):
        dropped = fastsel.rds(leaky, **options, drop_leaks=True)
    assert 30 not in dropped.indices and dropped.status[30] == 2
    assert dropped.reasons[30].endswith("it holds a row of the target")
    assert any("1 equal" in note for note in dropped.notes)


def test_target_rows_without_a_vector_are_left_out(tiny, pool):
    target = [*TARGET, {"instruction": "", "output": "cat"}]
    options = dict(encoder=tiny("llama"), text="instruction", leaks="none", budget=8, progress="none")
    selection = fastsel.rds(pool, target=target, **options)
    assert any(
        "7 rows; 1 cannot be used (row 7: row_id 7: the row has no instruction to embed)" in n for n in selection.notes
    )
    assert selection.indices.tolist() == fastsel.rds(pool, target=TARGET, **options).indices.tolist()


def test_command_line_and_choosing_again(tiny, pool, tmp_path, capsys):
    model, tokenizer = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "target.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TARGET))
    words = ["select", "rds", "--pool", str(tmp_path / "pool.jsonl"), "--target", str(tmp_path / "target.jsonl")]
    words += ["--encoder", f"lm:{tmp_path / 'model'}", "--leaks", "equal", "--budget", "12", "-q", "--no-report"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    chosen = np.load(tmp_path / "out" / "indices.npy")
    again = [
        "select",
        "--from",
        str(tmp_path / "out"),
        "--budget",
        "5",
        "-o",
        str(tmp_path / "fewer"),
        "-q",
        "--no-report",
    ]
    assert main(again) == 0
    assert np.load(tmp_path / "fewer" / "indices.npy").tolist() == chosen[:5].tolist()
    (tmp_path / "target.jsonl").write_text(json.dumps(TARGET[0]) + "\n")
    assert main([*words, "-o", str(tmp_path / "out")]) == 2
    assert "target: [" in capsys.readouterr().err


def test_refuses(tiny, pool, tmp_path):
    with pytest.raises(UsageError, match="which target. --target"):
        fastsel.rds(pool, encoder=tiny("llama"))
    with pytest.raises(UsageError, match="aggregate='best' is not known; it is one of: round_robin, mean, max"):
        fastsel.rds(pool, target=TARGET, aggregate="best")
    np.save(tmp_path / "own.npy", np.zeros((30, 3)))
    with pytest.raises(InputError, match="an encoder is a folder"):
        fastsel.rds(pool, target=TARGET, encoder=str(tmp_path / "own.npy"), leaks="none")
