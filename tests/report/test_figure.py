"""The figure: drawn from the page's numbers, the same bytes twice, refused where there is nothing to draw."""

import re
import sys

import numpy as np
import pytest

from fastsel.errors import MissingExtraError, UsageError
from fastsel.io import open_pool
from fastsel.methods.scores import scores

ROWS = [
    {"instruction": "q", "output": "a", "s": i / 10, "source": "$\\frac{x} <b> \x00" if i % 3 else "code"}
    for i in range(40)
]


@pytest.fixture
def selection():
    return scores(open_pool(ROWS, score_column="s"), budget=10)


def test_the_figure_says_method_cut_and_sources(selection, tmp_path):
    pytest.importorskip("matplotlib")
    text = selection.report(tmp_path / "new" / "figure.svg").read_text()
    words = " ".join(re.findall(r"<!-- (.*?) -->", text))  # the glyphs' own text
    for word in ("scores score", "cut 3", "random draw", "code", "% of the rows"):
        assert word in words
    again = selection.report(tmp_path / "again.svg").read_text()
    assert text == again
    assert selection.report(tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert selection.report(tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_bars_hold_every_scored_row_once(selection):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from fastsel.report.content import report_content
    from fastsel.report.figure import _draw_scores

    panel = Figure().subplots()
    _draw_scores(panel, report_content(selection)["histogram"], "scores")
    assert sum(patch.get_height() for patch in panel.patches if hasattr(patch, "get_height")) == len(ROWS)


def test_refuses_what_it_cannot_draw(selection, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"figure.jpeg: .* .png, .pdf, .svg"):
        selection.report(tmp_path / "figure.jpeg")
    selection.scores = np.full(len(ROWS), np.nan)
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match="nothing to draw"):
        selection.report(tmp_path / "figure.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"needs the package matplotlib: pip install 'fastsel\[report\]'"):
        selection.report(tmp_path / "figure.png")
