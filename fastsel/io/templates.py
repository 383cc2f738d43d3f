"""Prompt templates: from one example to the text before each assistant turn, and the text of the turn.

A paper's method is defined with the paper's template, so that is each method's default; the tokenizer's chat template
must be asked for. The id and the sha256 of whatever decides the text go into the manifest.
"""

import hashlib
import json
import re
from collections.abc import Sequence
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


def load_template(name: str | Path | Template, tokenizer: Any = None) -> Template:
    """The template of this name.

    Args:
        name: "alpaca", "none" (Superfiltering: the instruction and a newline), "wiz", "vicuna", "tulu", "less" and
            "less_target" (Tulu's as LESS trains on it, and as it asks), "tokenizer" (the tokenizer's chat template),
            "auto" (the tokenizer's, or alpaca where it has none), a `.jinja` file with a chat template, or a `.yaml`
            or `.json` file with `prompt`, and optionally `prompt_with_input` and `header`, texts that hold
            `{instruction}` and `{input}`.
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
    if key in ("tulu", "less", "less_target", "tokenizer", "auto") or key.endswith(".jinja"):
        if tokenizer is None:
            raise UsageError(f"the template {key!r} needs a model's tokenizer")
        from fastsel.io.chat_templates import ChatTemplate, LessTemplate, TuluTemplate, training_template

        if key == "tulu":
            return TuluTemplate(tokenizer)
        if key in ("less", "less_target"):
            return LessTemplate(tokenizer, is_target=key == "less_target")
        if key.endswith(".jinja"):
            return ChatTemplate(Path(key).name, _read(Path(key)), tokenizer)
        source = training_template(tokenizer)
        if source is None and key == "auto":
            return ALPACA
        if source is None:
            raise InputError("the tokenizer has no chat template; name one: " + ", ".join([*SINGLE_TURN, "tulu"]))
        return ChatTemplate("tokenizer", source, tokenizer)
    if key.endswith((".yaml", ".yml", ".json")):
        return _from_file(Path(key))
    raise UsageError(
        f"template={key!r} is not known; it is one of: {', '.join(SINGLE_TURN)}, tulu, less, less_target, tokenizer, "
        "auto, or a .jinja, .yaml or .json file"
    )


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
