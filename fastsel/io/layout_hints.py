"""What to tell a user whose rows have no layout that we know."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from fastsel.io.layout_options import LAYOUT_COLUMNS, LayoutOptions
from fastsel.io.row_values import kind_of

_PROMPT_WORDS = ("instruction", "prompt", "question", "query", "problem", "user", "input")
_ANSWER_WORDS = ("output", "completion", "response", "answer", "solution", "target", "assistant")


def first_keys(row: object) -> str:
    """The keys of the first row, for a message."""
    return (
        f"the first row's keys are {listed_keys(row)}"
        if isinstance(row, Mapping)
        else f"the first row is {kind_of(row)}"
    )


def unknown_layout(row: object, options: LayoutOptions) -> str:
    """What to tell a user none of whose rows could be read: the first row's keys and the nearest layout."""
    if not isinstance(row, Mapping):
        return f"the first row is {kind_of(row)}, not an object with named fields"
    keys = [str(key) for key in row]
    text = first_keys(row) + "; "
    if options.format != "auto":
        columns = ", ".join((options.fields or LAYOUT_COLUMNS[options.format]).values())
        return (
            text + f"--format {options.format} reads {columns}: leave --format out to have each row's layout detected, "
            "or name the columns with --columns"
        )
    prompt = next((key for word in _PROMPT_WORDS for key in keys if key.lower() == word), None)
    answer = next((key for word in _ANSWER_WORDS for key in keys if key.lower() == word), None)
    conversation = next((key for key in keys if isinstance(row[key], list) and row[key]), None)
    if prompt and answer:
        return text + f"the nearest format is alpaca: name the columns with --columns prompt={prompt} response={answer}"
    if conversation:
        return text + f"the nearest format is messages: name the column with --columns messages={conversation}"
    scored = {layout: _nearness(keys, fields.values()) for layout, fields in LAYOUT_COLUMNS.items()}
    nearest = max(scored, key=lambda layout: scored[layout])
    wanted = ", ".join(LAYOUT_COLUMNS[nearest].values())
    return text + f"the nearest format is {nearest} ({wanted}): name the columns with --columns"


def listed_keys(row: Mapping[str, Any]) -> str:
    """The keys of a row, the first dozen of them."""
    keys = [str(key)[:40] for key in row]
    return ", ".join(keys[:12]) + (f" and {len(keys) - 12} more" if len(keys) > 12 else "") if keys else "none"


def _nearness(keys: list[str], columns: Iterable[str]) -> float:
    return max(
        (difflib.SequenceMatcher(None, key.lower(), name).ratio() for key in keys for name in columns), default=0
    )
