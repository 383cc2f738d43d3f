"""Single values of a row, with a reason when one is not what it should be."""

from collections.abc import Mapping
from typing import Any

from fastsel.io.examples import well_formed


class UnusableRow(Exception):
    """Why a row cannot be used. recognised says whether its layout, at least, was one we know."""

    def __init__(self, reason: str, recognised: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.recognised = recognised


class AmbiguousRow(UnusableRow):
    """A row of two layouts that say different things."""


def lookup(row: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or of a dotted path into nested objects (`processed_scores.IFD`); None if not there."""
    if path in row or "." not in path:
        return row.get(path)
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def answer_text(value: object, column: str) -> str:
    """The answer, which must be text that is not blank."""
    text = text_of(value, column, "the answer ")
    if not text or text.isspace():
        raise UnusableRow(f"the answer ({column}) is {'only white space' if text else 'empty'}")
    return well_formed(text)


def text_of(value: object, column: str, what: str = "") -> str:
    """The value, which must be text."""
    if not isinstance(value, str):
        name = f"{what}({column})" if what else column
        raise UnusableRow(f"{name} is {kind_of(value)}, not text")
    return value


def label_of(value: object) -> str | None:
    """An id or source as text; lists, objects, booleans and NaN are none."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return None
    return str(value)


def kind_of(value: object) -> str:
    """What the value is, in a word for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (list, tuple)):
        return "a list"
    return f"of type {type(value).__name__}"
