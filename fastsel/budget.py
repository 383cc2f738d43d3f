"""How many rows, and which: budgets, ranking, quotas and the random draw that every run is compared with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastsel.errors import UsageError

_COUNT = r"\d{1,3}(?:,\d{3})+|\d+(?:_\d+)*"
_ROWS = re.compile(rf"(?P<number>[+-]?(?:{_COUNT}))(?:\s*rows?)?", re.IGNORECASE)
_TOKENS = re.compile(rf"(?P<number>{_COUNT}|\d+\.\d+)\s*(?P<prefix>[kmgb]?)\s*tok(?:ens?)?", re.IGNORECASE)
_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
_HOW = "write 0.05 or 5% (a share of all pool rows), 1000 (rows) or 2Mtok (tokens); 1 is one row, 1.0 is all rows"
NO_SOURCE = "(none)"


class HasSources(Protocol):
    """What quotas need of a pool."""

    def __len__(self) -> int: ...

    def sources(self) -> Any:
        """Source names as a pyarrow string or dictionary array [n], or None."""


@dataclass(frozen=True)
class Budget:
    """What was asked for: a share of all pool rows, a number of rows, or a number of tokens.

    Attributes:
        unit: "share", "rows" or "tokens".
        amount: the exact number; a Fraction in (0, 1] for a share, an int >= 1 otherwise.
    """

    unit: str
    amount: Fraction | int

    @classmethod
    def parse(cls, value: Budget | str | int | float) -> Budget:
        """Read what a user writes.

        A number with a decimal point, exponent or % is a share of all pool rows, bad rows included; a whole number
        counts rows; a number before tok, ktok, Mtok or Gtok counts tokens. So 1 is one row and 1.0 the whole pool.
        What str() of a budget gives is read back to the same budget.

        Raises:
            UsageError: anything else, zero, negative numbers, shares above 1.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (str, int, float, np.integer, np.floating)):
            raise UsageError(f"budget {value!r} is not a number: {_HOW}")
        text = (
            value.strip() if isinstance(value, str) else str(value.item() if isinstance(value, np.generic) else value)
        )
        tokens, rows = _TOKENS.fullmatch(text), _ROWS.fullmatch(text)
        try:
            if tokens:
                # Fraction reads the decimal text exactly: 0.29 of 100 rows is 29 rows, not floor(28.999...).
                count = Fraction(tokens["number"].replace(",", "")) * _PREFIXES[tokens["prefix"].lower()]
                return cls("tokens", _whole(int(count), text))
            if text.endswith("%"):
                return cls("share", _share(Fraction(text[:-1].strip()) / 100, text))
            if rows:
                return cls("rows", _whole(int(rows["number"].replace(",", "")), text))
            if "/" not in text:
                return cls("share", _share(Fraction(text), text))
        except (ValueError, OverflowError) as error:
            if isinstance(error, UsageError):
                raise
        raise UsageError(f"budget {text!r} cannot be read: {_HOW}")

    def limit(self, n_pool: int) -> int:
        """The budget as a whole number of rows or tokens.

        Args:
            n_pool: all rows of the pool, unusable ones included.

        Returns:
            Rows, or tokens for a token budget. A share is rounded down, but to one row at least when the pool has any.
        """
        if self.unit == "share":
            return min(n_pool, max(1, int(self.amount * n_pool)))
        return int(self.amount)

    def rows(self, n_pool: int, n_tokens: NDArray[np.integer[Any]] | None = None) -> int:
        """How many rows the budget asks for.

        Args:
            n_pool: all rows of the pool, unusable ones included.
            n_tokens: [k] token counts in rank order; needed by a token budget only.

        Raises:
            UsageError: a token budget without token counts.
        """
        if self.unit != "tokens":
            return self.limit(n_pool)
        if n_tokens is None:
            raise UsageError(f"budget {self} counts tokens, but this method counts none: give rows or a share instead")
        return int(np.searchsorted(np.cumsum(n_tokens, dtype=np.int64), self.limit(n_pool), side="right"))

    def __str__(self) -> str:
        if self.unit == "share":
            return f"{float(self.amount * 100):.15g}%"
        return f"{self.amount:,} {'token' if self.unit == 'tokens' else 'row'}{'' if self.amount == 1 else 's'}"


def _whole(number: int, text: str) -> int:
    if number < 1:
        raise UsageError(f"budget {text!r} asks for nothing: {_HOW}")
    return number


def _share(share: Fraction, text: str) -> Fraction:
    if not 0 < share <= 1:
        raise UsageError(f"budget {text!r} is not a share between 0 and 1: {_HOW}")
    return share


