"""Which text of a row is embedded."""

import hashlib
from typing import Any

from fastsel.errors import UsageError
from fastsel.io.examples import Example
from fastsel.io.templates import SINGLE_TURN, SingleTurnTemplate

TEXTS = ("instruction", "answer", "conversation")
TEMPLATE = "template:"


class RowText:
    """The text of a row, by name.

        instruction           what the user and the system say; a flat row's instruction and input
        answer                what the assistant says
        conversation          all of it
        template:alpaca       the last prompt under a template (alpaca, none, wiz, vicuna) and the last answer; language
                              models see their end-of-text token behind it, as they do in training

    Parts are joined by line breaks.
    """

    def __init__(self, text: str) -> None:
        """Args: one of the names above.

        Raises:
            UsageError: there is no such text.
        """
        self.name = text
        self._template: SingleTurnTemplate | None = None
        if isinstance(text, str) and text.startswith(TEMPLATE):
            self._template = SINGLE_TURN.get(text.removeprefix(TEMPLATE))
        if text not in TEXTS and self._template is None:
            known = [*TEXTS, *(TEMPLATE + name for name in SINGLE_TURN)]
            raise UsageError(f"text={text!r} is not known; it is one of: {', '.join(known)}")

    @property
    def is_ended(self) -> bool:
        """Whether the text ends where a training example ends."""
        return self._template is not None

    def __call__(self, example: Example) -> str:
        """The text; "" when the row has none of that kind."""
        if self._template is not None:
            turn = self._template.turns(example)[-1]
            return turn.prompt + turn.answer
        wanted: Any = {
            "instruction": lambda role: role in ("system", "user"),
            "answer": lambda role: role == "assistant",
            "conversation": lambda role: True,
        }[self.name]
        return "\n".join(message.content for message in example.messages if wanted(message.role))


class JudgedText(RowText):
    """A conversation as a reward model reads it: under its chat template, or else its prompt and its answer as a pair.

    The parts of a pair are joined by the tokenizer's separator, or by a line break where it has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Args: the reward model's tokenizer."""
        template = getattr(tokenizer, "chat_template", None)
        self._tokenizer = tokenizer if template else None
        self._separator = getattr(tokenizer, "sep_token", None) or "\n"
        digest = hashlib.sha256(str(template).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self.name = f"conversation under the chat template {digest}" if template else "prompt and answer as a pair"
        self._template = None

    def __call__(self, example: Example) -> str:
        """The text; "" when the template cannot render the conversation."""
        if self._tokenizer is None:
            prompt = "\n".join(message.content for message in example.messages[:-1])
            return prompt + self._separator + example.messages[-1].content
        turns = [{"role": message.role, "content": message.content} for message in example.messages]
        try:
            rendered = str(self._tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception:  # noqa: BLE001  a template raises whatever it likes
            return ""
        start = str(self._tokenizer.bos_token or "")  # the tokenizer puts it there itself
        return rendered.removeprefix(start)


def whole_text(example: Example) -> str:
    """All that is said in a row: what its tokens are counted from."""
    return "\n".join(message.content for message in example.messages)
