"""One tokenised view of each row: what a pass feeds to the model, and which of its tokens are scored.

The rule "shared" is ours: both passes score the same token ids, whatever stands before them. The other rules do what
the authors' released code does, so that its numbers can be reproduced.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastsel.errors import InputError
from fastsel.io.examples import OK, STATUS, Example
from fastsel.io.templates import GUARD, Template, Turn, UnfitConversationError

CONDITIONED, DIRECT = "conditioned", "direct"
OVERFLOW = ("truncate", "skip", "error")
TURNS = ("all", "last")
# Why a row is not ok; position 0 says that it is. A store keeps the position.
REASONS = (
    None,
    "the prompt fills max_length={max_length} and leaves no answer token",
    "the answer is cut at max_length={max_length}",
    "longer than max_length={max_length}",
    "no answer token is left to score",
    "the chat template cannot render this conversation turn by turn",
    "nothing comes before the answer, so there is nothing to compare it with",
    "the model's loss is not a finite number",
)
FITS, NO_ROOM, CUT, TOO_LONG, NO_ANSWER, UNFIT, NO_PROMPT, NOT_FINITE = range(len(REASONS))
# The row keeps a score; every other reason leaves it without one.
WITH_SCORE = (FITS, CUT)


class ScoredSequence(NamedTuple):
    """One sequence for the model: tokens first..len(ids)-1 are scored, each by the row before it."""

    of_pass: str
    ids: list[int]
    first: int


@dataclass
class RowTokens:
    """A pool row ready for the model.

    Attributes:
        row_id: pool row number.
        n_tokens: prompt and answer of the last turn, not cut: what a training run would see.
        why: position in REASONS.
        sequences: none when the row cannot be scored.
    """

    row_id: int
    n_tokens: int = 0
    why: int = FITS
    sequences: list[ScoredSequence] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Tokens that separate forwards would process."""
        return sum(len(sequence.ids) for sequence in self.sequences)