def rank_rows(scores: NDArray[np.float64], eligible: NDArray[np.bool_], *, largest: bool = True) -> NDArray[np.int64]:
    """Order the eligible rows by score; ties go to the lowest row number, rows without a score (NaN) are left out.

    Args:
        scores: [n] float64.
        eligible: [n] bool.
        largest: whether high scores come first.

    Returns:
        [m] int64 row numbers, best first.
    """
    rows = np.flatnonzero(eligible & ~np.isnan(scores))
    keys = scores[rows]
    if largest:
        np.negative(keys, out=keys)
    ranked: NDArray[np.int64] = rows[np.argsort(keys, kind="stable")]
    return ranked


def largest_remainder(total: int, weights: Sequence[int | Fraction]) -> list[int]:
    """Split total into whole parts proportional to the weights (Hamilton's method); of equal remainders the first wins.

    Args:
        total: what to split, >= 0.
        weights: one number >= 0 a part.

    Returns:
        Parts that sum to total (all zero when every weight is zero).
    """
    whole = sum(weights)
    if not whole:
        return [0] * len(weights)
    exact = [Fraction(total) * weight / whole for weight in weights]
    parts = [int(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def source_codes(pool: HasSources) -> tuple[NDArray[np.int32], list[str]]:
    """The source of each row as a number.

    Returns:
        codes [n] int32 and the names they stand for; rows without a source stand under "(none)".
    """
    sources = pool.sources()
    if sources is None:
        return np.zeros(len(pool), np.int32), [NO_SOURCE] if len(pool) else []
    import pyarrow as pa

    if isinstance(sources, pa.ChunkedArray):
        sources = sources.combine_chunks() if sources.num_chunks != 1 else sources.chunk(0)
    if isinstance(sources, pa.ChunkedArray):  # combine_chunks keeps a dictionary chunked in some releases
        sources = sources.unify_dictionaries().combine_chunks()
    if not pa.types.is_dictionary(sources.type):
        sources = sources.dictionary_encode()
    names = [str(name) for name in sources.dictionary.to_pylist()]
    codes = sources.indices.fill_null(len(names)).to_numpy(zero_copy_only=False).astype(np.int32)
    if sources.null_count:
        names.append(NO_SOURCE)
    return codes, names


def parse_quotas(per: str | Mapping[str, Any] | None) -> str | dict[str, Fraction] | None:
    """Read `per`: None, "source", "source=equal", "source=a:2,b:1", or a mapping of source to weight.

    Raises:
        UsageError: another grouping, a weight that is not a number >= 0, or no weight above 0.
    """
    if per is None or per in ("source", "source=equal"):
        return per  # type: ignore[return-value]
    if isinstance(per, str):
        key, _, listed = per.partition("=")
        pairs = [item.rpartition(":") for item in listed.split(",")]
        if key.strip() != "source" or not all(name and weight for name, _, weight in pairs):
            raise UsageError(
                f"per {per!r} cannot be read: write source, source=equal or source=NAME:WEIGHT,NAME:WEIGHT"
            )
        per = {name.strip(): weight for name, _, weight in pairs}
    try:
        weights = {str(name): Fraction(str(weight)) for name, weight in per.items()}
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"per {dict(per)!r}: each weight must be a number") from None
    if not weights or min(weights.values()) < 0 or not any(weights.values()):
        raise UsageError(f"per {dict(per)!r}: weights must be >= 0, and one of them above 0")
    return weights


@dataclass(frozen=True)
class Limits:
    """A budget spread over groups of rows: what take() obeys.

    Attributes:
        names: [g] group names.
        codes: [n] int32 group of each row.
        limits: [g] rows or tokens each group may take.
        sizes: [n] what a row costs in tokens, or None when rows are counted.
    """

    names: list[str]
    codes: NDArray[np.int32]
    limits: list[int]
    sizes: NDArray[np.integer[Any]] | None

    def take(self, ranked: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows that fit, in the order given: each group stops before its first row that would exceed its limit."""
        if len(self.limits) == 1:
            return ranked[: self._fitting(ranked, self.limits[0])]
        fits = np.zeros(len(ranked), np.bool_)
        codes = self.codes[ranked]
        for code, limit in enumerate(self.limits):
            places = np.flatnonzero(codes == code)
            fits[places[: self._fitting(ranked[places], limit)]] = True
        return ranked[fits]

    def _fitting(self, ranked: NDArray[np.int64], limit: int) -> int:
        if self.sizes is None:
            return min(limit, len(ranked))
        return int(np.searchsorted(np.cumsum(self.sizes[ranked], dtype=np.int64), limit, side="right"))

    def missing(self, indices: NDArray[np.int64], eligible: NDArray[np.bool_]) -> dict[str, int]:
        """What each group lacks because its eligible rows ran out, in rows or tokens; other groups are absent."""
        short = {}
        taken, offered = self.codes[indices], self.codes[eligible]
        for code, (name, limit) in enumerate(zip(self.names, self.limits, strict=True)):
            rows = indices[taken == code]
            used = len(rows) if self.sizes is None else int(self.sizes[rows].sum(dtype=np.int64))
            if used < limit and len(rows) == np.count_nonzero(offered == code):
                short[name] = limit - used
        return short


def spread(
    budget: Budget | str | int | float,
    pool: HasSources,
    n_tokens: NDArray[np.integer[Any]] | None = None,
    per: str | Mapping[str, Any] | None = None,
) -> Limits:
    """Spread a budget over the pool's sources.

    Args:
        budget: what was asked for.
        pool: the pool. Shares are of all its rows; per="source" gives each source its share of all rows (of all tokens
            for a token budget), so that the pool's mix is kept. Parts are whole by the largest-remainder rule.
        n_tokens: [n] token counts, -1 where unknown; needed by token budgets.
        per: None, "source", "source=equal" or weights by source name. Sources without a weight get nothing.
            What a source cannot fill is not given to another: the run ends short and says so.

    Raises:
        UsageError: a token budget without token counts; quotas on a pool without sources; an unknown source.
    """
    budget = Budget.parse(budget)
    per = parse_quotas(per)
    total = budget.limit(len(pool))
    sizes = None
    if budget.unit == "tokens":
        if n_tokens is None:
            raise UsageError(
                f"budget {budget} counts tokens, but this method counts none: give rows or a share instead"
            )
        sizes = np.maximum(n_tokens, 0)
    if per is None:
        return Limits(["all rows"], np.zeros(len(pool), np.int32), [total], sizes)
    if pool.sources() is None:
        raise UsageError(
            "per source: this pool names no sources; map the column that does, e.g. --columns source=dataset"
        )
    codes, names = source_codes(pool)
    weights: Sequence[int | Fraction]
    if isinstance(per, dict):
        unknown = sorted(set(per) - set(names))
        if unknown:
            raise UsageError(
                f"per source: the pool has no source {unknown[0]!r}; it has {', '.join(map(repr, names[:20]))}"
            )
        weights = [per.get(name, Fraction(0)) for name in names]
    elif per == "source=equal":
        weights = [1] * len(names)
    else:
        weights = [int(count) for count in np.bincount(codes, weights=sizes, minlength=len(names))]
    return Limits(names, codes, largest_remainder(total, weights), sizes)


def read_budget(budget: Budget | str | int | float, pool: HasSources, per: str | Mapping[str, Any] | None) -> Budget:
    """Budget.parse, for a method that counts tokens; what choosing would refuse is refused before hours of scoring.

    Raises:
        UsageError: see Budget.parse and spread.
    """
    budget = Budget.parse(budget)
    spread(budget, pool, np.zeros(len(pool), np.int32), per)
    return budget


def choose(
    scores: NDArray[np.float64],
    eligible: NDArray[np.bool_],
    budget: Budget | str | int | float,
    *,
    pool: HasSources,
    n_tokens: NDArray[np.integer[Any]] | None = None,
    per: str | Mapping[str, Any] | None = None,
    largest: bool = True,
) -> NDArray[np.int64]:
    """Take the best rows that the budget allows.

    A token budget takes rows in rank order and stops before the first row that would exceed it: what is kept is always
    the top of the ranking, and no shorter row further down is pulled up.

    Args:
        scores: [n] float64; NaN means no score, and such a row is never taken.
        eligible: [n] bool, rows that may be taken.
        budget: share of all pool rows, rows or tokens; see Budget.parse.
        pool: the pool of n rows.
        n_tokens: [n] token counts; needed by token budgets.
        per: quotas by source; see spread.
        largest: whether high scores are good.

    Returns:
        [k] int64 row numbers, best first; ties go to the lowest row.

    Raises:
        UsageError: see Budget.parse and spread; arrays that do not have one entry a pool row.
    """
    if scores.shape != (len(pool),) or eligible.shape != (len(pool),):
        raise UsageError(
            f"scores {scores.shape} and eligible {eligible.shape} must both be [{len(pool)}], one entry a pool row"
        )
    return spread(budget, pool, n_tokens, per).take(rank_rows(scores, eligible, largest=largest))


def random_scores(n: int, seed: int) -> NDArray[np.float64]:
    """Uniform numbers [n] float64: the k largest are a random draw of k rows, the same for the same seed."""
    return np.random.default_rng(seed).random(n)
