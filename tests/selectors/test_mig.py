import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.errors import UsageError
from fastsel.selectors import label_matrix, mig
from fastsel.selectors.mig import TIE

GOLDEN = Path(__file__).parents[1] / "methods" / "golden" / "mig.json"
A, B, ALPHA = 1e-6, 0.8, 1.0


def information(x, phi):
    return (x + A) ** B if phi == "power" else 1 - np.exp(-ALPHA * x)


def naive(dense, k, *, quality=None, weights=None, gain="first_order", phi="power", initial=()):
    """Every row at every step, in float64, with the same rule for ties; weights [labels, labels] not normalised yet."""
    e = np.asarray(dense, np.float64) * (np.ones(len(dense)) if quality is None else quality)[:, None]
    if weights is not None:
        e = e @ (weights / weights.sum(0))
    x = e[list(initial)].sum(0)
    free = np.ones(len(e), bool)
    free[list(initial)] = False
    indices, gains = [], []
    while len(indices) < min(k, len(e) - len(initial)):
        if gain == "exact":
            all_gains = (information(x + e, phi) - information(x, phi)).sum(1)
        else:
            all_gains = e @ (B * (x + A) ** (B - 1) if phi == "power" else ALPHA * np.exp(-ALPHA * x))
        all_gains[~free] = -np.inf
        row = int((all_gains >= all_gains.max() * (1 - TIE)).argmax())
        indices.append(row)
        gains.append(all_gains[row])
        x = x + e[row]
        free[row] = False
    return indices, gains


def drawn(n, n_labels, seed, share=0.15, levels=None):
    """Dense labels of 0 and 1, qualities (of a few levels when asked: many ties), label embeddings with near pairs."""
    dice = np.random.default_rng(seed)
    dense = (dice.random((n, n_labels)) < share * 2 * dice.random(n_labels)).astype(np.float64)
    quality = dice.uniform(1, 20, n) if levels is None else dice.integers(1, levels + 1, n).astype(np.float64)
    embeddings = dice.standard_normal((n_labels, 6)) * 0.3 + dice.standard_normal((4, 6))[np.arange(n_labels) % 4]
    return dense, quality, embeddings


def weights_of(embeddings, threshold, propagation):
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosine = unit @ unit.T
    weights = np.where(cosine >= threshold, cosine, 0.0) * propagation
    np.fill_diagonal(weights, 1.0)
    return weights


def assert_same(got, wanted):
    assert got[0].tolist() == wanted[0]
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-9, atol=1e-12)
    assert got[0].dtype == np.int64 and got[1].dtype == np.float64


