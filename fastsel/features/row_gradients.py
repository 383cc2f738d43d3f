"""Gradient features of rows asked for by number: for methods that do not know beforehand which rows they need."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

import fastsel
from fastsel.errors import InputError, UsageError
from fastsel.features.answer_scorer import torch_build
from fastsel.features.answer_tokens import NOT_FINITE, REASONS
from fastsel.features.gradient_rows import BatchFeatures, GradientRule, batches, moved
from fastsel.features.gradients import described_run
from fastsel.features.kept_rewards import KeptRewards
from fastsel.features.training_rows import TrainingTokenizer
from fastsel.features.verdicts import verdicts
from fastsel.io.examples import SKIPPED, TRUNCATED
from fastsel.io.row_reasons import RowReasons
from fastsel.io.templates import Template
from fastsel.models.lora_forward import LabelledSequence, LoraForward
from fastsel.progress import progress_bar

if TYPE_CHECKING:
    from fastsel.io import Pool

BATCH_TOKENS = 2048
DENSE_BYTES = 128 << 20  # of whole gradients, at a time


@dataclass
class RowGradients:
    """Rows -> features, computed when they are asked for, and not kept.

    Attributes:
        pool: the rows.
        forward: of the model with its adapter.
        template, max_length, overflow, turns: which tokens are labelled; see TrainingTokenizer.
        rule: what is computed of a row.
        batch_tokens: of one pass; None takes 2,048.
        implementation: of lora_gradient_sketch.
        status: uint8 [n], the pool's codes with truncated and skipped rows added.
        reasons: why a row is not ok.
        n_tokens: int32 [n], of a row under the template, not cut.
        provenance: see LoraGradients.
    """

    pool: "Pool"
    forward: LoraForward
    template: Template
    rule: GradientRule
    max_length: int
    overflow: str = "truncate"
    turns: str = "all"
    batch_tokens: int | None = None
    implementation: str = "auto"
    status: NDArray[np.uint8] = field(init=False)
    reasons: RowReasons = field(init=False)
    n_tokens: NDArray[np.int32] = field(init=False)
    provenance: dict[str, Any] = field(init=False)
    _kept: KeptRewards | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Tokenise all rows once, to know which have something to learn."""
        self.rule = moved(self.rule, self.forward.loaded.device)
        self._tokenise = TrainingTokenizer(
            self.forward.loaded.tokenizer, self.template, max_length=self.max_length, overflow=self.overflow,
            turns=self.turns,
        )  # fmt: skip
        n = len(self.pool)
        why, self.n_tokens = np.zeros(n, np.uint8), np.zeros(n, np.int32)
        for examples in self.pool.chunks():
            for row in self._tokenise(examples):
                why[row.row_id], self.n_tokens[row.row_id] = row.why, row.n_tokens
        _, self.status, self.reasons = verdicts(self.pool, why, self.max_length)
        described = described_run(
            self.forward, self.rule, self.template, max_length=self.max_length, overflow=self.overflow,
            turns=self.turns, batch_tokens=self.batch_tokens or BATCH_TOKENS, implementation=self.implementation,
        )  # fmt: skip
        self.provenance = {**described, "forward": self.forward.path}

    @property
    def has_vector(self) -> NDArray[np.bool_]:
        """Bool [n]: rows with a gradient."""
        usable: NDArray[np.bool_] = self.status <= TRUNCATED
        return usable

    @property
    def rows(self) -> NDArray[np.int64]:
        """Those rows' numbers."""
        return np.flatnonzero(self.has_vector).astype(np.int64)

    def drop(self, rows: NDArray[np.bool_], reason: str) -> None:
        """Leave the rows of this mask [n] without a gradient."""
        self.status[rows] = SKIPPED
        self.reasons.add(rows, reason)

    def rewards(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """[b]: the largest product of a row's unit feature with one of the rule's targets. A row whose feature is not
        finite gets the least there is, -1, and is from then on without a gradient.
        """
        found = self._kept(rows) if self._kept is not None else self._rewards(rows)
        self._without(rows[~np.isfinite(found)])
        return np.where(np.isfinite(found), found, -1.0)

    @contextmanager
    def kept(self, store: Any, n_expected: int, progress: str) -> Iterator[None]:
        """Inside, rewards are kept in a folder of their own (None: nowhere) and taken from it (see KeptRewards), and
        rows are counted beside the number expected.
        """
        of_pool = {"pool": self.pool.fingerprint, "rows": len(self.pool)}
        versions = {"fastsel": fastsel.__version__, "torch": torch_build()}
        with progress_bar(n_expected, "row", mode=progress, description="rewards") as bar:

            def on_rows(n: int, is_kept: bool) -> None:
                (bar.skip if is_kept else bar.update)(n)

            with KeptRewards(self._rewards, store, {**versions, **self.provenance, **of_pool}, on_rows) as self._kept:
                yield
        self._kept = None

    def _rewards(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """[b]: NaN for a row whose feature is not finite."""
        assert self.rule.targets is not None
        found = np.full(len(rows), np.nan)
        for places, features in self._batches(rows):
            assert features.dots is not None
            norms = features.sqnorms.sqrt().clamp_min(1e-12)
            found[places] = (features.dots.amax(1) / norms).cpu().numpy()
        return found

    def whole(self, rows: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        """[b, p]: dense() of those of the rows that have a gradient, in one matrix.

        Raises:
            InputError: none has.
        """
        usable = rows[self.has_vector[rows]]
        blocks = list(self.dense(usable))
        if blocks:
            usable, matrix = rows[self.has_vector[rows]], np.concatenate(blocks)[self.has_vector[usable]]
        if not blocks or not len(usable):
            raise InputError(f"no row of {self.pool.name} that is asked for has a gradient")
        return matrix

    def dense(
        self, rows: NDArray[np.int64], on_rows: Callable[[int], None] = lambda n: None
    ) -> Iterator[NDArray[np.floating[Any]]]:
        """[b, p] blocks of the rows' whole gradients, in order; rows whose gradient is not finite are zeros there, and
        from then on without one.
        """
        size = max(1, DENSE_BYTES // (4 * self.forward.n_parameters))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            block: NDArray[Any] | None = None
            for places, features in self._batches(part):
                assert features.dense is not None
                values = features.dense.cpu().numpy()
                is_bad = ~np.isfinite(values).all(axis=1) | ~torch.isfinite(features.sqnorms).cpu().numpy()
                values[is_bad] = 0
                self._without(part[places[is_bad]])
                if block is None:
                    block = np.zeros((len(part), self.forward.n_parameters), values.dtype)
                block[places] = values
            on_rows(len(part))
            if block is not None:
                yield block

    def _without(self, rows: NDArray[np.int64]) -> None:
        mask = np.zeros(len(self.pool), np.bool_)
        mask[rows] = True
        if (mask & self.has_vector).any():
            self.drop(mask & self.has_vector, str(REASONS[NOT_FINITE]))

    def _batches(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], BatchFeatures]]:
        """(places [b] among the rows, their features), of one pass after another."""
        place = {int(row): i for i, row in enumerate(rows)}
        tokenised = [row for row in self._tokenise(self.pool.examples(rows)) if row.sequences]
        for batch in batches(tokenised, self.batch_tokens or BATCH_TOKENS):
            features = BatchFeatures(len(batch), self.forward, self.rule, self.implementation)
            examples = [[LabelledSequence(ids, labelled) for ids, labelled in row.sequences] for row in batch]
            losses = self.forward.run(examples, features)
            if not bool(torch.isfinite(losses).all()):
                features.sqnorms[~torch.isfinite(losses)] = torch.nan
            yield np.array([place[row.row_id] for row in batch], np.int64), features


def matrices_of(forward: LoraForward, parts: Sequence[str] | str | None = None) -> dict[str, tuple[int, int]]:
    """Parameter name -> (first coordinate, end) of each LoRA matrix, or of those with one of these texts in their name.

    Raises:
        UsageError: a text is in no name.
    """
    found = {}
    for module in forward.modules:
        middle = module.first + module.lora_a.numel()
        found[module.parameter_names[0]] = (module.first, middle)
        found[module.parameter_names[1]] = (middle, module.first + module.size)
    if parts is None:
        return found
    wanted = [parts] if isinstance(parts, str) else list(parts)
    for part in wanted:
        if not any(part in name for name in found):
            raise UsageError(f"no LoRA matrix has {part!r} in its name; the first is {next(iter(found))}")
    return {name: span for name, span in found.items() if any(part in name for part in wanted)}
