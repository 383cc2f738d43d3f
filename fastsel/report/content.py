"""What the page shows, as plain JSON values: bounded in size, however large the pool is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastsel.budget import rank_rows, source_codes
from fastsel.io.examples import STATUS
from fastsel.summary import finite, length_name, mean, summarize

if TYPE_CHECKING:
    from fastsel.io import Example
    from fastsel.selection import Selection

BARS = 48
SHOWN_A_GROUP = 8
FAILED_SHOWN = 30
SAMPLED = 240
SOURCES_SHOWN = 16
SUBTASKS_SHOWN = 100
# Characters of a row's text: enough to judge a row, and 300 rows of the longest texts stay below 2 MB.
CHARACTERS_SHOWN = 4_000
CHARACTERS_SAMPLED = 1_200


def report_content(selection: Selection) -> dict[str, Any]:
    """Collect the numbers, the bars and the rows of the page.

    Returns:
        The summary, "histogram", "shares" (by source and by length), "target" (what the rows were chosen for, or None),
        "groups" of rows worth reading, "sample" (rows drawn with the run's seed, half of them kept), "failed" rows,
        "config", "inputs" and "provenance".
    """
    facts = summarize(selection)
    return {
        "summary": facts,
        "histogram": _histogram(selection),
        "shares": {
            "source": _share_rows(facts["sources"], "source"),
            "length": [{"name": length_name(part), **_three(part)} for part in facts["lengths"] or []],
        },
        "target": _target(selection),
        "groups": _groups(selection),
        "sample": _sample(selection),
        "failed": _failed(selection),
        "config": {str(name): value for name, value in selection.config.items()},
        "inputs": [{"path": str(i.path), "rows": i.rows, "sha256": i.sha256} for i in selection.pool.inputs],
        "provenance": selection.provenance,
    }


def _histogram(selection: Selection) -> dict[str, Any] | None:
    """Counts of kept, dropped and refused rows and of the random draw in equal steps of the score."""
    known = np.isfinite(selection.scores)
    if not known.any():
        return None
    values = selection.scores[known]
    low, high = float(values.min()), float(values.max())
    inner_low, inner_high = (float(edge) for edge in np.quantile(values, (0.005, 0.995)))
    # A few extreme scores must not press all others into one bar: they are counted in the outermost bars instead.
    clipped_low = low < inner_low - (inner_high - inner_low)
    clipped_high = high > inner_high + (inner_high - inner_low)
    start, stop = inner_low if clipped_low else low, inner_high if clipped_high else high
    if start == stop:
        start, stop = start - 0.5, stop + 0.5
    cut = finite(selection.scores[selection.indices[-1]]) if len(selection) else None
    width = (stop - start) / BARS
    if cut is not None and start < cut < stop:  # a bar begins at the cut, so that no bar is half kept
        start = cut - math.ceil((cut - start) / width) * width
        edges = np.append(np.arange(start, cut - width / 2, width), np.arange(cut, stop + width, width))
        stop = float(edges[-1])
    else:
        edges = np.linspace(start, stop, BARS + 1)

    def counts(rows: NDArray[Any]) -> list[int]:
        chosen = selection.scores[rows]
        return [int(c) for c in np.histogram(np.clip(chosen[np.isfinite(chosen)], start, stop), edges)[0]]

    kept, refused = selection.selected, selection.refused
    return {
        "start": start,
        "stop": stop,
        "clipped_low": clipped_low,
        "clipped_high": clipped_high,
        "kept": counts(kept),
        "refused": counts(refused),
        "dropped": counts(known & ~kept & ~refused),
        "random": counts(selection.baseline),
        "cut": cut,
    }


def _share_rows(parts: list[dict[str, Any]] | None, key: str) -> list[dict[str, Any]]:
    parts = parts or []
    shown = [{"name": part[key], **_three(part)} for part in parts[:SOURCES_SHOWN]]
    rest = parts[SOURCES_SHOWN:]
    if rest:
        sums = {
            name: {
                "rows": sum(part[name]["rows"] for part in rest),
                "share": None
                if rest[0][name]["share"] is None
                else round(sum(part[name]["share"] for part in rest), 6),
            }
            for name in ("pool", "kept", "random")
        }
        shown.append({"name": f"{len(rest):,} other sources", **sums})
    return shown


def _three(part: dict[str, Any]) -> dict[str, Any]:
    return {name: part[name] for name in ("pool", "kept", "random")}


def _target(selection: Selection) -> dict[str, Any] | None:
    """Targets with their subtasks and what rows score for each, checkpoints, and target rows that the pool holds."""
    targets = selection.provenance.get("targets")
    if not targets:
        return None
    prefixes = ("infl_", f"{selection.method}_")
    named = {
        name.removeprefix(prefix): values
        for name, values in selection.metrics.items()
        for prefix in prefixes
        if name.startswith(prefix)
    }
    rows = {"pool": np.arange(len(selection.scores)), "kept": selection.indices, "random": selection.baseline}
    first = np.zeros(0, np.int64)  # of each chosen row the subtask that it scores highest for
    if named and len(selection):
        first = np.argmax(np.nan_to_num(np.stack([v[selection.indices] for v in named.values()]), nan=-np.inf), axis=0)
    subtasks = []
    for target in targets:
        for name, n in target["subtasks"].items():
            values = named.get(name)
            place = list(named).index(name) if values is not None else -1
            subtasks.append(
                {"target": _printable(target["name"]), "name": _printable(name), "rows": n,
                 "best_of": None if values is None else int(np.count_nonzero(first == place)),
                 "means": None if values is None else {part: mean(values[r]) for part, r in rows.items()}}
            )  # fmt: skip
    leaks = selection.provenance.get("leaks")
    if leaks is not None:
        found = leaks["first"][:FAILED_SHOWN]
        leaks = {**leaks, "first": [{**leak, "kept": bool(selection.selected[leak["row"]])} for leak in found]}
    return {
        "targets": [{**target, "name": _printable(target["name"])} for target in targets],
        "subtasks": subtasks[:SUBTASKS_SHOWN],
        "more_subtasks": max(0, len(subtasks) - SUBTASKS_SHOWN),
        "checkpoints": selection.provenance.get("checkpoints") or [],
        "base": (selection.provenance.get("base") or {}).get("name"),
        "leaks": leaks,
    }


def _groups(selection: Selection) -> list[dict[str, Any]]:
    ranked = rank_rows(selection.scores, selection.eligible, largest=selection.largest)
    below = ranked[~selection.selected[ranked]]
    refused = rank_rows(selection.scores, selection.refused, largest=selection.largest)
    m = SHOWN_A_GROUP
    first, last = ("Highest", "Lowest") if selection.largest else ("Lowest", "Highest")
    groups = [
        (f"{first} scores", "The first rows in rank order, all kept.", selection.indices[:m]),
        ("Just above the cut", "The last rows that were kept.", selection.indices[m:][-m:]),
        ("Just below the cut", "The best rows that were not kept: what a slightly larger budget would add.", below[:m]),
        (f"{last} scores", "The far end of the ranking.", below[m:][-m:][::-1]),
        ("Kept out by the rule", f"Scored, but not eligible: {selection.rule}.", refused[:m]),
    ]
    return [
        {"title": title, "about": about, "rows": _rows(selection, rows, CHARACTERS_SHOWN)}
        for title, about, rows in groups
        if len(rows)
    ]


def _sample(selection: Selection) -> list[dict[str, Any]]:
    """Rows to browse: up to half kept ones, the rest from everything else, drawn with the run's seed, in pool order."""
    draw = np.random.default_rng(selection.seed)
    others = np.flatnonzero(~selection.selected)
    n_others = min(len(others), SAMPLED - min(SAMPLED // 2, len(selection)))
    n_kept = min(len(selection), SAMPLED - n_others)
    rows = np.concatenate(
        [
            draw.choice(selection.indices, n_kept, replace=False, shuffle=False),
            draw.choice(others, n_others, replace=False, shuffle=False) if n_others else others[:0],
        ]
    )
    return _rows(selection, np.sort(rows), CHARACTERS_SAMPLED)


def _failed(selection: Selection) -> list[dict[str, Any]]:
    failed = np.flatnonzero(selection.status > STATUS.index("truncated"))[:FAILED_SHOWN]
    return _rows(selection, failed, CHARACTERS_SAMPLED)


def _rows(selection: Selection, rows: NDArray[np.int64], characters: int) -> list[dict[str, Any]]:
    codes, names = source_codes(selection.pool) if selection.pool.sources() is not None else (None, [])
    by_row = np.argsort(selection.indices)
    kept = selection.selected
    refused = selection.refused
    shown = []
    for row, example in zip(rows.tolist(), selection.pool.examples(rows.tolist()), strict=True):
        reason = selection.reasons.get(row) or example.reason
        turns, left_out = _turns(example, characters)
        shown.append(
            {
                "row": row,
                "id": None if example.id is None else _printable(example.id),
                "source": None if codes is None else _printable(names[codes[row]]),
                "status": STATUS[selection.status[row]],
                "reason": _printable("; ".join(filter(None, [selection.rule if refused[row] else None, reason])))
                or None,
                "kept": bool(kept[row]),
                "rank": int(by_row[np.searchsorted(selection.indices, row, sorter=by_row)]) if kept[row] else None,
                "score": finite(selection.scores[row]),
                "tokens": None
                if selection.n_tokens is None or selection.n_tokens[row] < 0
                else int(selection.n_tokens[row]),
                "metrics": {name: finite(values[row]) for name, values in selection.metrics.items()},
                "turns": turns,
                "left_out": left_out,
            }
        )
    return shown


def _turns(example: Example, characters: int) -> tuple[list[dict[str, str]], int]:
    """The conversation, cut so that a long prompt never hides the answer, and how many characters were left out."""
    messages = list(example.messages)
    if not messages:
        return [], 0
    # The last turn gets half of the room; what it does not need goes to the turns before it, in order.
    room_last = max(characters // 2, characters - sum(len(message.content) for message in messages[:-1]))
    room = characters - min(len(messages[-1].content), room_last)
    turns, left_out = [], 0
    for message in messages[:-1]:
        text = message.content[:room]
        room -= len(text)
        left_out += len(message.content) - len(text)
        if text:
            turns.append({"role": _printable(message.role), "text": _printable(text)})
    text = messages[-1].content[:room_last]
    left_out += len(messages[-1].content) - len(text)
    return [*turns, {"role": _printable(messages[-1].role), "text": _printable(text)}], left_out


def _printable(text: str) -> str:
    """What HTML and JSON can hold: control characters as their symbols, lone surrogates as their escapes."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text.translate(_CONTROL)


_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421} | {ord("\r"): None}
