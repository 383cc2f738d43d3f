"""The dataset_info.json entry with which LLaMA-Factory reads the chosen rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastsel.io.layout_options import ROLES

if TYPE_CHECKING:
    from fastsel.io import Example
    from fastsel.selection import Selection

_ROWS_LOOKED_AT = 200
_TAG_OF_ROLE = {"user": "user_tag", "assistant": "assistant_tag", "system": "system_tag", "tool": "observation_tag"}
# Where two columns hold the same text, the one of this name is meant.
_USUAL = ("messages", "conversations", "instruction", "prompt", "input", "output", "response", "completion", "system")


def dataset_info(selection: Selection, file_name: str) -> dict[str, Any] | None:
    """The entry, or None where LLaMA-Factory cannot read the rows (mixed layouts, prompts that are lists, no rows).

    The columns are found by their values in the first 200 chosen rows: whatever --columns and --tags said, a column
    that holds the answer is the answer's. Naming columns resets the unnamed ones, so all that are there are named.

    Args:
        selection: the result, with its pool.
        file_name: of the chosen rows, relative to the file that the entry goes into.
    """
    ids = selection.ordered_indices()[:_ROWS_LOOKED_AT]
    rows, examples = selection.pool.rows(ids), selection.pool.examples(ids)
    if not rows:
        return None
    entry = _sharegpt(rows, examples) or _alpaca(rows, examples)
    if entry is None:
        return None
    return {dataset_name(selection): {"file_name": file_name, **entry}}


def dataset_name(selection: Selection) -> str:
    """What the entry is called: the pool's name and the method, in letters, digits, _ and -."""
    return re.sub(r"[^\w-]+", "_", f"{selection.pool.name.split('.')[0]}_{selection.method}").strip("_")


def _sharegpt(rows: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any] | None:
    def is_conversation(value: Any, example: Example) -> bool:
        words = _words(value)
        return words is not None and words[-1][1].strip() == example.messages[-1].content.strip()

    column = _column(rows, examples, is_conversation)
    if column is None:
        return None
    first = rows[0][column][0]
    role_key, content_key = ("role", "content") if "role" in first else ("from", "value")
    tags = {"role_tag": role_key, "content_tag": content_key}
    seen = dict.fromkeys(word for row in rows for word, _ in _words(row[column]) or [])
    for word in seen:
        tag = "function_tag" if word == "function_call" else _TAG_OF_ROLE.get(ROLES.get(word.lower(), ""))
        if tag is None or tags.setdefault(tag, word) != word:
            return None  # two words for one role cannot be said to LLaMA-Factory
    columns = {"messages": column, **_system_and_tools(rows, examples, inside=True)}
    return {"formatting": "sharegpt", "columns": columns, "tags": tags}


def _alpaca(rows: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any] | None:
    response = _column(rows, examples, lambda value, example: _same(value, example.messages[-1].content))
    if response is None:
        return None
    if all(example.layout == "text" for example in examples):
        return {"formatting": "alpaca", "columns": {"prompt": response}}
    prompt = _column(rows, examples, lambda value, example: _same(value, _prompt(example)))
    if prompt is None:
        return None
    columns = {"prompt": prompt, "response": response}
    inputs = [i for i, example in enumerate(examples) if example.input]
    if inputs:
        with_input = [rows[i] for i in inputs], [examples[i] for i in inputs]
        query = _column(*with_input, lambda value, example: _same(value, example.input))
        if query is None:
            return None
        columns["query"] = query
    if any(row.get("history") for row in rows):
        columns["history"] = "history"
    return {"formatting": "alpaca", "columns": {**columns, **_system_and_tools(rows, examples, inside=False)}}


def _system_and_tools(rows: Sequence[Any], examples: Sequence[Example], *, inside: bool) -> dict[str, str]:
    """Columns outside of the conversation that hold its system prompt and its tools."""
    columns = {}
    places = [i for i, example in enumerate(examples) if example.messages[0].role == "system"]
    if places:
        with_system = [rows[i] for i in places], [examples[i] for i in places]
        system = _column(*with_system, lambda value, example: _same(value, example.messages[0].content))
        if system is not None:
            columns["system"] = system
    if inside and any(row.get("tools") for row in rows):
        columns["tools"] = "tools"
    return columns


def _prompt(example: Example) -> str:
    if example.instruction is not None:
        return example.instruction
    return next((turn.content for turn in reversed(example.messages) if turn.role == "user"), "")


def _column(rows: Sequence[Any], examples: Sequence[Example], fits: Any) -> str | None:
    """The column whose value fits in every row."""
    names = [
        str(name)
        for name in rows[0]
        if all(name in row and fits(row[name], example) for row, example in zip(rows, examples, strict=True))
    ]
    return next((name for name in _USUAL if name in names), names[0] if names else None)


def _same(value: Any, text: str | None) -> bool:
    return isinstance(value, str) and text is not None and value.strip() == text.strip()


def _words(value: Any) -> list[tuple[str, str]] | None:
    """(role word, text) of each message, or None when the value is not a list of messages with plain texts."""
    if not isinstance(value, (list, tuple)) or not value:
        return None
    words = []
    for turn in value:
        if not isinstance(turn, Mapping):
            return None
        role, text = (
            (turn.get("role"), turn.get("content")) if "role" in turn else (turn.get("from"), turn.get("value"))
        )
        if not isinstance(role, str) or not isinstance(text, str):
            return None
        words.append((role, text))
    return words
