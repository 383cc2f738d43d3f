"""DiverseEvol: rounds of k-center with a training between them, and the authors' own choice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsel
from fastsel.errors import InputError, UsageError
from fastsel.models import lora
from fastsel.models.loading import load_model
from fastsel.selectors import k_center
from fastsel.selectors.unclamped_k_center import unclamped_k_center

GOLDEN = json.loads((Path(__file__).parent / "golden" / "diverse_evol.json").read_text())
WORDS = np.array(["alpha", "beta", "gamma", "delta", "red", "blue", "green", "one", "two", "three", "cat", "dog"])


@pytest.fixture
def pool(tmp_path):
    """40 short rows; row 11 has no answer."""
    draw = np.random.default_rng(0)
    rows = [
        {"instruction": " ".join(draw.choice(WORDS, 6)), "input": "", "output": " ".join(draw.choice(WORDS, 5))}
        for _ in range(40)
    ]
    rows[11]["output"] = ""
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def recorded_data(copies):
    """As golden/record_diverse_evol.py makes it."""
    generator = np.random.default_rng(7)
    x = 20 * generator.standard_normal((300, 32))
    near = x[:40] + 1e-4 * generator.standard_normal((40, 32))
    return np.concatenate([x, near] if copies else [x]).astype(np.float32)


def test_adds_what_the_authors_query_adds():
    x = recorded_data(copies=False)
    assert unclamped_k_center(x, 50, initial=np.arange(25))[0].tolist() == GOLDEN["without copies"]
    assert sorted(k_center(x, 50, initial=np.arange(25))[0].tolist()) == GOLDEN["without copies"]


def test_near_copies_come_first_in_the_authors_code_and_last_in_ours():
    """25 labelled rows have near-copies, rows 300 to 324; which of their squares round below 0 hangs on the BLAS."""
    x = recorded_data(copies=True)
    rows, gains = unclamped_k_center(x, 50, initial=np.arange(25))
    theirs = {row for row in GOLDEN["with copies"] if 300 <= row < 325}
    ours = {int(row) for row in rows if 300 <= row < 325}
    assert len(theirs) >= 5 and len(ours) >= 5 and (gains[(rows >= 300) & (rows < 325)] == 0).sum() >= 5
    clean, _ = k_center(x, 50, initial=np.arange(25))
    assert not {row for row in clean.tolist() if 300 <= row < 325}


def test_hand_worked(pool):
    """Vectors on a line at the row number, but rows 30 to 39 at 1,000 and more: after one row drawn, the farthest is
    39 (unless it was drawn), and a second round of two rows goes on from there.
    """
    places = np.arange(40, dtype=np.float32)
    places[30:] += 1000
    selection = fastsel.diverse_evol(
        pool, encoder=places[:, None], budget=5, start_rows=1, query_rows=2, seed=3, progress="none"
    )
    start = int(selection.indices[0])
    rows, gains = k_center(np.delete(places, 11)[:, None], 4, initial=[start - (start > 11)])
    assert selection.indices[1:].tolist() == [int(row) + (row >= 11) for row in rows]
    np.testing.assert_allclose(selection.gains[selection.indices], [np.inf, *gains])
    assert selection.metrics["round"][selection.indices].tolist() == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("official", [False, True])
def test_rounds_over_fixed_vectors_are_one_k_center(pool, official):
    x = np.random.default_rng(1).standard_normal((40, 6)).astype(np.float32)
    selection = fastsel.diverse_evol(
        pool, encoder=x, budget=25, start_rows=4, query_rows=5, official=official, progress="none"
    )
    usable = np.delete(np.arange(40), 11)
    start = np.searchsorted(usable, selection.indices[:4])
    rows, _ = k_center(x[usable], 21, initial=start)
    assert set(selection.indices[4:]) == set(usable[rows])
    if not official:
        assert selection.indices[4:].tolist() == usable[rows].tolist()
    else:
        rounds = selection.metrics["round"][selection.indices]
        assert all((np.diff(selection.indices[rounds == r]) > 0).all() for r in range(1, 5))
    assert len(selection) == 25 and selection.official == official


def test_training_moves_the_vectors_and_leaves_the_model_alone(pool, tiny):
    model, tokenizer = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    options = dict(model=(model, tokenizer), budget=16, start_rows=4, query_rows=6, progress="none")
    trained = fastsel.diverse_evol(pool, learning_rate=0.01, **options)
    again = fastsel.diverse_evol(pool, learning_rate=0.01, **options)
    untrained = fastsel.diverse_evol(pool, train="none", **options)
    assert trained.indices.tolist() == again.indices.tolist()
    np.testing.assert_array_equal(trained.gains, again.gains)
    assert trained.indices[:4].tolist() == untrained.indices[:4].tolist()
    assert not np.allclose(trained.gains[trained.indices[4:]], untrained.gains[untrained.indices[4:]], rtol=1e-3)
    assert trained.metrics["round"][trained.indices].tolist() == [0] * 4 + [1] * 6 + [2] * 6
    assert 11 not in trained.indices and np.isnan(trained.scores[11])
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not model.training and not hasattr(model, "peft_config")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_lowers_the_loss_of_what_it_is_trained_on(kind, tiny):
    loaded = load_model(tiny(kind))
    sequences = [(torch.randint(3, 200, (12,)).tolist(), 4) for _ in range(6)]

    def loss(model):
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([ids])).logits[0, first - 1 : -1] for ids, first in sequences]
        wanted = [torch.tensor(ids[first:]) for ids, first in sequences]
        return sum(torch.nn.functional.cross_entropy(*pair).item() for pair in zip(logits, wanted, strict=True)) / 6

    before = loss(loaded.model)
    with lora.adapted(loaded, sequences, epochs=20, learning_rate=0.02, rows_a_step=3) as (model, _):
        assert loss(model) < 0.8 * before
    assert loss(loaded.model) == before


def test_refuses_rows_without_an_answer(tiny):
    loaded = load_model(tiny("llama"))
    with pytest.raises(UsageError, match="there is no answer to train on"), lora.adapted(loaded, [([5, 6, 7], 3)]):
        pass


def test_a_budget_that_the_start_fills_trains_nothing(pool, tiny, monkeypatch):
    monkeypatch.setitem(fastsel.diverse_evol.__globals__, "adapted", lambda *_, **__: pytest.fail("trained"))
    selection = fastsel.diverse_evol(pool, model=tiny("llama"), budget=3, progress="none")
    assert len(selection) == 3 and (selection.metrics["round"][selection.indices] == 0).all()


def test_all_rows_are_kept_when_the_budget_is_the_pool(pool):
    x = np.random.default_rng(1).standard_normal((40, 6))
    selection = fastsel.diverse_evol(pool, encoder=x, budget=40, start_rows=8, query_rows=9, progress="none")
    assert sorted(selection.indices.tolist()) == np.delete(np.arange(40), 11).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "all"}, "train must be adapter or none, got 'all'"),
        ({"query_rows": 0}, "start_rows and query_rows must be at least 1"),
        ({"budget": "100 tokens"}, "counts tokens, but this method counts none"),
        ({"encoder": np.ones((3, 2))}, "3"),
    ],
)
def test_refuses_options_that_make_no_sense(pool, options, message):
    with pytest.raises((UsageError, InputError), match=message):
        fastsel.diverse_evol(pool, **{"encoder": np.ones((40, 2)), "progress": "none", **options})


def test_refuses_a_learning_rate_that_diverges(pool, tiny):
    with pytest.raises(UsageError, match="the loss of the adapter is not finite"):
        fastsel.diverse_evol(
            pool, model=tiny("llama"), budget=16, start_rows=8, learning_rate=1e30, epochs=9, progress="none"
        )
