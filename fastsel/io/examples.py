"""One row of a pool as every method sees it: a conversation whose last turn is the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import NamedTuple

import xxhash

STATUS = ("ok", "truncated", "skipped", "error")
"""What became of a row; Pool.status holds the position in this tuple."""
OK, TRUNCATED, SKIPPED, ERROR = range(4)


class Message(NamedTuple):
    """One turn. role is system, user, assistant or tool, whatever word the row used."""

    role: str
    content: str


@dataclass(slots=True)
class Example:
    """One pool row.

    Attributes:
        row_id: number of the row in the pool, counted from 0 over non-blank lines.
        status: "ok", "skipped" (the row cannot be used) or "error" (the line cannot be read).
        reason: why the row is not ok, with the line number; None when it is.
        id: the row's own id, as text.
        source: the data set that the row says it comes from.
        layout: the layout it was read as: messages, sharegpt, mig, tulu, alpaca, oda, prompt_completion or text.
        messages: the conversation. Its last message is the assistant's and not blank. A `text` row has that one only.
        instruction: a flat row's instruction; None in rows that are conversations.
        input: a flat row's input, "" when there is none; None in rows that are conversations.
        tools: the tool schema, as the row's own text or as JSON.
        trained: positions in messages of the assistant turns that count, when the row marks them
            (`message_field_training`); None when all of them do.
    """

    row_id: int
    status: str
    reason: str | None = None
    id: str | None = None
    source: str | None = None
    layout: str = ""
    messages: tuple[Message, ...] = ()
    instruction: str | None = None
    input: str | None = None
    tools: str | None = None
    trained: tuple[int, ...] | None = None


def well_formed(text: str) -> str:
    r"""The text with surrogate pairs joined and each lone surrogate replaced by U+FFFD, as UTF-8 encoders do.

    JSON may hold "\ud800", which no tokenizer and no hash can take. Scores and hashes see the replacement; the row that
    is written when it is selected keeps its own bytes.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def content_hash(messages: Sequence[Message]) -> bytes:
    r"""The 16 bytes (big-endian) that name a conversation; `selection.parquet` shows them in hexadecimal.

    xxh3_128, seed 0, of the UTF-8 bytes of the messages as compact JSON, `[{"role":"user","content":"..."},...]`: roles
    mapped to system, user, assistant and tool; no spaces; escaped are only `"`, `\`, and characters below U+0020 (short
    forms where JSON has them, else `\u00xx` in lower case), which is what JavaScript's JSON.stringify writes.
    """
    # Put together here, since JSONEncoder.encode builds an encoder for every call (1.6 times the time).
    turns = [f'{{"role":"{role}","content":{encode_basestring(content)}}}' for role, content in messages]
    return xxhash.xxh3_128_digest(f"[{','.join(turns)}]".encode())
