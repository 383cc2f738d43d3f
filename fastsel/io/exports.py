"""What --also writes: the same result in the files other selection tools read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastsel.summary import finite

if TYPE_CHECKING:
    from fastsel.selection import Selection

_ROWS_A_BLOCK = 65_536


def export(selection: Selection, also: Iterable[str], folder: Path) -> None:
    """Write the files of each tool named in also into folder; see EXPORTS for the names."""
    for name in also:
        EXPORTS[name](selection, folder)


def _oda(selection: Selection, folder: Path) -> None:
    """oda.jsonl: {"id", "score"} a pool row, as OpenDataArena's scorers write; the row number stands in for an id."""
    ids = selection.pool.ids()
    with open(folder / "oda.jsonl", "w", encoding="utf-8") as stream:
        for start in range(0, len(selection.scores), _ROWS_A_BLOCK):
            scores = selection.scores[start : start + _ROWS_A_BLOCK]
            names = [None] * len(scores) if ids is None else ids.slice(start, len(scores)).to_pylist()
            for row, (name, score) in enumerate(zip(names, scores, strict=True), start):
                line = {"id": row if name is None else name, "score": finite(score)}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _dataflex(selection: Selection, folder: Path) -> None:
    """step_0.json for the cache_dir of DataFlex's LESS selector, top_indices.npy ([1, k]) for its "near" selector."""
    scores = selection.scores[selection.indices]
    step = {"indices": selection.indices.tolist(), "metric": {"score": scores.tolist()}}
    (folder / "step_0.json").write_text(json.dumps(step) + "\n", encoding="utf-8")
    np.save(folder / "top_indices.npy", selection.indices[None, :])


def _instructlab(selection: Selection, folder: Path) -> None:
    """instructlab.npz: indices and gains in rank order, as InstructLab SDG has them; scores where gains are missing."""
    gains = selection.scores if selection.gains is None else selection.gains
    np.savez(folder / "instructlab.npz", indices=selection.indices, gains=gains[selection.indices])


def _less(selection: Selection, folder: Path) -> None:
    """sorted.csv: "file name, index, score" for every scored row, best first, six decimals, as LESS writes it."""
    from fastsel.budget import rank_rows

    ranked = rank_rows(selection.scores, ~np.isnan(selection.scores), largest=selection.largest)
    name = Path(selection.pool.name).stem.replace(",", "_")
    with open(folder / "sorted.csv", "w", encoding="utf-8", newline="") as stream:
        stream.write("file name, index, score\n")
        rows = csv.writer(stream, delimiter=",", lineterminator="\n")
        rows.writerows((name, f" {row}", f" {round(float(selection.scores[row]), 6)}") for row in ranked)


EXPORTS: dict[str, Callable[[Selection, Path], None]] = {
    "oda": _oda,
    "dataflex": _dataflex,
    "instructlab": _instructlab,
    "less": _less,
}
