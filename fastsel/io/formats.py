"""From a row of any known layout to an Example: detection per row, roles, answers, and a reason for rows without use.

A row is tried as a conversation first (`messages`, `conversations`, `dialogs`), then as a flat row (`instruction` and
`output`, `prompt` and `completion`, `text`). A conversation may be of any length and may repeat a role; it must end
with a message of the assistant that is not blank, and have a user or tool message in it. Nothing is repaired: what
does not fit is reported with a reason.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from fastsel.io.examples import Example, Message, well_formed
from fastsel.io.layout_options import LAYOUT_COLUMNS, LayoutOptions

_SCORE_STRUCTS = ("processed_scores", "raw_scores", "Q_scores", "QA_scores")
_PROMPT_WORDS = ("instruction", "prompt", "question", "query", "problem", "user", "input")
_ANSWER_WORDS = ("output", "completion", "response", "answer", "solution", "target", "assistant")
_Fields = Mapping[str, str]


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


class RowReader:
    """Turns the rows of one pool into Examples; made once from the layout options."""

    def __init__(self, options: LayoutOptions | None = None) -> None:
        """Work out which layouts to try, in order, and where their fields are."""
        options = options or LayoutOptions()
        self._options = options
        self._roles = options.roles
        self._system = options.columns.get("system", "system")
        self._tools = options.columns.get("tools", "tools")
        self._id = options.columns.get("id", "id")
        # Tulu's files call the source "dataset".
        self._sources = (options.columns["source"],) if "source" in options.columns else ("source", "dataset")
        self._conversations: list[tuple[str, str]] = []
        self._flat: list[tuple[str, _Fields]] = []
        for layout, fields in _layouts(options):
            if "messages" in fields:
                self._conversations.append((layout, fields["messages"]))
            else:
                self._flat.append((layout, fields))

    def read(self, row: object, row_id: int) -> Example:
        """The Example of a row.

        Raises:
            UnusableRow: with the reason, without a line number (the caller knows the line).
        """
        if not isinstance(row, Mapping):
            raise UnusableRow(f"the row is {_kind(row)}, not an object", recognised=False)
        problem: UnusableRow | None = None
        for layout, column in self._conversations:
            turns = lookup(row, column)
            if turns is None:
                continue
            try:
                return self._conversation(row, row_id, layout, turns, column)
            except UnusableRow as unusable:
                problem = problem or unusable
        found: list[Example] = []
        for layout, fields in self._flat:
            if found and layout == "text":  # Alpaca's own files repeat the row as rendered text
                break
            try:
                example = self._flat_row(row, row_id, layout, fields)
            except UnusableRow as unusable:
                problem = problem or unusable
                continue
            if example is not None:
                found.append(example)
        if len(found) == 1:
            return found[0]
        if found:
            both = " and as ".join(example.layout for example in found)
            raise AmbiguousRow(f"the row can be read as {both}; say which with --format", recognised=False)
        raise problem or UnusableRow(f"no known layout: the row's keys are {_listed(row)}", recognised=False)

    def id_and_source(self, row: object) -> tuple[str | None, str | None]:
        """The row's own id and source, which rows that cannot be used may have too."""
        if not isinstance(row, Mapping):
            return None, None
        source = None
        for column in self._sources:
            source = _label(lookup(row, column))
            if source is not None:
                break
        return _label(lookup(row, self._id)), source

    # -- conversations ------------------------------------------------------------------------------------------------

    def _conversation(self, row: Mapping[str, Any], row_id: int, layout: str, turns: object, column: str) -> Example:
        messages = self._messages(turns, column)
        training_key = self._options.training_key
        trained: tuple[int, ...] | None = None
        if training_key is not None:
            marks = [bool(turn.get(training_key, True)) for turn in turns]  # type: ignore[attr-defined]
            trained = tuple(
                i
                for i, (mark, turn) in enumerate(zip(marks, messages, strict=True))
                if mark and turn.role == "assistant"
            )
            if not trained:
                raise UnusableRow(f"no message of the assistant has {training_key}: true")
        system = self._optional_text(row, self._system)
        if system and messages[0].role != "system":
            messages.insert(0, Message("system", system))
            trained = None if trained is None else tuple(i + 1 for i in trained)
        _check_answer(messages, column)
        return self._example(row, row_id, layout, messages, trained=trained)

    def _messages(self, turns: object, column: str) -> list[Message]:
        if not isinstance(turns, (list, tuple)):
            raise UnusableRow(f"{column} is {_kind(turns)}, not a list of messages")
        if not turns:
            raise UnusableRow(f"{column} is an empty list")
        role_key, content_key, roles = self._options.role_key, self._options.content_key, self._roles
        messages = []
        for position, turn in enumerate(turns):
            if not isinstance(turn, Mapping):
                raise UnusableRow(f"{column}[{position}] is {_kind(turn)}, not a message with a role and a content")
            # Parquet gives every message all keys of the column, so a key counts when it is not null.
            role_at = role_key or ("role" if turn.get("role") is not None else "from")
            content_at = content_key or ("value" if "value" in turn and turn.get("content") is None else "content")
            word, content = turn.get(role_at), turn.get(content_at)
            if not isinstance(word, str):
                raise UnusableRow(f"{column}[{position}] has no role (its {role_key or 'role'} is {_kind(word)})")
            role = roles.get(word) or roles.get(word.lower())
            if role is None:
                raise UnusableRow(f"{column}[{position}] has the unknown role {word[:40]!r}; name it with --tags")
            if type(content) is not str:
                content = _content(turn, content, f"{column}[{position}].{content_at}")
            elif not content and (turn.get("tool_calls") or turn.get("function_call")):
                content = _content(turn, None, f"{column}[{position}].{content_at}")
            messages.append(Message(role, well_formed(content)))
        return messages

    # -- flat rows ----------------------------------------------------------------------------------------------------

    def _flat_row(self, row: Mapping[str, Any], row_id: int, layout: str, fields: _Fields) -> Example | None:
        """The example, or None when the row does not have this layout's columns."""
        if layout == "text":
            text = lookup(row, fields["text"])
            if text is None:
                return None
            answer = _answer(text, fields["text"])
            return self._example(row, row_id, layout, [Message("assistant", answer)])
        prompt_at, answer_at = fields["prompt"], fields["completion" if layout == "prompt_completion" else "response"]
        prompt, answer = lookup(row, prompt_at), lookup(row, answer_at)
        if prompt is None and answer is None:
            return None
        if answer is None and answer_at not in row and not self._options.fields:
            return None  # half a layout is not that layout: {"prompt", "chosen"} is not prompt and completion
        if layout == "prompt_completion":
            return self._prompt_completion(row, row_id, prompt, answer, fields)
        if layout == "alpaca" and any(isinstance(row.get(name), Mapping) for name in _SCORE_STRUCTS):
            layout = "oda"
        if prompt is None and answer is not None and prompt_at not in row:
            return None
        answer = _answer(answer, answer_at)
        instruction = well_formed(_string(prompt, prompt_at))
        input = well_formed(self._optional_text(row, fields["query"]) or "") if "query" in fields else ""
        messages = self._history(row, fields)
        system = self._optional_text(row, self._system)
        if system:
            messages.insert(0, Message("system", well_formed(system)))
        messages.append(Message("user", f"{instruction}\n{input}" if input else instruction))
        messages.append(Message("assistant", answer))
        return self._example(row, row_id, layout, messages, instruction, input)

    def _prompt_completion(
        self, row: Mapping[str, Any], row_id: int, prompt: object, completion: object, fields: _Fields
    ) -> Example:
        prompt_at, completion_at = fields["prompt"], fields["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            messages = self._messages(prompt, prompt_at) + self._messages(completion, completion_at)
            first_answer = len(prompt)
            if any(turn.role != "assistant" for turn in messages[first_answer:] if turn.role != "tool"):
                raise UnusableRow(f"{completion_at} holds messages that are not the assistant's")
            _check_answer(messages, completion_at)
            trained = None
            if any(turn.role == "assistant" for turn in messages[:first_answer]):  # only the completion is trained on
                trained = tuple(i for i in range(first_answer, len(messages)) if messages[i].role == "assistant")
            return self._example(row, row_id, "prompt_completion", messages, trained=trained)
        if isinstance(prompt, list) or isinstance(completion, list):
            raise UnusableRow(f"{prompt_at} and {completion_at} must both be text or both be lists of messages")
        answer = _answer(completion, completion_at)
        instruction = well_formed(_string(prompt, prompt_at))
        messages = [Message("user", instruction), Message("assistant", answer)]
        system = self._optional_text(row, self._system)
        if system:
            messages.insert(0, Message("system", well_formed(system)))
        return self._example(row, row_id, "prompt_completion", messages, instruction, "")

    def _history(self, row: Mapping[str, Any], fields: _Fields) -> list[Message]:
        column = fields.get("history")
        pairs = lookup(row, column) if column else None
        if pairs is None:
            return []
        if not isinstance(pairs, list):
            raise UnusableRow(f"{column} is {_kind(pairs)}, not a list of pairs")
        messages = []
        for position, pair in enumerate(pairs):
            if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(turn, str) for turn in pair)):
                raise UnusableRow(f"{column}[{position}] is not a pair of question and answer")
            messages.append(Message("user", well_formed(pair[0])))
            messages.append(Message("assistant", well_formed(pair[1])))
        return messages

    # -- both ---------------------------------------------------------------------------------------------------------

    def _optional_text(self, row: Mapping[str, Any], column: str) -> str | None:
        value = lookup(row, column)
        return None if value is None else _string(value, column)

    def _example(
        self,
        row: Mapping[str, Any],
        row_id: int,
        layout: str,
        messages: list[Message],
        instruction: str | None = None,
        input: str | None = None,
        trained: tuple[int, ...] | None = None,
    ) -> Example:
        own_id, source = self.id_and_source(row)
        tools = lookup(row, self._tools)
        if tools is not None and not isinstance(tools, str):
            tools = json.dumps(tools, ensure_ascii=False, default=str) if tools else None
        tools = well_formed(tools) if tools else None
        return Example(row_id, "ok", None, own_id, source, layout, tuple(messages), instruction, input, tools, trained)


