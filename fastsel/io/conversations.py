"""Conversations: a list of messages in any of the usual spellings -> Messages with mapped roles."""

import json
from collections.abc import Mapping
from typing import Any

from fastsel.io.examples import Message, well_formed
from fastsel.io.layout_options import LayoutOptions
from fastsel.io.row_values import UnusableRow, kind_of


def read_messages(turns: object, column: str, options: LayoutOptions) -> list[Message]:
    """The messages of a conversation, with their roles mapped.

    Raises:
        UnusableRow: naming the message that is not one.
    """
    if not isinstance(turns, (list, tuple)):
        raise UnusableRow(f"{column} is {kind_of(turns)}, not a list of messages")
    if not turns:
        raise UnusableRow(f"{column} is an empty list")
    role_key, content_key, roles = options.role_key, options.content_key, options.roles
    messages = []
    for position, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise UnusableRow(f"{column}[{position}] is {kind_of(turn)}, not a message with a role and a content")
        # Parquet gives every message all keys of the column, so a key counts when it is not null.
        role_at = role_key or ("role" if turn.get("role") is not None else "from")
        content_at = content_key or ("value" if "value" in turn and turn.get("content") is None else "content")
        word, content = turn.get(role_at), turn.get(content_at)
        if not isinstance(word, str):
            raise UnusableRow(f"{column}[{position}] has no role (its {role_key or 'role'} is {kind_of(word)})")
        role = roles.get(word) or roles.get(word.lower())
        if role is None:
            raise UnusableRow(f"{column}[{position}] has the unknown role {word[:40]!r}; name it with --tags")
        if type(content) is not str:
            content = _content(turn, content, f"{column}[{position}].{content_at}")
        elif not content and (turn.get("tool_calls") or turn.get("function_call")):
            content = _content(turn, None, f"{column}[{position}].{content_at}")
        messages.append(Message(role, well_formed(content)))
    return messages


def check_answer(messages: list[Message], column: str) -> None:
    """Refuse a conversation that does not end in an answer to something."""
    last = messages[-1]
    if last.role != "assistant":
        raise UnusableRow(f"the last message of {column} is the {last.role}'s, not the assistant's")
    if not last.content or last.content.isspace():
        raise UnusableRow(f"the answer (the last message of {column}) is empty")
    if not any(turn.role in ("user", "tool") for turn in messages):
        raise UnusableRow(f"{column} has no user message before the answer")


def _content(turn: Mapping[str, Any], content: object, where: str) -> str:
    """The text of a message whose content is not plain text: a list of text parts, or tool calls as JSON."""
    calls = turn.get("tool_calls") or turn.get("function_call")
    if not content and calls:
        return json.dumps(calls, ensure_ascii=False, default=str)
    if isinstance(content, list) and content:
        texts = []
        for part in content:
            if not isinstance(part, Mapping):
                raise UnusableRow(f"{where} has a part that is {kind_of(part)}, not an object with a type and a text")
            if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
                raise UnusableRow(f"{where} has a part of type {part.get('type')}; only text can be scored")
            texts.append(part["text"])
        return "".join(texts)
    raise UnusableRow(f"{where} is {kind_of(content)}, not text")
