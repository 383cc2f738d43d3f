"""Which text of a row is embedded."""

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


def whole_text(example: Example) -> str:
    """All that is said in a row: what its tokens are counted from."""
    return "\n".join(message.content for message in example.messages)
