"""README.md of the output folder: a dataset card that the Hugging Face hub shows and `load_dataset` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsel.io.annotate import KEY
from fastsel.io.llama_factory import dataset_name
from fastsel.summary import length_name, number, random_text, summarize

if TYPE_CHECKING:
    from fastsel.selection import Selection

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_SOURCES_SHOWN = 40


def dataset_card(selection: Selection, file_name: str, *, has_dataset_info: bool, annotated: bool = False) -> str:
    """The card: what was chosen, from what and how, beside a random draw; no times, for equal runs give equal cards.

    Args:
        selection: the result.
        file_name: of the chosen rows.
        has_dataset_info: whether dataset_info.json lies beside it.
        annotated: whether scores were put into the rows.
    """
    facts = summarize(selection)
    size = next((name for limit, name in _SIZES if facts["kept"] < limit), "10M<n<100M")
    model = f" with the model `{facts['model']['name']}`" if facts["model"] else ""
    official = " (official=True)" if facts["official"] else ""
    per = f" per `{facts['per']}`" if facts["per"] else ""
    changed = f"with their scores under the key `{KEY}`" if annotated else "unchanged"
    random = facts["random_baseline"]
    counts = ", ".join(f"{count:,} {name}" for name, count in facts["counts"].items() if count)
    lines = [
        "---",
        "configs:",
        "- config_name: default",
        f"  data_files: {json.dumps(file_name)}",
        "tags:",
        "- fastsel",
        "- data-selection",
        f"size_categories: [{json.dumps(size)}]",
        "---",
        "",
        f"# {facts['kept']:,} of {facts['pool']['rows']:,} rows of {_cell(facts['pool']['name'])}",
        "",
        f"Chosen by `{facts['method']}`{official}{model}, budget "
        f"{facts['budget']}{per}. The rows are the pool's own, {changed}, and stay under the pool's licences.",
        "",
        "| | kept | random draw | pool |",
        "|---|---:|---:|---:|",
        f"| rows | {facts['kept']:,} | {random['rows']:,} | {facts['pool']['rows']:,} |",
        f"| mean score | {_numbers(facts['scores'], 'mean_kept', 'mean_random', 'mean_pool')} |",
    ]
    if facts["tokens"]:
        means = " | ".join(number(facts["tokens"][name]["mean"]) for name in ("kept", "random", "pool"))
        lines.append(f"| mean tokens a row | {means} |")
    lines += [
        "",
        f"The random draw has the same budget: {random_text(facts)}. Pool: {counts}.",
    ]
    if facts["refused"]["rows"]:
        lines.append(f"{facts['refused']['rows']:,} scored rows were kept out by the rule: {facts['refused']['rule']}.")
    if facts["short_by"]:
        lines.append(f"The eligible rows ran out: {facts['short_by']:,} {facts['unit']} of the budget are missing.")
    lines += _shares("Source", [(part["source"], part) for part in facts["sources"] or []])
    lines += _shares("Tokens", [(length_name(part), part) for part in facts["lengths"] or []])
    lines += ["", "## Files", "", f"- `{file_name}`: the chosen rows."]
    lines.append(
        "- `selection.parquet`: one line per pool row: score, rank, status, and the reason where there is no score."
    )
    lines.append("- `indices.npy` (row numbers, best first), `scores.npy` (every row; NaN where there is none).")
    lines.append("- `config.yaml`, `manifest.json`: what was run, on what, with which versions.")
    lines += ["", "## Use", "", "```python", "from datasets import load_dataset", ""]
    lines += ['rows = load_dataset("path/to/this/folder", split="train")', "```"]
    if has_dataset_info:
        name = dataset_name(selection)
        lines += ["", f"LLaMA-Factory: `dataset_dir` is this folder, `dataset: {name}` (see `dataset_info.json`)."]
    if facts["notes"]:
        lines += ["", "## Notes", "", *(f"- {_cell(note)}" for note in facts["notes"])]
    return "\n".join(lines) + "\n"


def write_card(
    selection: Selection, path: Path, file_name: str, *, has_dataset_info: bool, annotated: bool = False
) -> None:
    """Write the card; see dataset_card()."""
    text = dataset_card(selection, file_name, has_dataset_info=has_dataset_info, annotated=annotated)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _shares(title: str, parts: list[tuple[str, Any]]) -> list[str]:
    if not parts:
        return []
    lines = ["", f"| {title} | pool | kept | random | rows kept |", "|---|---:|---:|---:|---:|"]
    for name, part in parts[:_SOURCES_SHOWN]:
        shares = " | ".join(
            "-" if part[key]["share"] is None else f"{part[key]['share']:.1%}" for key in ("pool", "kept", "random")
        )
        lines.append(f"| {_cell(name)} | {shares} | {part['kept']['rows']:,} |")
    if len(parts) > _SOURCES_SHOWN:
        lines.append(f"| {len(parts) - _SOURCES_SHOWN:,} more | | | | |")
    return lines


def _numbers(scores: dict[str, Any], *names: str) -> str:
    return " | ".join(number(scores[name]) for name in names)


def _cell(text: str) -> str:
    """Text that cannot break a table or open an HTML tag: the hub renders the card, and names come from the pool."""
    plain = " ".join(text.split())
    return plain.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
