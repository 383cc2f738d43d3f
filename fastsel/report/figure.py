"""The page's two charts as one figure for a paper or a slide: scores with the cut, and shares by source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsel.errors import MissingExtraError, UsageError
from fastsel.report.content import report_content

if TYPE_CHECKING:
    from fastsel.selection import Selection

SUFFIXES = (".png", ".pdf", ".svg")
COLOURS = {"kept": "#1f6f8b", "dropped": "#c9d3d9", "refused": "#e0b4a0", "random": "#555555", "pool": "#9aa7ae"}
_NAME_CHARACTERS = 28


def write_figure(selection: Selection, path: str | Path) -> Path:
    """Draw the figure; the same selection gives the same bytes of .png and .svg.

    Args:
        selection: a result with its pool.
        path: .png, .pdf or .svg; its folder is made when missing.

    Returns:
        The path.

    Raises:
        UsageError: another suffix, or a selection without a finite score.
        MissingExtraError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: a figure is written as one of {', '.join(SUFFIXES)}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(f"writing {path.suffix} files", "matplotlib", "report") from None
    content = report_content(selection)
    if content["histogram"] is None:
        raise UsageError(f"no row of {selection.pool.name} has a score: there is nothing to draw")
    shares = content["shares"]["source"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "fastsel", "text.parse_math": False}):
        figure = Figure(figsize=(10 if shares else 6, 4), layout="constrained")
        panels = figure.subplots(1, 2 if shares else 1, squeeze=False)[0]
        _draw_scores(panels[0], content["histogram"], selection.method)
        if shares:
            _draw_shares(panels[1], shares)
        figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _draw_scores(panel: Any, bars: dict[str, Any], method: str) -> None:
    edges = np.linspace(bars["start"], bars["stop"], len(bars["kept"]) + 1)
    below = np.zeros(len(bars["kept"]))
    for name in ("kept", "dropped", "refused"):
        if any(bars[name]):
            panel.bar(edges[:-1], bars[name], np.diff(edges), below, align="edge", color=COLOURS[name], label=name)
            below += bars[name]
    panel.stairs(bars["random"], edges, color=COLOURS["random"], label="random draw")
    if bars["cut"] is not None:
        panel.axvline(bars["cut"], color="black", linewidth=0.8, linestyle="--", label=f"cut {bars['cut']:.4g}")
    panel.set_xlabel(f"{method} score")
    panel.set_ylabel("rows")
    panel.legend(frameon=False)


def _draw_shares(panel: Any, shares: list[dict[str, Any]]) -> None:
    at = np.arange(len(shares))
    for place, name in ((-0.27, "pool"), (0.0, "kept"), (0.27, "random")):
        values = [(part[name]["share"] or 0.0) * 100 for part in shares]
        panel.barh(at + place, values, 0.25, color=COLOURS[name], label=name)
    panel.set_yticks(at, [_shortened(part["name"]) for part in shares])
    panel.invert_yaxis()
    panel.set_xlabel("% of the rows")
    panel.legend(frameon=False)


def _shortened(name: str) -> str:
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return name if len(name) <= _NAME_CHARACTERS else name[: _NAME_CHARACTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"
