"""Templates whose text holds special tokens: Tulu's, and Jinja chat templates.

The strings of special tokens that a row's own text contains are guarded, so that only the template's become tokens.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from fastsel.io.examples import Example, Message
from fastsel.io.templates import GUARD, Template, Turn, UnfitConversationError


class MarkedTemplate(Template):
    """Base of both: knows the tokenizer's special tokens and guards their strings in a row."""

    has_marks = True

    def __init__(self, id: str, source: str, tokenizer: Any) -> None:
        super().__init__(id, source)
        self.bos: str = tokenizer.bos_token or ""
        self.eos: str = tokenizer.eos_token or ""
        marks = {str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._marks = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True)))) if marks else None

    def _guarded(self, messages: Sequence[Message]) -> list[Message]:
        return [Message(message.role, self._guard(message.content)) for message in messages]

    def _guard(self, text: str) -> str:
        if self._marks is None:
            return text
        return self._marks.sub(lambda found: found.group()[0] + GUARD + found.group()[1:], text)


class TuluTemplate(MarkedTemplate):
    """`<|user|>`, `<|assistant|>`, `<|system|>` lines; an answer ends in the tokenizer's end of text (LESS, Tulu)."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__("tulu", "<|role|>\n{content}\n<|assistant|>\n{content}{eos}\n", tokenizer)

    def turns(self, example: Example) -> list[Turn]:
        """See Template.turns."""
        text, turns, header = "", [], "<|assistant|>\n"
        for message in self._guarded(example.messages):
            content = message.content.strip()
            if message.role == "assistant":
                prompt = text + header if text else ""
                turns.append(Turn(prompt, header if text else "", content + self.eos))
                text += header + content + self.eos + "\n"
            else:
                text += f"<|{message.role}|>\n{content}\n"
        return turns


class LessTemplate(TuluTemplate):
    """Tulu's lines as LESS trains on them: its start token comes first, and the newline after an answer is learnt.

    Target rows (`less_target`) end in their answer: no end of text.
    """

    def __init__(self, tokenizer: Any, *, is_target: bool = False) -> None:
        """Args: is_target: of target rows."""
        super().__init__(tokenizer)
        self.id = "less_target" if is_target else "less"
        self._start = _text_in_front(tokenizer)
        self._end = "" if is_target else self.eos + "\n"
        self.sha256 = hashlib.sha256(f"{self.id} {self.sha256} {self._start!r}".encode()).hexdigest()

    def turns(self, example: Example) -> list[Turn]:
        """See Template.turns."""
        turns = []
        for turn in super().turns(example):
            answer = turn.answer[: len(turn.answer) - len(self.eos)] + self._end
            turns.append(Turn(self._start + turn.prompt if turn.prompt else "", turn.header, answer))
        return turns


def _text_in_front(tokenizer: Any) -> str:
    """What the tokenizer puts before a text, as a string: Llama's <s>, nothing for GPT-2."""
    bare, full = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    count = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return "".join(tokenizer.convert_ids_to_tokens(full[:count]))


class ChatTemplate(MarkedTemplate):
    """A Jinja chat template.

    The answer's place is taken from `{% generation %}` where the template has it; otherwise each assistant turn is
    rendered with and without the answer, and refused when the one is not the beginning of the other.
    """

    def __init__(self, id: str, source: str, tokenizer: Any) -> None:
        super().__init__(id, source, tokenizer)
        self._source, self._tokenizer = source, tokenizer
        self._says_where = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None

    def turns(self, example: Example) -> list[Turn]:
        """See Template.turns."""
        messages = self._guarded(example.messages)
        tools = _tool_list(example.tools)
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        is_text = answers == [0] and len(messages) == 1  # no chat template renders an answer to nothing
        spans = self._generation_spans(messages, tools, len(answers)) if self._says_where and not is_text else None
        turns = []
        for number, i in enumerate(answers):
            if i == 0:
                turns.append(Turn("", "", messages[0].content))
                continue
            opened = self._render(messages[:i], tools, True)
            if spans is not None:
                rendered, places = spans
                start, stop = places[number]
                prompt, answer = rendered[:start], rendered[start:stop]
            else:
                whole = self._render(messages[: i + 1], tools, False)
                if not whole.startswith(opened):
                    raise UnfitConversationError(f"assistant turn {number + 1} does not follow its generation prompt")
                prompt, answer = opened, whole[len(opened) :]
            turns.append(Turn(prompt, self._header(messages[:i], tools, opened), answer))
        return turns

    def _header(self, before: list[Message], tools: list[Any] | None, opened: str) -> str:
        closed = self._render(before, tools, False)
        header = opened[len(closed) :] if opened.startswith(closed) else ""
        if self.bos and opened.startswith(self.bos) and not header.startswith(self.bos):
            header = self.bos + header
        return header

    def _render(self, messages: list[Message], tools: list[Any] | None, open_answer: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [message._asdict() for message in messages],
                    tools=tools,
                    chat_template=self._source,
                    tokenize=False,
                    add_generation_prompt=open_answer,
                )
            )
        except Exception as error:  # a template may raise anything: its own message is the reason
            raise UnfitConversationError(f"the chat template refuses it: {error}") from error

    def _generation_spans(
        self, messages: list[Message], tools: list[Any] | None, n_answers: int
    ) -> tuple[str, list[tuple[int, int]]] | None:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, places = render_jinja_template(
                conversations=[[message._asdict() for message in messages]],
                tools=tools,
                chat_template=self._source,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise UnfitConversationError(f"the chat template refuses it: {error}") from error
        spans = [(int(start), int(stop)) for start, stop in places[0]]
        if len(spans) != n_answers or any(start >= stop for start, stop in spans):
            return None  # the mask is empty or of other turns: render by prefix
        return rendered[0], spans


def _tool_list(tools: str | None) -> list[Any] | None:
    if not tools:
        return None
    try:
        value = json.loads(tools)
    except ValueError:
        return None
    return value if isinstance(value, list) and all(isinstance(tool, dict) for tool in value) else None


def training_template(tokenizer: Any) -> str | None:
    """The tokenizer's template; TRL's version of it, which marks the answers, where TRL is there and has one."""
    source: str | None = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if source is None or re.search(r"\{%-?\s*generation\s*-?%\}", source):
        return source
    try:
        trl = import_module("trl.chat_template_utils")
    except ImportError:
        return source
    try:
        marked: str | None = trl.get_training_chat_template(tokenizer)
    except ValueError:  # TRL knows a few templates only
        return source
    return marked or source
