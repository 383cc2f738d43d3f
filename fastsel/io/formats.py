"""From a row of any known layout to an Example: detection per row, roles, answers, and a reason for rows without use.

A row is tried as a conversation first (`messages`, `conversations`, `dialogs`), then as a flat row (`instruction` and
`output`, `prompt` and `completion`, `text`). A conversation may be of any length and may repeat a role; it must end
with a message of the assistant that is not blank, and have a user or tool message in it. Nothing is repaired: what
does not fit is reported with a reason.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from fastsel.io.conversations import check_answer, read_messages
from fastsel.io.examples import Example, Message, well_formed
from fastsel.io.layout_hints import listed_keys
from fastsel.io.layout_options import LAYOUT_COLUMNS, LayoutOptions
from fastsel.io.row_values import AmbiguousRow, UnusableRow, answer_text, kind_of, label_of, lookup, text_of

_SCORE_STRUCTS = frozenset(("processed_scores", "raw_scores", "Q_scores", "QA_scores"))
_Fields = Mapping[str, str]


class RowReader:
    """Turns the rows of one pool into Examples; made once from the layout options."""

    def __init__(self, options: LayoutOptions | None = None) -> None:
        """Work out which layouts to try, in order, and where their fields are."""
        options = options or LayoutOptions()
        self._options = options
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
            raise UnusableRow(f"the row is {kind_of(row)}, not an object", recognised=False)
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
            if layout == "text" and (found or problem):  # Alpaca's own files repeat the row as rendered text
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
        raise problem or UnusableRow(f"no known layout: the row's keys are {listed_keys(row)}", recognised=False)

    def id_and_source(self, row: object) -> tuple[str | None, str | None]:
        """The row's own id and source, which rows that cannot be used may have too."""
        if not isinstance(row, Mapping):
            return None, None
        source = None
        for column in self._sources:
            source = label_of(lookup(row, column))
            if source is not None:
                break
        return label_of(lookup(row, self._id)), source

    # -- conversations ------------------------------------------------------------------------------------------------

    def _conversation(self, row: Mapping[str, Any], row_id: int, layout: str, turns: object, column: str) -> Example:
        messages = read_messages(turns, column, self._options)
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
            messages.insert(0, Message("system", well_formed(system)))
            trained = None if trained is None else tuple(i + 1 for i in trained)
        check_answer(messages, column)
        return self._example(row, row_id, layout, messages, trained=trained)

    # -- flat rows ----------------------------------------------------------------------------------------------------

    def _flat_row(self, row: Mapping[str, Any], row_id: int, layout: str, fields: _Fields) -> Example | None:
        """The example, or None when the row does not have this layout's columns."""
        if layout == "text":
            text = lookup(row, fields["text"])
            if text is None:
                return None
            answer = answer_text(text, fields["text"])
            return self._example(row, row_id, layout, [Message("assistant", answer)])
        prompt_at, answer_at = fields["prompt"], fields["completion" if layout == "prompt_completion" else "response"]
        prompt, answer = lookup(row, prompt_at), lookup(row, answer_at)
        if prompt is None and answer is None:
            return None
        if (answer is None and answer_at not in row) or (prompt is None and prompt_at not in row):
            return None  # half a layout is not that layout: {"prompt", "chosen"} is not prompt and completion
        if layout == "prompt_completion":
            return self._prompt_completion(row, row_id, prompt, answer, fields)
        if layout == "alpaca" and not _SCORE_STRUCTS.isdisjoint(row):
            layout = "oda"
        answer = answer_text(answer, answer_at)
        instruction = well_formed(text_of(prompt, prompt_at))
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
            messages = read_messages(prompt, prompt_at, self._options) + read_messages(
                completion, completion_at, self._options
            )
            first_answer = len(prompt)
            if any(turn.role != "assistant" for turn in messages[first_answer:] if turn.role != "tool"):
                raise UnusableRow(f"{completion_at} holds messages that are not the assistant's")
            check_answer(messages, completion_at)
            trained = None
            if any(turn.role == "assistant" for turn in messages[:first_answer]):  # only the completion is trained on
                trained = tuple(i for i in range(first_answer, len(messages)) if messages[i].role == "assistant")
            return self._example(row, row_id, "prompt_completion", messages, trained=trained)
        if isinstance(prompt, list) or isinstance(completion, list):
            raise UnusableRow(f"{prompt_at} and {completion_at} must both be text or both be lists of messages")
        answer = answer_text(completion, completion_at)
        instruction = well_formed(text_of(prompt, prompt_at))
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
            raise UnusableRow(f"{column} is {kind_of(pairs)}, not a list of pairs")
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
        return None if value is None else text_of(value, column)

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