def test_worked_example():
    """phi(x) = x^0.5 (a is nothing beside 1), labels p and q, no graph; rows p, p, q, {p, q} with quality 4, 1, 9, 1.

    Nothing received: a label is worth 0.5 / sqrt(1e-12) = 500,000 a unit: 2.0e6, 0.5e6, 4.5e6, 1.0e6: row 2.
    q has 9: 0.5 / 3 a unit; p untouched: row 0 with 2.0e6.  Then p has 4: 0.25 a unit: row 1: 0.25, row 3: 0.25 + 1/6.
    """
    labels = (np.array([0, 1, 2, 3, 5]), np.array([0, 0, 1, 0, 1]), None)
    indices, gains = mig(labels, 9, quality=[4, 1, 9, 1], a=1e-12, b=0.5)
    assert indices.tolist() == [2, 0, 3, 1]
    assert gains[:3] == pytest.approx([4.5e6, 2.0e6, 0.25 + 1 / 6], rel=1e-9)
    assert gains[3] == pytest.approx(0.5 / 5**0.5, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60), n_labels=st.integers(1, 12), seed=st.integers(0, 999), levels=st.sampled_from([None, 1, 3]),
    gain=st.sampled_from(["first_order", "exact"]), phi=st.sampled_from(["power", "exp"]), graph=st.booleans(),
)  # fmt: skip
def test_law_lazy_equals_naive(n, n_labels, seed, levels, gain, phi, graph):
    dense, quality, embeddings = drawn(n, n_labels, seed, levels=levels)
    options = {"gain": gain, "phi": phi}
    spread = {"embeddings": embeddings, "threshold": 0.8, "propagation": 0.7} if graph else {}
    weights = weights_of(embeddings, 0.8, 0.7) if graph else None
    k = max(1, n // 2)
    assert_same(
        mig(dense, k, quality=quality, **options, **spread),
        naive(dense, k, quality=quality, weights=weights, **options),
    )


@pytest.mark.parametrize("levels", [None, 1, 4])
@pytest.mark.parametrize("gain", ["first_order", "exact"])
def test_matches_naive_over_many_fronts(levels, gain, monkeypatch):
    """Fronts of 5 rows: most steps run into the bound of a row outside, and ties lie on both sides of it."""
    module = sys.modules["fastsel.selectors.mig"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "LEAST_FRONT", 5)
    monkeypatch.setattr(module, "FRONT_ROWS", 0)
    dense, quality, embeddings = drawn(900, 30, 5, levels=levels)
    got = mig(dense, 300, quality=quality, embeddings=embeddings, threshold=0.8, gain=gain)
    assert_same(got, naive(dense, 300, quality=quality, weights=weights_of(embeddings, 0.8, 1.0), gain=gain))


@pytest.mark.parametrize("variant", ["default", "near", "norm", "half", "exponential"])
def test_matches_the_authors_sampler(variant):
    """Their float32 list is ours wherever the gap to the second best exceeds float32."""
    recorded = json.loads(GOLDEN.read_text())
    label_of = {name: i for i, name in enumerate(recorded["labels"])}
    here, there, values = recorded["similarity"]
    n_labels = len(label_of)
    similarity = scipy.sparse.csr_matrix((values, (here, there)), shape=(n_labels, n_labels))
    dense = np.zeros((len(recorded["kept"]), n_labels))
    for row, (tags, score) in enumerate(zip(recorded["tags"], recorded["scores"], strict=True)):
        for tag in tags:
            dense[row, label_of[tag]] = score / len(tags) if variant == "norm" else score
    options = {"threshold": 0.9 if variant == "default" else 0.6, "propagation": 0.5 if variant == "half" else 1.0}
    if variant == "exponential":
        options |= {"phi": "exp", "alpha": 0.05}
    theirs = recorded["picks"][variant]
    ours = mig(scipy.sparse.csr_matrix(dense), len(theirs), similarity=similarity, **options)[0]
    assert [recorded["kept"][row] for row in ours] == theirs


def test_law_prefixes_continuation_and_repetition():
    dense, quality, embeddings = drawn(400, 25, 3)
    options = {"quality": quality, "embeddings": embeddings, "threshold": 0.7}
    whole, gains = mig(dense, 120, **options)
    for j in (0, 1, 40):
        assert mig(dense, j, **options)[0].tolist() == whole[:j].tolist()
    rest, rest_gains = mig(dense, 80, initial=whole[:40], **options)
    assert rest.tolist() == whole[40:].tolist() and rest_gains.tolist() == gains[40:].tolist()
    again = mig(dense, 120, **options)
    assert again[0].tolist() == whole.tolist() and again[1].tolist() == gains.tolist()
    assert np.all(gains[1:] <= gains[:-1] * (1 + 1e-9))


def test_law_the_number_of_threads_changes_no_bit():
    dense, quality, embeddings = drawn(3000, 60, 4)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(mig(dense, 50, quality=quality, embeddings=embeddings, threshold=0.7))
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_every_form_of_labels_gives_the_same_choice(tmp_path):
    dense, quality, _ = drawn(150, 20, 7)
    csr = scipy.sparse.csr_matrix(dense)
    mapped = np.memmap(tmp_path / "labels", np.float32, "w+", shape=dense.shape)
    mapped[:] = dense
    backwards = (csr.indptr.copy(), csr.indices.copy(), csr.data.copy())
    for i in range(150):  # entries of a row in another order
        row = slice(csr.indptr[i], csr.indptr[i + 1])
        backwards[1][row] = backwards[1][row][::-1].copy()
    parts = [torch.from_numpy(np.asarray(part)) for part in backwards]
    forms = [
        dense, torch.from_numpy(dense), torch.from_numpy(dense).bfloat16(), dense.astype(bool).astype(np.int8), mapped,
        csr, csr.tocsc(), csr.tocoo(), backwards, tuple(parts), (*backwards[:2], None),
        torch.from_numpy(dense).to_sparse(), np.asfortranarray(dense)[:, ::1],
    ]  # fmt: skip
    wanted = naive(dense, 60, quality=quality)
    for form in forms:
        assert_same(mig(form, 60, quality=quality), wanted)


@pytest.mark.parametrize("at_once", [1, 7, 1 << 22])
def test_propagation_in_blocks_is_the_matrix_product(at_once, monkeypatch):
    monkeypatch.setattr(label_matrix, "BLOCK_ENTRIES", at_once)
    monkeypatch.setattr(label_matrix, "BLOCK_LABELS", 3)
    dense, _, embeddings = drawn(40, 11, 2, share=0.3)
    dense[[0, 5, 39]] = 0  # rows without labels, the first and the last among them
    rows, _ = label_matrix.read_compressed(dense, "labels")
    spread = label_matrix.propagation_of_embeddings(embeddings, 0.6, 0.5)
    weights = weights_of(embeddings, 0.6, 0.5)
    got = label_matrix.propagate(rows, spread)
    as_matrix = scipy.sparse.csr_matrix((got.values, got.indices, got.indptr), shape=dense.shape)
    np.testing.assert_allclose(as_matrix.toarray(), dense @ (weights / weights.sum(0)), rtol=1e-13, atol=1e-15)
    assert all(np.all(np.diff(got.indices[a:b]) > 0) for a, b in zip(got.indptr, got.indptr[1:], strict=False))


def test_similarity_and_embeddings_say_the_same():
    dense, quality, embeddings = drawn(200, 15, 9)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, 1.0)
    options = {"quality": quality, "threshold": 0.75, "propagation": 1.5}
    by_embeddings = mig(dense, 50, embeddings=embeddings, **options)
    for similarity in (cosine, scipy.sparse.csr_matrix(cosine), torch.from_numpy(cosine)):
        assert_same(mig(dense, 50, similarity=similarity, **options), [x.tolist() for x in by_embeddings])
    alone = mig(dense, 50, quality=quality)
    switched_off = mig(dense, 50, embeddings=embeddings, **options | {"propagation": 0.0})
    assert_same(switched_off, [x.tolist() for x in alone])


