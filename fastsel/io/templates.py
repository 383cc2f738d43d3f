"""Prompt templates: from one example to the text before each assistant turn, and the text of the turn.

A paper's method is defined with the paper's template, so that is each method's default; the tokenizer's chat template
must be asked for. The id and the sha256 of whatever decides the text go into the manifest.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from fastsel.errors import InputError, UsageError
from fastsel.io.examples import Example, Message

# Stands inside a special-token string that a row's own text contains, so that only the template's marks become tokens.
# A noncharacter: Unicode keeps it out of text that is exchanged.
GUARD = "\ufdd0"


class Turn(NamedTuple):
    """One assistant turn.

    Attributes:
        prompt: all text before the answer; "" when nothing comes before it.
        header: what stays before the answer when the instruction is taken away ("### Response:").
        answer: the text that is scored.
    """

    prompt: str
    header: str
    answer: str


class UnfitConversationError(ValueError):
    """The template cannot say which part of this conversation is the answer."""


class Template:
    """Base of the templates.

    Attributes:
        id: the name that goes into the manifest.
        sha256: of the text that decides the result.
        has_marks: special-token strings of the template are special tokens, start of text included; otherwise all
            text is plain and the tokenizer's own start tokens go in front.
    """

    has_marks = False

    def __init__(self, id: str, source: str) -> None:
        self.id = id
        self.sha256 = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()

    def turns(self, example: Example) -> list[Turn]:
        """One Turn for each assistant message, in order.

        Raises:
            UnfitConversationError: the template cannot render this conversation turn by turn.
        """
        raise NotImplementedError


class SingleTurnTemplate(Template):
    """A template with one place for an instruction; earlier turns go in front of it as `Role: text` lines."""

    def __init__(self, id: str, prompt: str, prompt_with_input: str | None, header: str) -> None:
        """Args: texts with `{instruction}` and `{input}`; without prompt_with_input the two are joined by a newline."""
        super().__init__(id, json.dumps([prompt, prompt_with_input, header]))
        self.prompt, self.prompt_with_input, self.header = prompt, prompt_with_input, header

    def turns(self, example: Example) -> list[Turn]:
        """See Template.turns."""
        messages = example.messages
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        return [self._turn(example, messages[:i], messages[i].content, i == answers[-1]) for i in answers]

    def _turn(self, example: Example, before: Sequence[Message], answer: str, is_last: bool) -> Turn:
        if not before:
            return Turn("", "", answer)
        instruction, extra = "", ""
        earlier = list(before)
        if earlier[-1].role == "user":
            instruction = earlier.pop().content
            if is_last and example.instruction is not None:  # a flat row: its two parts are known
                instruction, extra = example.instruction, example.input or ""
        lines = [f"{message.role.capitalize()}: {message.content}" for message in earlier]
        if example.tools:
            lines.insert(0, f"Tools: {example.tools}")
        if lines:
            instruction = "\n".join([*lines, instruction] if instruction else lines)
        if extra and self.prompt_with_input is None:
            instruction, extra = f"{instruction}\n{extra}", ""
        form = self.prompt_with_input if extra and self.prompt_with_input is not None else self.prompt
        return Turn(_fill(form, instruction, extra), self.header, answer)


def _fill(form: str, instruction: str, extra: str) -> str:
    """Both fields in one sweep: braces in a row's text are text, and a row may hold the string "{input}"."""
    values = {"{instruction}": instruction, "{input}": extra}
    return re.sub(r"\{instruction\}|\{input\}", lambda found: values[found.group()], form)


ALPACA = SingleTurnTemplate(  # tatsu-lab/stanford_alpaca, train.py
    "alpaca",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    "### Response:",
)
NONE = SingleTurnTemplate("none", "{instruction}\n", "{instruction}\n{input}\n", "")  # Superfiltering, section 3
WIZARD = SingleTurnTemplate(
    "wiz", "{instruction}\n\n### Response:", "{instruction}\nInput:{input}\n\n### Response:", "### Response:"
)
VICUNA = SingleTurnTemplate(  # lm-sys/FastChat, conversation template vicuna_v1.1
    "vicuna",
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {instruction} ASSISTANT:",
    None,
    "ASSISTANT:",
)
SINGLE_TURN = {template.id: template for template in (ALPACA, NONE, WIZARD, VICUNA)}