def first_keys(row: object) -> str:
    """The keys of the first row, for a message."""
    return f"the first row's keys are {_listed(row)}" if isinstance(row, Mapping) else f"the first row is {_kind(row)}"


def unknown_layout(row: object) -> str:
    """What to tell a user none of whose rows could be read: the first row's keys and the nearest layout."""
    if not isinstance(row, Mapping):
        return f"the first row is {_kind(row)}, not an object with named fields"
    keys = [str(key) for key in row]
    text = first_keys(row) + "; "
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


def _layouts(options: LayoutOptions) -> Iterable[tuple[str, _Fields]]:
    """Layouts to try, in order, each with its fields and their columns."""
    named = options.fields
    if options.format != "auto":
        yield options.format, named or LAYOUT_COLUMNS[options.format]
    elif not named:
        for layout in ("messages", "sharegpt", "mig", "alpaca", "prompt_completion", "text"):
            yield layout, LAYOUT_COLUMNS[layout]
    else:
        if "messages" in named:
            yield "messages", {"messages": named["messages"]}
        flat = {name: column for name, column in named.items() if name not in ("messages", "text")}
        if "prompt" in named:
            yield "prompt_completion" if "completion" in named else "alpaca", flat
        if "text" in named:
            yield "text", {"text": named["text"]}


