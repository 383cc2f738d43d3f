"""The page of a selection for a target: subtasks, checkpoints and leaks, as the manifest has them."""

import numpy as np
import pytest

from fastsel.io import open_pool
from fastsel.report import write_report
from fastsel.report.content import report_content
from fastsel.selection import build_selection

HOSTILE = "<script>window.attacked = 1</script>\x00"


def selection(*, metrics=True, leaks=True, **more):
    pool = open_pool([{"instruction": f"q{i}", "output": f"a{i}"} for i in range(6)])
    a, b = np.array([6.0, 5, 1, 0, 0, np.nan]), np.array([1.0, 2, 4, 3, 0, np.nan])
    provenance = {
        "targets": [
            {"name": "exam", "inputs": [], "rows": 3, "subtasks": {"a": 2, "b": 1}, "left_out": 2},
            {"name": HOSTILE, "inputs": [], "rows": 1, "subtasks": {HOSTILE: 1}, "left_out": 0},
        ],
        "checkpoints": [
            {"folder": "run/checkpoint-8", "step": 8, "learning_rate": 2e-5, "used": "weight 1.000"},
            {"folder": "run/checkpoint-16", "step": 16, "learning_rate": None, "used": None},
        ],
        "base": {"name": "tiny", "revision": None},
        "leaks": {
            "looked_for": "near", "pool_rows": 2, "equal": 1, "dropped": False,
            "first": [
                {"row": 0, "target": "exam", "target_row": 1, "cosine": 1.0, "is_equal": True},
                {"row": 4, "target": HOSTILE, "target_row": 0, "cosine": 0.97, "is_equal": False},
            ],
        } if leaks else {"looked_for": "none", "pool_rows": 0, "equal": 0, "dropped": False, "first": []},
    }  # fmt: skip
    status = np.array([0, 0, 0, 0, 0, 2], np.uint8)
    given = {
        "pool": pool, "method": "less", "indices": np.array([0, 1, 2]), "scores": np.fmax(a, b), "status": status,
        "reasons": {}, "n_tokens": None, "metrics": {"infl_a": a, "infl_b": b} if metrics else {}, "config": {},
        "timings": {}, "seed": 0, "notes": [], "budget": 3, "per": None, "provenance": provenance,
    }  # fmt: skip
    return build_selection(**(given | more))


def test_subtasks_have_their_means_and_the_rows_they_are_best_for():
    """Rows 0, 1, 2 are kept: of a 6, 5 and 1, mean 4; of b 1, 2 and 4, mean 7/3. Two are best for a, one for b."""
    found = report_content(selection())["target"]
    a, b, other = found["subtasks"]
    assert (a["name"], a["rows"], a["best_of"]) == ("a", 2, 2) and b["best_of"] == 1
    assert a["means"]["kept"] == pytest.approx(4) and b["means"]["kept"] == pytest.approx(7 / 3)
    assert a["means"]["pool"] == pytest.approx(12 / 5)
    assert other["means"] is None and "\x00" not in other["name"]
    assert [leak["kept"] for leak in found["leaks"]["first"]] == [True, False]


def test_the_page_shows_them_as_text(tmp_path):
    html = write_report(selection(), tmp_path / "report.html").read_text(encoding="utf-8")
    section = html[html.index('<section id="target">') : html.index('<section id="scores">')]
    for shown in (
        "exam",
        "run/checkpoint-8",
        "weight 1.000",
        "not used",
        "not logged",
        "2e-05",
        "0.970",
        "2 pool rows hold a row of the target (1 equal, 1 near)",
        "--drop-leaks",
        "of exam",
    ):
        assert shown in section, shown
    assert "<script>window.attacked" not in section and "&lt;script&gt;window.attacked" in section
    assert 'href="#target"' in html


def test_nothing_is_claimed_that_was_not_looked_for(tmp_path):
    html = write_report(selection(leaks=False, metrics=False), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "They were not looked for." in html and "mean score, kept" not in html


def test_other_selections_have_no_such_section(tmp_path):
    html = write_report(selection(provenance={}), tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="target"' not in html and 'href="#target"' not in html


def test_many_subtasks_are_cut(tmp_path):
    many = {f"task {i}": 1 for i in range(130)}
    target = {"name": "exam", "inputs": [], "rows": 130, "subtasks": many, "left_out": 0}
    found = report_content(selection(provenance={"targets": [target]}))["target"]
    assert len(found["subtasks"]) == 100 and found["more_subtasks"] == 30
    assert "30 more subtasks" in write_report(
        selection(provenance={"targets": [target]}), tmp_path / "report.html"
    ).read_text(encoding="utf-8")