class _MarkedTemplate(Template):
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


class TuluTemplate(_MarkedTemplate):
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


class ChatTemplate(_MarkedTemplate):
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
        if answers and answers[0] == 0:  # nothing comes before it: plain text, which no chat template renders
            return [Turn("", "", messages[0].content)]
        spans = self._generation_spans(messages, tools, len(answers)) if self._says_where else None
        turns = []
        for number, i in enumerate(answers):
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


def load_template(name: str | Path | Template, tokenizer: Any = None) -> Template:
    """The template of this name.

    Args:
        name: "alpaca", "none" (Superfiltering: the instruction and a newline), "wiz", "vicuna", "tulu", "tokenizer"
            (the tokenizer's chat template), "auto" (the tokenizer's, or alpaca where it has none), a `.jinja` file
            with a chat template, or a `.yaml` or `.json` file with `prompt`, and optionally `prompt_with_input` and
            `header`, texts that hold `{instruction}` and `{input}`.
        tokenizer: needed by tulu, tokenizer, auto and `.jinja` files.

    Raises:
        UsageError: no such name, or a tokenizer is needed.
        InputError: the file or the tokenizer holds no usable template.
    """
    if isinstance(name, Template):
        return name
    key = str(name)
    if key in SINGLE_TURN:
        return SINGLE_TURN[key]
    if key in ("tulu", "tokenizer", "auto") or key.endswith(".jinja"):
        if tokenizer is None:
            raise UsageError(f"the template {key!r} needs a model's tokenizer")
        if key == "tulu":
            return TuluTemplate(tokenizer)
        if key.endswith(".jinja"):
            return ChatTemplate(Path(key).name, _read(Path(key)), tokenizer)
        source = _training_template(tokenizer)
        if source is None and key == "auto":
            return ALPACA
        if source is None:
            raise InputError("the tokenizer has no chat template; name one: " + ", ".join([*SINGLE_TURN, "tulu"]))
        return ChatTemplate("tokenizer", source, tokenizer)
    if key.endswith((".yaml", ".yml", ".json")):
        return _from_file(Path(key))
    raise UsageError(
        f"template={key!r} is not known; it is one of: {', '.join(SINGLE_TURN)}, tulu, tokenizer, auto, "
        "or a .jinja, .yaml or .json file"
    )


def _training_template(tokenizer: Any) -> str | None:
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


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the template {path} cannot be read: {error}") from error


def _from_file(path: Path) -> SingleTurnTemplate:
    import yaml

    try:
        parts = yaml.safe_load(_read(path))
    except yaml.YAMLError as error:
        raise InputError(f"the template {path} is not valid YAML: {error}") from error
    known = {"prompt", "prompt_with_input", "header"}
    if not isinstance(parts, dict) or not set(parts) <= known or not all(isinstance(v, str) for v in parts.values()):
        raise InputError(f"the template {path} must hold only the texts {', '.join(sorted(known))}")
    prompt, with_input, header = parts.get("prompt", ""), parts.get("prompt_with_input"), parts.get("header", "")
    if "{instruction}" not in prompt:
        raise InputError(f"the template {path}: `prompt` must hold {{instruction}}")
    if with_input is not None and not ("{instruction}" in with_input and "{input}" in with_input):
        raise InputError(f"the template {path}: `prompt_with_input` must hold {{instruction}} and {{input}}")
    if not all(form.endswith(header) for form in (prompt, with_input or prompt)):
        raise InputError(f"the template {path}: each prompt must end in the header {header!r}")
    return SingleTurnTemplate(path.name, prompt, with_input, header)
