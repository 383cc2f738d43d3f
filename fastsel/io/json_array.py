"""Falling a JSON array into its elements, block by block, so that a large array is never in memory as a whole."""

import json
import re
from collections.abc import Iterator

from fastsel.io.text_files import Piece

_space = re.compile(r"[ \t\r\n]*").match
_decode = json.JSONDecoder().raw_decode
_NEAR_END = 16  # longer than any literal or escape that a block border may cut


def split_array(blocks: Iterator[bytes], offset: int, first: bool) -> Iterator[Piece]:
    """The elements of a JSON array, with the bytes they take in the file.

    Args:
        blocks: the content from `offset` on.
        offset: position of the first byte; its line counts as 1.
        first: whether this is the beginning of the file; else it is the beginning of an element.

    Raises:
        ValueError: what is wrong and in which line; past a mistake, the borders of rows cannot be known.
    """
    # Bytes that are not UTF-8 pass as surrogates, one for each, so that only the row that holds them is unreadable.
    text, line, at_end = "", 1, False
    expected = "[" if first else "element"
    seen_any = not first
    while True:
        position = 0
        while True:  # one token: a bracket, a comma or an element
            end = _space(text, position).end()  # type: ignore[union-attr]
            line += text.count("\n", position, end)
            offset += end - position
            position = end
            if position == len(text):
                break
            character = text[position]
            if expected == "[" and character == "\ufeff":
                offset, position = offset + 3, position + 1
                continue
            if expected == "element" and not (character == "]" and not seen_any):
                end = _end_of_element(text, position, line, at_end)
                if end is None:
                    break
                raw = text[position:end].encode("utf-8", "surrogateescape")
                yield Piece(offset, line, raw)
                line += raw.count(b"\n")
                offset, position, expected, seen_any = offset + len(raw), end, "comma", True
                continue
            if character == {"[": "[", "comma": ","}.get(expected):
                expected = "element"
            elif expected in ("comma", "element") and character == "]":
                expected = "nothing"
            elif expected == "[" and len(text) - position < 3 and not at_end:
                break  # a block border inside the byte order mark
            else:
                wanted = {"comma": "a comma or ]", "nothing": "nothing after the closing ]"}.get(expected, expected)
                raise _broken(line, f"{wanted} was expected, not {character!r}")
            offset, position = offset + 1, position + 1
        if at_end:
            if expected != "nothing":
                raise _broken(line, "the file ends before the closing ]")
            return
        text, at_end = _more(text[position:], blocks)


def _more(rest: str, blocks: Iterator[bytes]) -> tuple[str, bool]:
    """At least doubles what is left over, so that the time for one huge element stays linear in its size."""
    data = rest.encode("utf-8", "surrogateescape")
    wanted = 2 * len(data)
    parts = [data]
    size = len(data)
    for block in blocks:
        parts.append(block)
        size += len(block)
        if size > wanted:
            return b"".join(parts).decode("utf-8", "surrogateescape"), False
    return b"".join(parts).decode("utf-8", "surrogateescape"), True


def _end_of_element(text: str, position: int, line: int, at_end: bool) -> int | None:
    """Where the element ends, or None when it goes on in the next block."""
    try:
        end = _decode(text, position)[1]
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated string") or error.pos >= len(text) - _NEAR_END
        if cut and not at_end:
            return None
        raise _broken(line + text.count("\n", position, error.pos), error.msg) from error
    except (RecursionError, ValueError) as error:
        raise _broken(line, f"an element cannot be parsed: {error}") from error
    if text[end - 1] not in '}]"' and len(text) - end < 3 and not at_end:
        return None  # a number may go on: "0" may be the beginning of "0.5" or "0e+1"
    return end


def _broken(line: int, what: str) -> ValueError:
    return ValueError(
        f"is not a sound JSON array: line {line}: {what}. An array cannot be read past a mistake: mend it, or put one "
        "row on each line (.jsonl)"
    )
