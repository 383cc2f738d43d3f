"""A selection in numbers and in a few lines of text, always beside the random draw of the same budget and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsel.budget import source_codes, spread
from fastsel.selection import STATUS, Selection

LENGTH_EDGES = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
Rows = Mapping[str, NDArray[np.int64]]
_GAINS = (("first pick", "first"), ("mean", "mean_kept"), ("last pick", "cut"))


def summarize(selection: Selection) -> dict[str, Any]:
    """Counts by status, scores, shares by source and length beside the random draw, timings: plain JSON values.

    Returns:
        A dict; "pool", "kept" and "random" name three sets of rows, shares are fractions of the set's rows, lengths
        are tokens, timings seconds. What does not exist (tokens not counted, sources not named) is None.
    """
    rows = {"pool": np.arange(len(selection.scores)), "kept": selection.indices, "random": selection.baseline}
    counts = np.bincount(selection.status, minlength=len(STATUS))
    return {
        "method": selection.method,
        "official": selection.official,
        "pool": {"name": selection.pool.name, "format": selection.pool.format, "rows": len(selection.scores)},
        "model": selection.provenance.get("model"),
        "template": selection.provenance.get("template"),
        "budget": str(selection.budget),
        "per": plain_quotas(selection.per),
        "kept": len(selection),
        "requested": selection.requested,
        "unit": "tokens" if selection.budget.unit == "tokens" else "rows",
        "short_by": selection.short_by,
        "short": selection.short,
        "counts": {name: int(count) for name, count in zip(STATUS, counts, strict=True)},
        "refused": {"rule": selection.rule, "rows": int(np.count_nonzero(selection.refused))},
        "scores": _scores(selection),
        "tokens": None
        if selection.n_tokens is None
        else {name: _tokens(selection.n_tokens[r]) for name, r in rows.items()},
        "sources": _sources(selection, rows),
        "lengths": None if selection.n_tokens is None else _lengths(selection.n_tokens, rows),
        "random_baseline": _overlap(selection),
        "seed": selection.seed,
        "timings": {name: round(seconds, 6) for name, seconds in selection.timings.items()},
        "notes": list(selection.notes),
    }


def _scores(selection: Selection) -> dict[str, Any]:
    kept = selection.scores[selection.indices]
    # Scores that only chosen rows have say nothing about the others.
    is_of_chosen = selection.gains is not None and not np.any(~np.isnan(selection.scores) & ~selection.selected)
    return {
        "of_chosen_rows_only": is_of_chosen,
        "higher_is_kept": selection.largest,
        "scored": int(np.count_nonzero(~np.isnan(selection.scores))),
        "first": finite(kept[0]) if len(kept) else None,
        "cut": finite(kept[-1]) if len(kept) else None,
        "mean_kept": mean(kept),
        "mean_pool": None if is_of_chosen else mean(selection.scores),
        "mean_random": None if is_of_chosen else mean(selection.scores[selection.baseline]),
    }


def _tokens(counts: NDArray[np.int32]) -> dict[str, Any]:
    known = counts[counts >= 0]
    return {
        "total": int(known.sum(dtype=np.int64)),
        "mean": mean(known),
        "median": float(np.median(known)) if len(known) else None,
    }


def _sources(selection: Selection, rows: Rows) -> list[dict[str, Any]] | None:
    if selection.pool.sources() is None:
        return None
    codes, names = source_codes(selection.pool)
    counts = {name: np.bincount(codes[r], minlength=len(names)) for name, r in rows.items()}
    order = sorted(range(len(names)), key=lambda i: (-counts["pool"][i], i))
    return [{"source": names[i], **_shares(counts, i, rows)} for i in order]


def _lengths(n_tokens: NDArray[np.int32], rows: Rows) -> list[dict[str, Any]]:
    bins = np.digitize(n_tokens, LENGTH_EDGES)  # 0 = unknown length: counted in no bin
    counts = {name: np.bincount(bins[r], minlength=len(LENGTH_EDGES) + 1)[1:] for name, r in rows.items()}
    ends = (*(edge - 1 for edge in LENGTH_EDGES[1:]), None)
    filled = np.flatnonzero(counts["pool"])
    wanted = range(int(filled[0]), int(filled[-1]) + 1) if len(filled) else range(0)
    return [{"from": LENGTH_EDGES[i], "to": ends[i], **_shares(counts, i, rows)} for i in wanted]


def _shares(counts: Mapping[str, NDArray[np.int64]], i: int, rows: Rows) -> dict[str, Any]:
    return {
        name: {"rows": int(counts[name][i]), "share": round(int(counts[name][i]) / len(r), 6) if len(r) else None}
        for name, r in rows.items()
    }


def _overlap(selection: Selection) -> dict[str, Any]:
    """Rows the random draw shares with the choice, and the mean over all draws (hypergeometric in each quota group)."""
    limits = spread(selection.budget, selection.pool, selection.n_tokens, selection.per)
    groups = len(limits.names)
    usable = np.bincount(limits.codes[selection.status <= STATUS.index("truncated")], minlength=groups)
    chosen = np.bincount(limits.codes[selection.indices], minlength=groups)
    drawn = np.bincount(limits.codes[selection.baseline], minlength=groups)
    shared = len(np.intersect1d(selection.indices, selection.baseline))
    union = len(selection) + len(selection.baseline) - shared
    return {
        "rows": len(selection.baseline),
        "expected_overlap": round(float(np.sum(chosen * drawn / np.maximum(usable, 1))), 4),
        "overlap": shared,
        "jaccard": round(shared / union, 6) if union else None,
        "mean_score": _scores(selection)["mean_random"],
    }


def finite(value: Any) -> float | None:
    """The number, or None where JSON has no word for it."""
    number = float(value)
    return number if np.isfinite(number) else None


def mean(values: NDArray[Any]) -> float | None:
    """Mean of the finite values in float64, or None when there are none."""
    known = values[np.isfinite(values)]
    return float(known.mean(dtype=np.float64)) if len(known) else None


def plain_quotas(per: Any) -> Any:
    """Quotas as JSON can hold them."""
    return {str(name): str(weight) for name, weight in per.items()} if isinstance(per, Mapping) else per


def summary_text(facts: Mapping[str, Any]) -> str:
    """The summary in aligned lines for a terminal.

    Args:
        facts: what summarize() returned.
    """
    counts, scores, unit = facts["counts"], facts["scores"], facts["unit"]
    official = " (official)" if facts["official"] else ""
    pool = facts["pool"]
    lines = [f"{facts['method']}{official}: kept {facts['kept']:,} of {pool['rows']:,} rows of {pool['name']}"]
    per = f" per {facts['per']}" if facts["per"] else ""
    model = f", model {facts['model']['name']}" if facts["model"] else ""
    lines.append(_line("budget", f"{facts['budget']}{per}{model}"))
    if facts["short_by"]:
        groups = [f"{name} {missing:,}" for name, missing in facts["short"].items() if name != "all rows"]
        where = f" ({', '.join(groups)})" if groups else ""
        unit = unit[:-1] if facts["short_by"] == 1 else unit
        lines.append(_line("short by", f"{facts['short_by']:,} {unit}: the eligible rows ran out{where}"))
    if scores["of_chosen_rows_only"]:
        words = ", ".join(f"{word} {number(scores[key])}" for word, key in _GAINS if scores[key] is not None)
        lines.append(_line("gain", words))
    else:
        if scores["cut"] is not None:
            lines.append(_line("score", f"best {number(scores['first'])}, last kept {number(scores['cut'])}"))
        means = ", ".join(f"{name} {number(scores[f'mean_{name}'])}" for name in ("kept", "pool", "random"))
        lines.append(_line("", f"mean: {means}"))
    rule = (
        f"; {facts['refused']['rows']:,} kept out by the rule: {facts['refused']['rule']}"
        if facts["refused"]["rows"]
        else ""
    )
    lines.append(_line("rows", ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) + rule))
    lines.append(_line("random", random_text(facts)))
    if facts["tokens"]:
        means = ", ".join(f"{name} {number(facts['tokens'][name]['mean'])}" for name in ("kept", "pool", "random"))
        lines.append(_line("length", f"mean tokens a row: {means}"))
    lines += _share_lines("tokens", [(length_name(part), part) for part in facts["lengths"] or []])
    lines += _share_lines("source", [(part["source"], part) for part in facts["sources"] or []])
    if facts["timings"]:
        lines.append(_line("time", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in facts["timings"].items())))
    lines += [_line("note", note) for note in facts["notes"]]
    return "\n".join(lines)


def random_text(facts: Mapping[str, Any]) -> str:
    """What the choice has in common with the random draw, in one sentence."""
    random = facts["random_baseline"]
    if facts["method"] == "random" and random["overlap"] == random["rows"] == facts["kept"]:
        return f"the choice is the random draw of seed {facts['seed']} itself"
    return (
        f"a random draw of {random['rows']:,} rows shares {random['overlap']:,} with the choice "
        f"({random['expected_overlap']:,.1f} expected; seed {facts['seed']})"
    )


def number(value: float | None) -> str:
    """Four significant digits, or "none"."""
    if value is None:
        return "none"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def length_name(part: Mapping[str, Any]) -> str:
    """How a length bucket is written: "64-127", "8192+"."""
    return f"{part['from']}+" if part["to"] is None else f"{part['from']}-{part['to']}"


def _line(name: str, text: str) -> str:
    return f"  {name:<9} {text}"


def _share_lines(title: str, parts: Sequence[tuple[str, Mapping[str, Any]]], most: int = 12) -> list[str]:
    if not parts:
        return []
    # Names come from the pool and may hold line ends, or codes that a terminal obeys.
    parts = [
        ("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name), part) for name, part in parts
    ]
    width = min(40, max(len(title), *(len(name) for name, _ in parts[:most])))
    lines = ["", f"  {title:<{width}}  {'pool':>7} {'kept':>7} {'random':>7}"]
    for name, part in parts[:most]:
        shares = [part[key]["share"] for key in ("pool", "kept", "random")]
        cells = " ".join("      -" if share is None else f"{share:>7.1%}" for share in shares)
        lines.append(f"  {name[:width]:<{width}}  {cells}")
    if len(parts) > most:
        lines.append(f"  and {len(parts) - most:,} more")
    return lines
