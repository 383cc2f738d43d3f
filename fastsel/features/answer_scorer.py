"""Scores one shard after another with one forward, here or in another process."""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.errors import RunFailedError
from fastsel.features.answer_tokens import NOT_FINITE, AnswerTokenizer, RowTokens, ScoredSequence
from fastsel.features.batches import ROWS_AT_ONCE, Shard, cut_into_batches, without_twins
from fastsel.kernels.linear_token_stats import linear_token_stats
from fastsel.models.loading import LoadedModel, load_model
from fastsel.models.packed import PackedForward, pack

if TYPE_CHECKING:
    from fastsel.io import Pool


def record_dtype(passes: Sequence[str]) -> np.dtype[Any]:
    """What is kept of a row: its tokens, why it is not ok, and for each pass the sum of -log p and of how many."""
    fields: list[tuple[str, str]] = [("n_tokens", "<i4"), ("why", "|u1")]
    for of_pass in passes:
        fields += [(f"nll_{of_pass}", "<f8"), (f"n_{of_pass}", "<i4")]
    return np.dtype(fields)


@dataclass
class AnswerScorer:
    """shard -> its records. Another process is sent what the forward is made from, and makes its own there."""

    pool: "Pool"
    loaded: LoadedModel | None
    tokenise: AnswerTokenizer
    passes: tuple[str, ...]
    batch_tokens: int
    implementation: str
    on_tokens: Callable[[int], None] | None = None
    made_with: dict[str, Any] = field(default_factory=dict)
    model: PackedForward | None = None

    def forward(self) -> PackedForward:
        """The forward, made when it is first asked for.

        Raises:
            RunFailedError: here another model or other code would run than in the process that asks.
        """
        if self.model is None:
            loaded = self.loaded or load_model(**self.made_with["origin"])
            self.model = PackedForward(loaded, self.implementation)
            here = made_with(self.model)
            if self.made_with and here != self.made_with:
                raise RunFailedError(
                    f"process {os.getpid()} on {socket.gethostname()} computes with {here}, the one that asked with "
                    f"{self.made_with}: their numbers would not be of one kind"
                )
        return self.model

    def __getstate__(self) -> dict[str, Any]:
        model = self.forward()
        named = model.loaded.origin is not None  # what has a name is loaded there; a pair is sent
        return {
            **vars(self),
            "loaded": None if named else model.loaded,
            "on_tokens": None,
            "made_with": made_with(model),
            "model": None,
        }

    def __call__(self, shard: Shard) -> NDArray[Any]:
        model = self.forward()
        records = np.zeros(shard.stop - shard.start, record_dtype(self.passes))
        rows: list[RowTokens] = []
        for examples in self.pool.chunks(shard.start, shard.stop, rows=ROWS_AT_ONCE):
            rows += self.tokenise(examples)
        for row in rows:
            records["n_tokens"][row.row_id - shard.start] = row.n_tokens
            records["why"][row.row_id - shard.start] = row.why
        rows, twins = without_twins(rows)
        for batch in cut_into_batches(rows, self.batch_tokens):
            sums = _sums([sequence for _, sequence in batch], model, self.implementation)
            for (row_id, sequence), nll in zip(batch, sums, strict=True):
                records[f"nll_{sequence.of_pass}"][row_id - shard.start] += nll
                records[f"n_{sequence.of_pass}"][row_id - shard.start] += len(sequence.ids) - sequence.first
            if self.on_tokens is not None:
                self.on_tokens(sum(len(sequence.ids) for _, sequence in batch))
        names = [f"{kind}_{of_pass}" for kind in ("nll", "n") for of_pass in self.passes]
        for row_id, first in twins:
            for name in names:
                records[name][row_id - shard.start] = records[name][first.row_id - shard.start]
            if self.on_tokens is not None:
                self.on_tokens(first.size)
        not_finite = ~np.all([np.isfinite(records[f"nll_{of_pass}"]) for of_pass in self.passes], axis=0)
        records["why"][not_finite] = NOT_FINITE
        return records


def made_with(model: PackedForward) -> dict[str, Any]:
    """What decides the numbers of a forward beside the tokens, down to their last bits."""
    return {
        "origin": model.loaded.origin,
        "model": model.loaded.fingerprint,
        "implementations": model.implementations,
        "torch": torch_build(),
    }


def torch_build() -> str:
    """The version of torch and the instruction set that its own products use here."""
    return f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def _sums(sequences: Sequence[ScoredSequence], model: PackedForward, implementation: str) -> NDArray[np.float64]:
    """Float64 [s]: sum of -log p over each sequence's scored tokens."""
    batch = pack([sequence.ids for sequence in sequences])
    rows = torch.cat([batch.rows(i, s.first - 1, len(s.ids) - 1) for i, s in enumerate(sequences)])
    hidden = model.hidden_states(batch, rows)
    targets = torch.tensor([token for s in sequences for token in s.ids[s.first :]], device=hidden.device)
    head = model.head
    stats = linear_token_stats(
        hidden, head.weight, targets, head.bias, head.softcap, head.scale, implementation=implementation
    )
    assert stats.nll is not None
    nll = stats.nll.to("cpu", torch.float64).numpy()
    starts = np.cumsum([0] + [len(s.ids) - s.first for s in sequences[:-1]])
    sums: NDArray[np.float64] = np.add.reduceat(nll, starts)
    return sums
