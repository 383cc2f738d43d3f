"""The words of `--columns` and `--tags`: axolotl's, LLaMA-Factory's and TRL's names for the same few things."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastsel.errors import UsageError

FORMATS = ("auto", "messages", "prompt_completion", "alpaca", "sharegpt", "tulu", "mig", "oda", "text")
FORMAT_ALIASES = {"scored": "oda", "openai": "messages", "chat_template": "messages", "completion": "text"}

# Each layout's fields and the columns they stand in unless --columns says otherwise.
LAYOUT_COLUMNS: dict[str, dict[str, str]] = {
    "messages": {"messages": "messages"},
    "tulu": {"messages": "messages"},
    "sharegpt": {"messages": "conversations"},
    "mig": {"messages": "dialogs"},
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    "oda": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    "prompt_completion": {"prompt": "prompt", "completion": "completion"},
    "text": {"text": "text"},
}

_FIELD_WORDS = {
    "messages": "messages", "conversations": "messages", "dialogs": "messages", "field_messages": "messages",
    "prompt": "prompt", "instruction": "prompt", "field_instruction": "prompt",
    "query": "query", "input": "query", "field_input": "query",
    "response": "response", "output": "response", "field_output": "response",
    "completion": "completion", "history": "history", "text": "text", "field": "text",
    "system": "system", "field_system": "system", "tools": "tools", "field_tools": "tools",
    "id": "id", "source": "source", "dataset": "source",
}  # fmt: skip
_ROLE_WORDS = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "assistant",
    "system_tag": "system",
}  # fmt: skip
_KEY_WORDS = {
    "role_tag": "role", "message_field_role": "role", "content_tag": "content", "message_field_content": "content",
}  # fmt: skip
_OTHER_WORDS = ("message_property_mappings", "roles", "roles_to_train", "message_field_training")

# A function_call turn is written by the model, so it is the assistant's; an observation answers it.
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "ipython": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class LayoutOptions:
    """What --format, --columns and --tags come to.

    Attributes:
        format: one of FORMATS.
        fields: the named fields (messages, prompt, query, ...) and their columns; empty when none was named.
        columns: columns of system, tools, id and source.
        role_key, content_key: the keys inside a message, or None to take role/content or from/value as found.
        roles: the row's word for a role -> system, user, assistant or tool.
        training_key: the key inside a message that says whether it is trained on, or None.
    """

    format: str = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    role_key: str | None = None
    content_key: str | None = None
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)
    training_key: str | None = None


Words = Mapping[str, Any] | Iterable[str] | None


def _as_mapping(words: Words, option: str) -> dict[str, Any]:
    """`{"messages": "dialogs"}`, `["messages=dialogs"]` and "messages=dialogs prompt=question" are the same."""
    if not words:
        return {}
    if isinstance(words, Mapping):
        return dict(words)
    pairs: dict[str, Any] = {}
    for item in words.split() if isinstance(words, str) else words:
        key, equals, value = item.partition("=")
        if not (key and equals and value):
            raise UsageError(f"--{option} takes WORD=COLUMN pairs, such as messages=dialogs; got {item!r}")
        pairs[key] = value
    return pairs


def read_layout_options(format: str = "auto", columns: Words = None, tags: Words = None) -> LayoutOptions:
    """Resolve the layout options of a pool.

    As in LLaMA-Factory, naming a layout's columns resets those that are not named: `prompt=question response=answer`
    means that there is no input column, even if the rows have one called `input`.

    Raises:
        UsageError: an unknown format or word, two words for one field, or a prompt without an answer.
    """
    format = FORMAT_ALIASES.get(format, format)
    if format not in FORMATS:
        raise UsageError(f"--format {format} is not known; choose one of {', '.join(FORMATS)}")
    words = {**_as_mapping(columns, "columns"), **_as_mapping(tags, "tags")}
    fields: dict[str, str] = {}
    other_columns: dict[str, str] = {}
    keys: dict[str, str] = {}
    roles = dict(ROLES)
    training_key: str | None = None
    trained: list[str] = []
    for word, value in words.items():
        if value is None:
            continue
        if word in _FIELD_WORDS:
            name = _FIELD_WORDS[word]
            target = other_columns if name in ("system", "tools", "id", "source") else fields
            if name in target:
                raise UsageError(f"--columns names the {name} column twice ({target[name]} and {value})")
            target[name] = _text(word, value)
        elif word in _KEY_WORDS:
            keys[_KEY_WORDS[word]] = _text(word, value)
        elif word in _ROLE_WORDS:
            roles[_text(word, value)] = _ROLE_WORDS[word]
        elif word == "message_property_mappings":
            keys.update({key: _text(word, value[key]) for key in ("role", "content") if key in value})
        elif word == "roles":
            for role, names in value.items():
                roles.update({name: ROLES.get(role, role) for name in ([names] if isinstance(names, str) else names)})
        elif word == "message_field_training":
            training_key = _text(word, value)
        elif word == "roles_to_train":
            trained = [value] if isinstance(value, str) else list(value)
        else:
            known = [*_FIELD_WORDS, *_KEY_WORDS, *_ROLE_WORDS, *_OTHER_WORDS]
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known words: {', '.join(known)}"
            raise UsageError(f"--columns/--tags: unknown word {word!r}{hint}")
    if any(roles.get(role) != "assistant" for role in trained):
        raise UsageError(f"--tags: roles_to_train is {trained}, but only the assistant's turns can be scored")
    if format == "prompt_completion" and "response" in fields:
        fields.setdefault("completion", fields.pop("response"))
    _check_complete(format, fields)
    return LayoutOptions(format, fields, other_columns, keys.get("role"), keys.get("content"), roles, training_key)


def _text(word: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"--columns/--tags: {word} must be the name of a column or role, not {value!r}")
    return value


def _check_complete(format: str, fields: Mapping[str, str]) -> None:
    answers = {"response", "completion"} & fields.keys()
    if "prompt" in fields and not answers:
        raise UsageError("--columns names a prompt column but no response or completion column; name both")
    if (answers or "query" in fields or "history" in fields) and "prompt" not in fields:
        raise UsageError("--columns names an answer or input column but no prompt column; name both")
    if len(answers) == 2:
        raise UsageError("--columns names both a response and a completion column; name one")
    if fields and format != "auto":
        needed = {name for name in LAYOUT_COLUMNS[format] if name not in ("query", "history")}
        if not needed <= fields.keys():
            raise UsageError(f"--format {format} needs the columns {', '.join(sorted(needed))}; --columns names "
                             f"{', '.join(fields)}")  # fmt: skip
