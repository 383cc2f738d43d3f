"""Rows as training sees them: a prompt, and an answer whose tokens and end of text are learnt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastsel.features.answer_tokens import CONDITIONED, FITS, NO_ANSWER, AnswerTokenizer, ScoredSequence
from fastsel.io.examples import Example
from fastsel.io.templates import Template


@dataclass(frozen=True)
class TrainingRow:
    """One row.

    Attributes:
        row_id: pool row number.
        n_tokens: of the row under the template, not cut.
        why: position in answer_tokens.REASONS.
        sequences: token ids and the positions of the labelled ones, from 1 on; none when nothing can be learnt. All
            turns of a conversation are one sequence where its text under the template allows it.
    """

    row_id: int
    n_tokens: int
    why: int
    sequences: list[tuple[list[int], list[int]]]

    @property
    def size(self) -> int:
        """Tokens that a model processes."""
        return sum(len(ids) for ids, _ in self.sequences)


class TrainingTokenizer:
    """Tokenises rows for training, or for the gradients of training."""

    def __init__(
        self, tokenizer: Any, template: Template, *, max_length: int, overflow: str = "truncate", turns: str = "all"
    ) -> None:
        """Prepare to tokenise.

        Args:
            tokenizer, template, max_length, overflow, turns: see AnswerTokenizer. Templates with marks end an answer
                themselves; after the answers of the others, unless they are cut, comes the tokenizer's end of text.
        """
        self._tokenise = AnswerTokenizer(
            tokenizer, template, passes=(CONDITIONED,), max_length=max_length, overflow=overflow, turns=turns
        )
        end = tokenizer.eos_token_id
        self._end = [] if template.has_marks or end is None else [int(end)]
        self._max_length = max_length

    def __call__(self, examples: Sequence[Example]) -> list[TrainingRow]:
        """One for each usable example, in order.

        Raises:
            InputError: a row is longer than max_length and overflow is "error".
        """
        found = []
        for row in self._tokenise(examples):
            sequences = _joined([self._labelled(s) for s in row.sequences])
            is_empty = row.why == FITS and not sequences
            found.append(TrainingRow(row.row_id, row.n_tokens, NO_ANSWER if is_empty else row.why, sequences))
        return found

    def _labelled(self, sequence: ScoredSequence) -> tuple[list[int], list[int]]:
        ids = list(sequence.ids)
        if len(ids) + len(self._end) <= self._max_length:
            ids += self._end
        return ids, list(range(max(1, sequence.first), len(ids)))


def _joined(sequences: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    """A sequence that another begins with gives its labels to that one."""
    joined: list[tuple[list[int], list[int]]] = []
    for ids, labelled in sequences:  # of one conversation: each turn is longer than the one before
        if joined and ids[: len(joined[-1][0])] == joined[-1][0]:
            labelled = joined.pop()[1] + labelled
        joined.append((ids, labelled))
    return joined
