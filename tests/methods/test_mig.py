"""MIG over tags that rows carry, by hand, against a transcription, and against the authors' own choice."""

import json
from pathlib import Path

import numpy as np
import pytest

import fastsel
from fastsel.errors import InputError, UsageError
from fastsel.features.labels import read_labels
from fastsel.io import open_pool

GOLDEN = Path(__file__).with_name("golden")
VARIANTS = {
    "default": {},
    "near": {"threshold": 0.6},
    "norm": {"threshold": 0.6, "norm": True},
    "half": {"threshold": 0.6, "propagation": 0.5},
    "exponential": {"threshold": 0.6, "phi": "exp", "phi_alpha": 0.05},
}


def row(tags=None, quality=None, complexity=None, **more):
    annotation = {}
    if tags is not None:
        annotation["instag"] = {"content": tags}
    if quality is not None:
        annotation["deita"] = {"quality_scores": quality, "complexity_scores": complexity or [1.0] * len(quality)}
    return {"instruction": "question", "output": "answer", "annotation": annotation, **more}


def mig(rows, **options):
    return fastsel.mig(rows if not isinstance(rows, list) else open_pool(rows), progress="none", **options)


def test_worked_example():
    """Tags that resemble nothing else; phi(x) = x^0.5 (a is nothing beside 1); quality: the mean over turns of q * c.

    Row 0: history, (2 * 1 + 4 * 3) / 2 = 7.  Row 1: cooking, 4.  Row 2: history and cooking, 3.  Row 3: history, 1.
    Nothing received: gains go by quality times labels: 7, 4, 6, 1: row 0. History has 7: its slope is 0.5 / 7^0.5, that
    of cooking is 5e5: rows 1 and 2 are worth 4 and 3 of those: row 1. Then row 2: 3 (0.5 / 7^0.5 + 0.5 / 4^0.5).
    """
    rows = [
        row(["history"], [2.0, 4.0], [1.0, 3.0]), row(["cooking"], [4.0]),
        row(["history", "cooking", "history"], [3.0]), row(["history"], [1.0]),
    ]  # fmt: skip
    got = mig(rows, budget=3, phi_a=1e-12, phi_b=0.5)
    assert got.indices.tolist() == [0, 1, 2]
    assert got.metrics["quality"].tolist() == [7, 4, 3, 1]
    np.testing.assert_allclose(got.gains[:3], [7 * 5e5, 4 * 5e5, 3 * (0.5 / 7**0.5 + 0.25)], rtol=1e-9)
    assert np.isnan(got.gains[3]) and np.isnan(got.scores[3]) and got.eligible.all() and got.short_by == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_equals_the_authors_choice(variant):
    """Labels, graph and list: what their code chose with the same encoder (golden/record_mig.py)."""
    recorded = json.loads((GOLDEN / "mig.json").read_text())
    theirs = recorded["picks"][variant]
    got = fastsel.mig(
        GOLDEN / "mig_rows.jsonl", valid_tags=GOLDEN / "mig_valid_tags.json", official=True, budget=len(theirs),
        progress="none", **VARIANTS[variant],
    )  # fmt: skip
    assert got.indices.tolist() == theirs
    assert np.flatnonzero(got.eligible).tolist() == recorded["kept"]
    np.testing.assert_allclose(got.metrics["quality"][recorded["kept"]], recorded["scores"], rtol=1e-15)


def test_without_official_rows_without_a_valid_tag_are_skipped_with_a_reason():
    recorded = json.loads((GOLDEN / "mig.json").read_text())
    got = mig(GOLDEN / "mig_rows.jsonl", valid_tags=GOLDEN / "mig_valid_tags.json", budget=0.1)
    unlabelled = [kept for kept, tags in zip(recorded["kept"], recorded["tags"], strict=True) if not tags]
    assert unlabelled and not got.eligible[unlabelled].any()
    assert got.reasons[unlabelled[0]].endswith(": none of its tags (annotation.instag.content) counts")
    assert got.reasons[20] == "line 21: there is no quality in annotation.deita.quality_scores"
    assert got.reasons[41] == "line 42: there are no tags in annotation.instag.content"