class AnswerTokenizer:
    """Tokenises rows in batches under one template and one rule."""

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        *,
        passes: Sequence[str] = (CONDITIONED, DIRECT),
        max_length: int,
        overflow: str = "truncate",
        turns: str = "all",
        rule: str = "shared",
    ) -> None:
        """Prepare to tokenise.

        Args:
            tokenizer: a fast transformers tokenizer.
            template: see load_template.
            passes: which of "conditioned" and "direct" are wanted.
            max_length: the window, in tokens, start token included.
            overflow: what a row longer than that becomes: cut ("truncate"), "skip" or "error".
            turns: "all" assistant turns, or the "last".
            rule: "shared", "cherry" or "superfiltering".
        """
        self._tokenizer = tokenizer
        self._template = template
        self._passes = tuple(passes)
        self._max_length = max_length
        self._overflow = overflow
        self._turns = turns
        self._rule = rule
        self._rules = {"shared": self._shared, "cherry": self._cherry, "superfiltering": self._superfiltering}
        self._start = [] if template.has_marks else _added_start(tokenizer)
        self._document_start = self._start or _document_start(tokenizer)
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        special.sort(key=lambda token: len(token.content), reverse=True)
        # Some marks swallow the white space beside them (Phi-3's), which a piece must then hold.
        marks = [r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in special]
        self._marks = re.compile("(" + "|".join(marks) + ")") if marks else None

    def __call__(self, examples: Sequence[Example]) -> list[RowTokens]:
        """One RowTokens for each usable example, in order; skipped and unreadable rows are left out.

        Raises:
            InputError: a row is longer than max_length and overflow is "error".
        """
        rows: list[RowTokens] = []
        turns: list[list[Turn]] = []
        for example in examples:
            if example.status != STATUS[OK]:
                continue
            rows.append(RowTokens(example.row_id))
            turns.append(self._wanted_turns(example, rows[-1]))
        flat = [turn for of_row in turns for turn in of_row]
        prompts = self.encode([turn.prompt for turn in flat])
        joined = self.encode([turn.prompt + turn.answer for turn in flat])
        scored = self._rules[self._rule](flat, prompts, joined)
        position = 0
        for row, of_row in zip(rows, turns, strict=True):
            stop = position + len(of_row)
            if of_row:
                self._finish(row, scored[position:stop], len(self._start) + len(joined[stop - 1]))
            position = stop
        return rows

    def _wanted_turns(self, example: Example, row: RowTokens) -> list[Turn]:
        try:
            turns = self._template.turns(example)
        except UnfitConversationError:
            row.why = UNFIT
            return []
        if example.trained is not None:
            answers = [i for i, message in enumerate(example.messages) if message.role == "assistant"]
            turns = [turn for i, turn in zip(answers, turns, strict=True) if i in example.trained]
        if DIRECT in self._passes:
            compared = [turn for turn in turns if turn.prompt]
            if turns and not compared:
                row.why = NO_PROMPT
            turns = compared
        if not turns and row.why == FITS:
            row.why = NO_ANSWER
        return turns if self._turns == "all" else turns[-1:]

    def _finish(self, row: RowTokens, scored: list[tuple[int, list[ScoredSequence]]], n_tokens: int) -> None:
        row.n_tokens = n_tokens
        reasons = [why for why, _ in scored]
        overflows = any(why in (NO_ROOM, CUT, TOO_LONG) for why in reasons)
        if overflows and self._overflow == "error":
            raise InputError(
                f"row {row.row_id} has {n_tokens} tokens, more than max_length={self._max_length}: "
                "raise max_length, or say overflow='truncate' or 'skip'"
            )
        if overflows and self._overflow == "skip":
            row.why = TOO_LONG
            return
        row.sequences = [sequence for _, sequences in scored for sequence in sequences]
        # A blank turn beside others takes nothing away; a row of blank turns has no score.
        row.why = (CUT if overflows else FITS) if row.sequences else max(reasons)

    def _shared(
        self, turns: list[Turn], prompts: list[list[int]], joined: list[list[int]]
    ) -> list[tuple[int, list[ScoredSequence]]]:
        """Both passes score the ids that follow the prompt in the joint encoding.

        Where a token reaches across the boundary (two line breaks make one token), the answer is encoded alone instead.
        """
        torn = [i for i, (p, whole) in enumerate(zip(prompts, joined, strict=True)) if whole[: len(p)] != p]
        alone = dict(zip(torn, self.encode([turns[i].answer for i in torn]), strict=True))
        headers = self._encoded_once([turn.header for turn in turns])
        result: list[tuple[int, list[ScoredSequence]]] = []
        for i, (turn, prompt, whole) in enumerate(zip(turns, prompts, joined, strict=True)):
            answer = alone.get(i, whole[len(prompt) :])
            before = {CONDITIONED: prompt, DIRECT: headers[turn.header]}
            # With nothing before it the first answer token has no prediction: every pass then gets a start token.
            is_bare = any(not before[p] for p in self._passes)
            start = self._document_start if is_bare else self._start
            first = {p: len(start) + len(before[p]) for p in self._passes}
            if is_bare and not start:  # a tokenizer that has none: the first answer token is left out of every pass
                first = {p: count + 1 for p, count in first.items()}
            unscored = 1 if is_bare and not start else 0
            kept = answer[: max(0, self._max_length - len(start) - max(len(before[p]) for p in self._passes))]
            if len(answer) <= unscored:
                result.append((NO_ANSWER, []))
            elif len(kept) <= unscored:
                result.append((NO_ROOM, []))
            else:
                why = FITS if len(kept) == len(answer) else CUT
                result.append((why, [ScoredSequence(p, start + before[p] + kept, first[p]) for p in self._passes]))
        return result

    def _cherry(
        self, turns: list[Turn], prompts: list[list[int]], joined: list[list[int]]
    ) -> list[tuple[int, list[ScoredSequence]]]:
        """Cherry_LLM: two joint encodings; the direct one is cut at max_length - prompt + 4, for any tokenizer."""
        directs = self.encode([turn.header + turn.answer for turn in turns])
        headers = self._encoded_once([turn.header for turn in turns])
        result: list[tuple[int, list[ScoredSequence]]] = []
        for turn, prompt, whole, direct in zip(turns, prompts, joined, directs, strict=True):
            prompt_length = min(len(self._start) + len(prompt), self._max_length)
            conditioned = (self._start + whole)[: self._max_length]
            alone = (self._start + direct)[: self._max_length - prompt_length + 4]
            # With nothing before it (no header, no start token) the first answer token has no prediction.
            before = {CONDITIONED: len(prompt), DIRECT: len(headers[turn.header])}
            first = {p: max(1, len(self._start) + count) for p, count in before.items()}
            lengths = len(alone) - first[DIRECT], len(conditioned) - first[CONDITIONED]
            if prompt_length >= self._max_length:
                result.append((NO_ROOM, []))
            elif min(lengths) <= 0:
                result.append((NO_ANSWER, []))
            elif prompt_length + lengths[0] > self._max_length:
                result.append((TOO_LONG, []))
            else:
                cut = len(conditioned) < len(self._start) + len(whole) or len(alone) < len(self._start) + len(direct)
                sequences = {CONDITIONED: conditioned, DIRECT: alone}
                result.append((CUT if cut else FITS, [ScoredSequence(p, sequences[p], first[p]) for p in self._passes]))
        return result

    def _superfiltering(
        self, turns: list[Turn], prompts: list[list[int]], joined: list[list[int]]
    ) -> list[tuple[int, list[ScoredSequence]]]:
        """Superfiltering: the bare answer, cut at max_length - prompt + 1, all its tokens but the first."""
        answers = self.encode([turn.answer for turn in turns])
        result: list[tuple[int, list[ScoredSequence]]] = []
        for prompt, whole, answer in zip(prompts, joined, answers, strict=True):
            prompt_length = min(len(self._start) + len(prompt), self._max_length)
            conditioned = (self._start + whole)[: self._max_length]
            alone = (self._start + answer)[: self._max_length - prompt_length + 1]
            first = max(1, len(self._start) + len(prompt))
            if len(alone) < 2 or len(conditioned) <= first:
                result.append((NO_ROOM if prompt_length >= self._max_length else NO_ANSWER, []))
            else:
                cut = len(conditioned) < len(self._start) + len(whole) or len(alone) < len(self._start) + len(answer)
                sequences = {
                    CONDITIONED: ScoredSequence(CONDITIONED, conditioned, first),
                    DIRECT: ScoredSequence(DIRECT, alone, 1),
                }
                result.append((CUT if cut else FITS, [sequences[p] for p in self._passes]))
        return result

    def _encoded_once(self, texts: Sequence[str]) -> dict[str, list[int]]:
        distinct = list(dict.fromkeys(texts))
        return dict(zip(distinct, self.encode(distinct), strict=True))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without start tokens.

        Special-token strings stay text, except in a template with marks, where those that the template wrote become
        tokens, and in the rules of released code, which makes no difference between the two.
        """
        if not texts:
            return []
        split = self._rule == "shared" and not self._template.has_marks
        encoded = self._plain(texts, split)
        for i, text in enumerate(texts):
            if self._template.has_marks and GUARD in text:  # elsewhere it is a character like any other
                encoded[i] = self._piecewise(text)
        return encoded

    def _plain(self, texts: Sequence[str], split: bool) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=split,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return ids

    def _piecewise(self, text: str) -> list[int]:
        ids: list[int] = []
        pieces = self._marks.split(text) if self._marks else [text]
        for place, piece in enumerate(pieces):
            if piece:
                is_mark = place % 2 == 1
                ids += self._plain([piece.replace(GUARD, "")], split=not is_mark)[0]
        return ids


def _added_start(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text: [bos] for Llama, nothing for GPT-2."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for offset in range(len(full) - len(bare) + 1):
        if full[offset : offset + len(bare)] == bare:
            return list(full[:offset])
    return []


def _document_start(tokenizer: Any) -> list[int]:
    """The token that stood before each document in pre-training, as far as the tokenizer tells.

    A chat model's bos may be the mark that opens a turn, after which no answer can stand.
    """
    known = tokenizer.get_added_vocab()
    if "<|endoftext|>" in known:
        return [int(known["<|endoftext|>"])]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if start is None else [int(start)]