def test_edges_no_labels_one_row_and_more_rows_than_there_are():
    empty = np.zeros((4, 3))
    indices, gains = mig(empty, 9)
    assert indices.tolist() == [0, 1, 2, 3] and gains.tolist() == [0, 0, 0, 0]
    assert mig(np.ones((1, 1)), 1)[0].tolist() == [0]
    assert mig(np.ones((3, 2)), 5, initial=[1])[0].tolist() == [0, 2]
    assert len(mig(np.ones((3, 2)), 3, initial=[2, 0, 1])[0]) == 0
    assert len(mig(np.zeros((0, 2)), 3)[0]) == 0


def test_edges_all_rows_equal_are_taken_in_order():
    """Everything ties at every step, far more rows than a front holds."""
    indices, _ = mig((np.arange(2001), np.zeros(2000, np.int64), None), 300)
    assert indices.tolist() == list(range(300))


def test_edges_a_lower_row_outside_the_front_ties_with_its_best(monkeypatch):
    """20 equal rows, fronts of 5, 5 and then 10: the third front holds rows 10 to 19, and row 1, outside, ties."""
    module = sys.modules["fastsel.selectors.mig"]
    monkeypatch.setattr(module, "LEAST_FRONT", 5)
    monkeypatch.setattr(module, "FRONT_ROWS", 0)
    assert mig(np.ones((20, 1)), 4)[0].tolist() == [0, 1, 2, 3]


def test_edges_zero_label_vector_resembles_only_itself():
    embeddings = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.1]])
    assert_same(
        mig(np.eye(3), 3, quality=[1, 2, 3], embeddings=embeddings, threshold=0.5),
        naive(np.eye(3), 3, quality=np.array([1, 2, 3]),
              weights=np.array([[1, 0, 0], [0, 1, 1 / 1.01**0.5], [0, 1 / 1.01**0.5, 1]])),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([[1.0, 0.0], [np.nan, 0.0]], {}, "labels: row 1 holds NaN"),
        ([[1.0, 0.0], [0.0, -2.0]], {}, "labels: row 1 holds -2.0"),
        (([0, 1, 2], [0, 1], [1.0, np.inf]), {}, "labels: row 1 holds inf"),
        (([0, 1, 2], [0, 1]), {}, "as a tuple is"),
        (([0, 1, 3], [0, 1], None), {}, "indptr must rise from 0 to 2"),
        (([0, 1, 2], [0, -1], None), {}, "row 1 has the label -1"),
        (([0, 2], [1, 1], None), {}, "labels of row 0 must rise, each once"),
        (([0, 1], [0.5], None), {}, "indices must be whole numbers"),
        (np.eye(2), {"quality": [1.0]}, r"quality must be \[2\]"),
        (np.eye(2), {"quality": [1.0, np.nan]}, "quality: row 1 has nan"),
        (np.eye(2), {"quality": [1.0, -1.0]}, "quality: row 1 has -1.0"),
        (np.eye(2), {"initial": [2]}, "initial: there is no row 2"),
        (np.eye(2), {"embeddings": np.eye(3)}, "labels has 2 labels, their similarities are those of 3"),
        (np.eye(2), {"embeddings": [[1.0], [np.inf]]}, "embeddings: row 1 holds"),
        (np.eye(2), {"similarity": np.eye(2), "embeddings": np.eye(2)}, "give one of them"),
        (np.eye(2), {"similarity": np.ones((2, 3))}, r"must be \[labels, labels\]"),
        (np.eye(2), {"similarity": [[1.0, 0.0], [0.0, 0.0]]}, "label 1 has none to itself"),
        (np.eye(2), {"threshold": -0.1}, "must not be negative"),
        (np.eye(2), {"propagation": np.nan}, "must not be negative"),
        (np.eye(2), {"gain": "third"}, "rule must be first_order or exact"),
        (np.eye(2), {"phi": "log"}, "phi must be power or exp"),
        (np.eye(2), {"b": 2.0}, "b above 0 and at most 1"),
    ],
)
def test_refuses(labels, options, message):
    with pytest.raises(UsageError, match=message):
        mig(labels, 1, **options)


def test_refuses_k_below_zero():
    with pytest.raises(UsageError, match="k=-1 must not be negative"):
        mig(np.eye(2), -1)
