"""The one result type: which rows were chosen, why, and what a random draw would have taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastsel.budget import (
    NO_SOURCE,
    Budget,
    Limits,
    choose,
    largest_remainder,
    random_scores,
    rank_rows,
    read_budget,
    source_codes,
    spread,
)
from fastsel.errors import InputError, MissingExtraError, UsageError
from fastsel.io.examples import STATUS

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from fastsel.io import Pool

__all__ = [
    "NO_SOURCE",
    "STATUS",
    "Budget",
    "Limits",
    "Selection",
    "build_in_turn",
    "build_selection",
    "choose",
    "largest_remainder",
    "random_scores",
    "rank_rows",
    "read_budget",
    "source_codes",
    "spread",
]

# Begins the reason of a row that has a score but is kept out by a rule of the method; load() reads it back.
RULE = "rule: "


@dataclass(eq=False)
class Selection:
    """What a method chose from a pool; made by build_selection(). Arrays [n] are in pool order.

    Attributes:
        method: the method's name.
        pool: the pool it chose from; after load() without one, a record of its ids, sources and hashes without texts.
        indices: [k] int64 pool row numbers in rank order, best first.
        scores: [n] float64, NaN where a row has none.
        status: [n] uint8, codes of STATUS.
        eligible: [n] bool, rows that the method was free to take.
        n_tokens: [n] int32 tokens a row, -1 where unknown; None when the method counts none.
        metrics: [n] float64 arrays by column name.
        gains, clusters: [n] arrays of selectors that have them.
        reasons: why a row is not ok, by row number.
        budget: what was asked for, as a share, rows or tokens.
        per: the quotas by source, if any.
        requested: the budget in rows, or in tokens for a token budget.
        short: what is missing of it because eligible rows ran out, by quota group.
        rule: what makes a scored row ineligible, in words ("IFD above 1"); None when every scored row may be taken.
        largest: whether high scores are good.
        config: every option of the run.
        timings: seconds by step.
        notes: what the user should know.
        seed: of the random baseline and of the method.
        official: whether the authors' released code was followed to the letter.
        provenance: model, template, device and implementations of the run.
    """

    method: str
    pool: Pool
    indices: NDArray[np.int64]
    scores: NDArray[np.float64]
    status: NDArray[np.uint8]
    eligible: NDArray[np.bool_]
    n_tokens: NDArray[np.int32] | None
    metrics: dict[str, NDArray[np.float64]]
    reasons: Mapping[int, str]
    budget: Budget
    requested: int
    short: dict[str, int]
    config: dict[str, Any]
    timings: dict[str, float]
    notes: list[str]
    seed: int
    official: bool = False
    per: Any = None
    rule: str | None = None
    largest: bool = True
    provenance: dict[str, Any] = field(default_factory=dict)
    gains: NDArray[np.float64] | None = None
    clusters: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"Selection({self.method}: {len(self):,} of {len(self.scores):,} rows, budget {self.budget})"

    def __str__(self) -> str:
        return self.summary_text()

    @property
    def short_by(self) -> int:
        """Rows (tokens for a token budget) missing from what was asked for; above 0 the command line exits with 3."""
        return sum(self.short.values())

    @property
    def selected(self) -> NDArray[np.bool_]:
        """[n] bool: whether each pool row was chosen."""
        mask = np.zeros(len(self.scores), np.bool_)
        mask[self.indices] = True
        return mask

    @cached_property
    def baseline(self) -> NDArray[np.int64]:
        """[k'] int64: what a random draw with the same budget and seed takes from the rows that are ok or truncated.

        For a budget in rows k' = k (source by source under quotas); for a token budget it gets as many tokens instead.
        """
        usable = self.status <= STATUS.index("truncated")
        limits = spread(self.budget, self.pool, self.n_tokens, self.per)
        if limits.sizes is None:
            taken = np.bincount(limits.codes[self.indices], minlength=len(limits.names))
            limits = Limits(limits.names, limits.codes, [int(count) for count in taken], None)
        return limits.take(rank_rows(random_scores(len(self.scores), self.seed), usable))

    @cached_property
    def table(self) -> pa.Table:
        """One line per pool row with the columns of selection.parquet; built when first asked for."""
        import pyarrow as pa

        from fastsel.io.selection_table import record_batches, table_schema

        return pa.Table.from_batches(record_batches(self), table_schema(self))

    @property
    def refused(self) -> NDArray[np.bool_]:
        """[n] bool: rows with a score that the method's rule keeps out."""
        if self.rule is None:
            return np.zeros(len(self.scores), np.bool_)
        return ~self.eligible & ~np.isnan(self.scores)

    def summary(self) -> dict[str, Any]:
        """Counts, shares, the random baseline and timings as plain JSON values; see fastsel.summary."""
        from fastsel.summary import summarize

        return summarize(self)

    def summary_text(self) -> str:
        """The summary in a few aligned lines for people."""
        from fastsel.summary import summary_text

        return summary_text(self.summary())

    def save(
        self,
        folder: str | Path,
        *,
        order: str = "pool",
        also: Iterable[str] = (),
        annotate: bool = False,
        overwrite: bool = False,
        report: bool = True,
    ) -> Path:
        """Write the output folder; see fastsel.io.writers.save_selection."""
        from fastsel.io.writers import save_selection

        return save_selection(
            self, folder, order=order, also=also, annotate=annotate, overwrite=overwrite, report=report
        )

    def report(self, path: str | Path) -> Path:
        """Write the self-contained HTML page to path; or, under .png, .pdf or .svg, its charts (extra report)."""
        from fastsel.report import write_figure, write_report

        return (
            write_report(self, path)
            if Path(path).suffix in (".html", ".htm", ".json", "")
            else write_figure(self, path)
        )

    def to_dataset(self, *, order: str = "pool", score_column: str | None = "fastsel_score") -> Dataset:
        """The chosen rows as a datasets.Dataset, the user's own columns plus the score.

        Args:
            order: "pool" or "rank".
            score_column: name of the added float64 column; None adds none.

        Raises:
            MissingExtraError: datasets is not installed.
        """
        try:
            import datasets  # noqa: F401
        except ImportError:
            raise MissingExtraError("Selection.to_dataset()", "datasets", "hf") from None
        rows = self.ordered_indices(order)
        dataset = self.pool.dataset(rows)
        return dataset if score_column is None else dataset.add_column(score_column, self.scores[rows])

    def ordered_indices(self, order: str = "pool") -> NDArray[np.int64]:
        """[k] int64 chosen rows in "pool" or "rank" order."""
        if order not in ("pool", "rank"):
            raise UsageError(f"order {order!r}: write pool or rank")
        return np.sort(self.indices) if order == "pool" else self.indices

    def choose_again(
        self, budget: Budget | str | int | float, *, per: str | Mapping[str, Any] | None = None
    ) -> Selection:
        """Choose from the same scores with another budget; no model runs.

        Args:
            budget: as in Budget.parse.
            per: quotas by source, as in choose().

        Raises:
            UsageError: the run kept gains of a sequential selector, which hold for its own budget only.
        """
        from fastsel.summary import plain_quotas

        if self.gains is not None:
            raise UsageError(f"{self.method} chose its rows one after another; a new budget needs a new run")
        config = {
            **self.config,
            "budget": budget if isinstance(budget, (str, int, float)) else str(budget),
            "per": plain_quotas(per),
        }
        return build_selection(
            pool=self.pool,
            method=self.method,
            indices=choose(
                self.scores,
                self.eligible,
                budget,
                pool=self.pool,
                n_tokens=self.n_tokens,
                per=per,
                largest=self.largest,
            ),
            scores=self.scores,
            status=self.status,
            reasons=self.reasons,
            n_tokens=self.n_tokens,
            metrics=self.metrics,
            config=config,
            timings={},
            seed=self.seed,
            notes=self.notes,
            official=self.official,
            budget=budget,
            per=per,
            eligible=self.eligible,
            rule=self.rule,
            largest=self.largest,
            provenance=self.provenance,
            clusters=self.clusters,
        )

    @classmethod
    def load(cls, folder: str | Path, pool: Pool | None = None) -> Selection:
        """Read a finished run; see fastsel.io.writers.load_selection."""
        from fastsel.io.writers import load_selection

        return load_selection(folder, pool)


def build_selection(
    *,
    pool: Pool,
    method: str,
    indices: NDArray[np.int64],
    scores: NDArray[np.float64],
    status: NDArray[np.uint8],
    reasons: Mapping[int, str],
    n_tokens: NDArray[np.int32] | None,
    metrics: Mapping[str, NDArray[np.float64]],
    config: Mapping[str, Any],
    timings: Mapping[str, float],
    seed: int,
    notes: Sequence[str] = (),
    official: bool = False,
    requested: int | None = None,
    budget: Budget | str | int | float | None = None,
    per: str | Mapping[str, Any] | None = None,
    eligible: NDArray[np.bool_] | None = None,
    rule: str | None = None,
    largest: bool = True,
    provenance: Mapping[str, Any] | None = None,
    gains: NDArray[np.float64] | None = None,
    clusters: NDArray[np.int32] | None = None,
) -> Selection:
    """Put a method's result together and check that it is one.

    The arguments are the attributes of Selection. What may be left out:
    requested (rows asked for) is only read when there is no budget; config["budget"] and config["per"] stand in for
    budget and per; eligible defaults to every usable row with a score; provenance holds what is known of {"model":
    {"name", "revision", ...}, "template": {"id", "sha256"}, "device": ..., "implementations": {kernel: name}}.

    Raises:
        ValueError: a malformed result, which is an error of the method, not of the user.
    """
    n = len(pool)
    arrays = {
        "scores": scores,
        "status": status,
        "n_tokens": n_tokens,
        "eligible": eligible,
        "gains": gains,
        "clusters": clusters,
        **metrics,
    }
    for name, values in arrays.items():
        if values is not None and values.shape != (n,):
            raise ValueError(f"{method}: {name} is {values.shape}, not [{n}]")
    usable = status <= STATUS.index("truncated")
    if np.any(~np.isnan(scores) & ~usable):
        raise ValueError(f"{method}: a row that is skipped or in error has a score")
    if eligible is None:
        eligible = usable & ~np.isnan(scores)
    indices = np.asarray(indices, np.int64)
    if len(np.unique(indices)) != len(indices) or np.any((indices < 0) | (indices >= n)):
        raise ValueError(f"{method}: chosen rows repeat or lie outside of the pool")
    if not np.all(eligible[indices]):
        raise ValueError(f"{method}: a row was chosen that is not eligible")
    per = per if per is not None else config.get("per")
    asked = Budget.parse(next((value for value in (budget, config.get("budget"), requested) if value is not None), ""))
    limits = spread(asked, pool, n_tokens, per)
    short = limits.missing(indices, eligible)
    return Selection(
        method=method,
        pool=pool,
        indices=indices,
        scores=np.asarray(scores, np.float64),
        status=np.asarray(status, np.uint8),
        eligible=eligible,
        n_tokens=n_tokens,
        metrics={name: np.asarray(values, np.float64) for name, values in metrics.items()},
        reasons=reasons,
        budget=asked,
        requested=sum(limits.limits),
        short=short,
        config=dict(config),
        timings=dict(timings),
        notes=list(notes),
        seed=seed,
        official=official,
        per=per,
        rule=rule,
        largest=largest,
        provenance=dict(provenance or {}),
        gains=gains,
        clusters=clusters,
    )


class HasVectors(Protocol):
    """What build_in_turn needs to know of fastsel.features.embeddings.Embeddings."""

    @property
    def has_vector(self) -> NDArray[np.bool_]:
        """[n] bool: rows that could be chosen."""

    status: NDArray[np.uint8]
    reasons: Any
    n_tokens: NDArray[np.int32] | None
    timings: dict[str, float]
    notes: list[str]
    provenance: dict[str, Any]


def build_in_turn(
    pool: Pool,
    method: str,
    embeddings: HasVectors,
    indices: NDArray[np.int64],
    gains: NDArray[np.float64],
    *,
    budget: Budget,
    per: Any,
    seed: int,
    config: Mapping[str, Any],
    scores: NDArray[np.float64] | None = None,
    eligible: NDArray[np.bool_] | None = None,
    metrics: Mapping[str, NDArray[np.float64]] | None = None,
    **options: Any,
) -> Selection:
    """The Selection of a method that chose rows of an embedded pool one after another.

    Args:
        pool, method, budget, per, seed, config, metrics: see build_selection.
        embeddings: the pool's.
        indices: int64 [k] pool rows in the order of choice.
        gains: float64 [k], what each pick was worth when it was made.
        scores: float64 [n]; None takes the gains, so that rows that were not chosen have no score.
        eligible: bool [n]; None takes the rows with a vector.
        options: further arguments of build_selection.
    """
    gains_n = np.full(len(pool), np.nan)
    gains_n[indices] = gains
    return build_selection(
        pool=pool,
        method=method,
        indices=indices,
        scores=gains_n if scores is None else scores,
        status=embeddings.status,
        reasons=embeddings.reasons,
        n_tokens=embeddings.n_tokens,
        metrics=metrics or {},
        config=config,
        timings=embeddings.timings,
        seed=seed,
        notes=embeddings.notes,
        budget=budget,
        per=per,
        eligible=embeddings.has_vector if eligible is None else eligible,
        provenance=embeddings.provenance,
        gains=gains_n,
        **options,
    )


def check_same_pool(recorded: str, pool: Pool, folder: Path) -> None:
    """Raises: InputError when the pool is not the one the run in folder was made from."""
    if pool.fingerprint != recorded:
        raise InputError(
            f"{folder} was made from another pool than {pool.name} (fingerprint {recorded}, now {pool.fingerprint})"
        )