def test_quality_is_one_where_no_row_has_any_or_that_of_the_score_column():
    rows = [row(["a"], mine=1.0), row(["a"], mine=3.0), row("b", mine=2.0)]
    assert mig(rows, budget=3).metrics["quality"].tolist() == [1, 1, 1]
    assert mig(rows, budget=3).indices.tolist() == [0, 2, 1]
    got = mig(open_pool(rows, score_column="mine"), budget=3)
    assert got.metrics["quality"].tolist() == [1, 3, 2] and got.indices.tolist() == [1, 2, 0]


def test_quotas_and_prefixes():
    rows = [row([f"t{i % 7}", f"u{i % 5}"], [1.0 + i % 11], source="ab"[i % 3 == 0]) for i in range(60)]
    small, large = mig(rows, budget=10), mig(rows, budget=30)
    assert large.indices[:10].tolist() == small.indices.tolist()
    got = mig(rows, budget=12, per="source")
    assert sorted(np.bincount([i % 3 == 0 for i in got.indices]).tolist()) == [4, 8]


def test_a_pool_without_tags_is_clustered():
    """Two groups far apart, three rows each: one cluster each, so that picks take turns between them."""
    vectors = np.array([[1, 0], [1, 0.1], [1, 0.2], [0, 1], [0.1, 1], [0.2, 1]], np.float32)
    rows = [{"instruction": f"q{i}", "output": "a"} for i in range(6)]
    got = mig(rows, encoder=vectors, clusters=2, budget=4)
    groups = [i // 3 for i in got.indices]
    assert sorted(groups[:2]) == sorted(groups[2:]) == [0, 1]
    assert len(mig(rows, encoder=vectors, budget=2)) == 2  # one cluster: still two rows


def test_labels_are_read_by_blocks_and_share_among_tags(monkeypatch):
    monkeypatch.setattr("fastsel.features.labels.ROWS_AT_ONCE", 2)
    pool = open_pool([row(["b", "a", "b"], [2.0]), row([], [1.0]), row(["c"], [0.0]), row(["a", "x"], [5.0])])
    labels = read_labels(
        pool, "annotation.instag.content", ["annotation.deita.quality_scores"], valid_tags=["a", "b", "c"],
        share_among_tags=True, keep_unlabelled=True, progress="none",
    )  # fmt: skip
    assert labels.names == ["a", "b", "c"] and labels.rows.tolist() == [0, 1, 2, 3]
    assert labels.indptr.tolist() == [0, 2, 2, 3, 4] and labels.indices.tolist() == [0, 1, 2, 0]
    np.testing.assert_allclose(labels.values, [1 / 3, 1 / 3, 1, 1])
    assert labels.quality.tolist() == [2, 1, 0, 5]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (row(["a", 3], [1.0]), "the tags in annotation.instag.content are a list, not a list of texts"),
        (row({"a": 1}, [1.0]), "are an object, not a list"),
        (row(["a"], [1.0, 2.0], [1.0, 2.0, 3.0]), "has 3 turns, not 2"),
        (row(["a"], ["high"]), "not a number or one for each turn"),
        (row(["a"], [-1.0]), "its quality is -1.0"),
        (row(["a"], [float("nan")]), "its quality is nan"),
        (row(["a"], []), "not a number or one for each turn"),
    ],
)
def test_edges_a_row_that_cannot_be_used_is_skipped_with_a_reason(broken, reason):
    got = mig([row(["a"], [1.0]), broken], budget=1)
    assert got.indices.tolist() == [0] and reason in got.reasons[1]


def test_refuses():
    untagged = [{"instruction": "q", "output": "a"}] * 3
    with pytest.raises(UsageError, match="the authors' code reads tags, and no row has any"):
        mig(untagged, official=True)
    with pytest.raises(InputError, match="no row has tags that count and a quality"):
        mig([row(["a"], [1.0])], valid_tags=["b"])
    with pytest.raises(InputError, match="the valid tags .* cannot be read"):
        mig([row(["a"], [1.0])], valid_tags="nowhere.json")
    with pytest.raises(InputError, match="must be a list of texts"):
        mig([row(["a"], [1.0])], valid_tags={"a": 1})
    with pytest.raises(UsageError, match="rule must be first_order or exact"):
        mig([row(["a"], [1.0])], gain="second")
    with pytest.raises(UsageError, match="counts none"):
        mig([row(["a"], [1.0])], budget="10tok")