def _check_answer(messages: list[Message], column: str) -> None:
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
            kind = part.get("type", "text") if isinstance(part, Mapping) else _kind(part)
            if kind != "text" or not isinstance(part.get("text"), str):
                raise UnusableRow(f"{where} has a part of type {kind}; only text can be scored")
            texts.append(part["text"])
        return "".join(texts)
    raise UnusableRow(f"{where} is {_kind(content)}, not text")


def _answer(value: object, column: str) -> str:
    text = _string(value, column, "the answer ")
    if not text or text.isspace():
        raise UnusableRow(f"the answer ({column}) is {'only white space' if text else 'empty'}")
    return well_formed(text)


def _string(value: object, column: str, what: str = "") -> str:
    if not isinstance(value, str):
        name = f"{what}({column})" if what else column
        raise UnusableRow(f"{name} is {_kind(value)}, not text")
    return value


def _label(value: object) -> str | None:
    """An id or source as text; lists, objects, booleans and NaN are none."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return None
    return str(value)


def _kind(value: object) -> str:
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


def _listed(row: Mapping[str, Any]) -> str:
    keys = [str(key)[:40] for key in row]
    return ", ".join(keys[:12]) + (f" and {len(keys) - 12} more" if len(keys) > 12 else "") if keys else "none"


def _nearness(keys: list[str], columns: Iterable[str]) -> float:
    return max(
        (difflib.SequenceMatcher(None, key.lower(), name).ratio() for key in keys for name in columns), default=0
    )
