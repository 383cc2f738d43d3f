"""G2IS's walk: from pick to the most similar row that agrees with all picks and keeps their sum near the target."""

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastsel.errors import UsageError
from fastsel.selectors.columns import Columns
from fastsel.selectors.principal_components import principal_components
from fastsel.selectors.rows import Rows, check_k, check_rows, check_values

logger = logging.getLogger("fastsel")
RULES = ("restart", "official")
# Cosines as near as this are equal, and one as near 0 is 0: float64 sums in another order differ by less.
TIE = 1e-12
NO_LENGTH = 1e-10  # a sum of picks that is shorter has no direction, and agrees with nothing (the authors' bound)
CONTENDERS = 32  # rows decided exactly at a time
PICKS = 256  # picks that a doubtful row is compared with at a time


class Walk(NamedTuple):
    """Rows in the order of choice, and for each its gain, its component and the number of its walk."""

    indices: NDArray[np.int64]
    gains: NDArray[np.float64]
    component: NDArray[np.int64]
    walk: NDArray[np.int64]


def graph_walk(
    x: Any,
    k: int,
    target: Any = None,
    *,
    components: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    variance: float = 0.5,
    consistency: float = 0.8,
    rule: str = "restart",
    sign: str | None = None,
    initial: ArrayLike | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Choose k rows on walks along the target's principal components; exact, without a graph of the rows.

        c_1, ..., c_q: the fewest principal components of the target that explain more than `variance` of it;
        component i has k w_i rows, w_i its share of the variance, in whole numbers by largest remainders.
        Its walk S starts at the row nearest c_i; the next row is the one most similar to the last, among rows j with
            (a) cos(j, s) >= 0 for all s in S                                                        no conflict
            (b) |cos(sum S + j, c_i)| >= consistency |cos(sum S, c_i)|, rows at unit length          consistency

    Args:
        x: [n, d] training gradients (or sketches of them); numpy, torch on any device, or mapped from a file; any
            length. float16 and bfloat16 are read as they are, decisions are float64's.
        k: how many rows, at least 0; more than there are takes all.
        target: [m, d] gradients of the target, as they are: at least two different rows.
        components: [q, d] in the target's stead, in the order in which they are walked.
        weights: [q] at least 0, shares of k for components; equal ones when None.
        variance: of principal_components.
        consistency: the delta of (b), at least 0.
        rule: what happens when no row is left that (a) and (b) allow. "restart": a new walk starts for this component,
            at the row left that is nearest it, so that k rows are always chosen. "official": the component ends short
            of its rows, which are given to no other, as in the authors' code.
        sign: of components, see principal_components; "target" when None, under "official" "sklearn".
        initial: row numbers already chosen: they are not chosen again, and belong to no walk.

    Returns:
        indices int64 [k] (fewer under "official"), component by component in the order of choice, and gains float64
        [k]: a row's cosine with the pick before it; of the first row of a walk, its cosine with the component.
        Another k splits into other shares: the first j are not the choice of j, but for a single component.

    Raises:
        UsageError: x, target, k or an option is not as above; a row with NaN or infinity is named.

    Ties and zero: cosines within 1e-12 are equal, and the lowest row wins; one within 1e-12 of 0 is 0, so no conflict;
        (b) has the same allowance. A row of zeros is at cosine 0 to everything: it conflicts with nothing.
    Duplicates: a copy of the last pick is the row most similar to it, and is chosen next: make rows distinct first if
        that is not wanted.
    Exactness: the authors take the first allowed row of a list of all rows, sorted for each row by its similarity:
        that is the most similar allowed row, which one product of x with the last pick finds. Their fall-back searches
        the same rows again under the same conditions, and so finds none. Cosines are float32's with a bound on their
        error; rows that it leaves in doubt are decided in float64. The authors' float32 decides near-ties by rounding.
    Cost: one pass over x a pick, or less: the columns of rows likely to follow are fetched with a pick's, and only rows
        are read that no pick conflicts with, once they are few. Memory: nothing of x's size; 128 MB of columns at most,
        about 60 n bytes, 4 q n for components.
    Source: G2IS, ACL 2025 (arXiv 2502.11062), and the authors' gradient_walk.py, zy125413/G2IS@990409b.
    """
    walk = walk_components(
        Rows(x, unit=True), k, target, components=components, weights=weights, variance=variance,
        consistency=consistency, rule=rule, sign=sign, initial=initial,
    )  # fmt: skip
    return walk.indices, walk.gains


def walk_components(
    rows: Rows, k: int, target: Any = None, *, components: ArrayLike | None, weights: ArrayLike | None, variance: float,
    consistency: float, rule: str, sign: str | None, initial: ArrayLike | None,
) -> Walk:  # fmt: skip
    """graph_walk, with the component and the walk that each row was chosen on."""
    k = check_k(k, rows.n)
    if rule not in RULES:
        raise UsageError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not 0 <= consistency < np.inf:
        raise UsageError(f"consistency must be a number of at least 0, got {consistency}")
    before = check_rows(initial, rows.n, "initial")
    if (target is None) == (components is None):
        raise UsageError("give target= or components=, and not both")
    if components is None:
        if weights is not None:
            raise UsageError("weights= belongs to components=; those of a target are its shares of the variance")
        directions = Rows(target, name="target")
        _check_columns(directions, rows, "target")
        sign = sign or ("sklearn" if rule == "official" else "target")
        found, shares = principal_components(directions, variance=variance, sign=sign)
    else:
        if sign is not None:
            raise UsageError("sign= belongs to target=; components= have theirs")
        directions = Rows(components, unit=True, name="components")
        _check_columns(directions, rows, "components")
        found = directions.exact(slice(0, directions.n)).cpu().numpy()
        shares = check_values(weights, directions.n, "weights", least=0.0)
        if not shares.sum() > 0:
            raise UsageError("weights must not all be 0")
    k = min(k, rows.n - len(before))
    if k == 0:
        return Walk(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))
    walker = _Walker(rows, found, consistency, before)
    for i, n_rows in enumerate(_split(k, shares / shares.sum(), is_official=rule == "official")):
        if n_rows > 0:
            walker.follow(i, int(n_rows), restarts=rule == "restart")
    logger.info(
        "graph_walk: %d of %d rows along %d components; %d walks, %d passes over the matrix",
        *(len(walker.picks), rows.n, len(found), walker.n_walks, walker.columns.n_passes),
    )
    return Walk(
        np.array(walker.picks, np.int64), np.array(walker.gains, np.float64), np.array(walker.component, np.int64),
        np.array(walker.walk, np.int64),
    )  # fmt: skip


def _check_columns(directions: Rows, rows: Rows, name: str) -> None:
    if directions.d != rows.d:
        raise UsageError(f"{name} has {directions.d} columns, the rows have {rows.d}")


def _split(k: int, weights: NDArray[np.float64], *, is_official: bool) -> NDArray[np.int64]:
    """Int64 [q] that sums to k, by largest remainders; of equal ones the first, in the authors' code the last."""
    exact = k * weights
    shares = np.floor(exact).astype(np.int64)
    rests = exact - shares
    order = np.argsort(rests)[::-1] if is_official else np.argsort(-rests, kind="stable")
    shares[order[: k - int(shares.sum())]] += 1
    return shares


class _Walker:
    """What is chosen so far, and of the walk under way: its sum, and what of each row is known beside it."""

    def __init__(
        self, rows: Rows, components: NDArray[np.float64], consistency: float, before: NDArray[np.int64]
    ) -> None:
        self.rows, self.columns, self.consistency = rows, Columns(rows), consistency
        self.components = torch.from_numpy(components).to(rows.device)
        self.along = self.columns.products(self.components)
        self.error = self.columns.error
        self.has_length = torch.from_numpy(rows.lengths > 0).to(rows.device)
        self.is_taken = torch.zeros(rows.n, dtype=torch.bool, device=rows.device)
        self.is_taken[torch.from_numpy(before).to(rows.device)] = True
        self.n_left = rows.n - len(before)
        self.picks: list[int] = []
        self.gains: list[float] = []
        self.component: list[int] = []
        self.walk: list[int] = []
        self.n_walks = 0

    def follow(self, i: int, n_rows: int, *, restarts: bool) -> None:
        """Choose up to n_rows rows along component i."""
        wanted = min(n_rows, self.n_left)
        while wanted:
            row: int | None = self._begin(i)
            while row is not None:
                wanted -= 1
                row = self._next() if wanted else None
            if not restarts:
                return

    def _begin(self, i: int) -> int:
        """Start a walk: the row not taken whose cosine with the component is greatest."""
        self.i, self.direction, self.n_walks = i, self.components[i], self.n_walks + 1
        self.columns.forget()
        self.start = len(self.picks)
        self.sum = torch.zeros(self.rows.d, dtype=torch.float64, device=self.rows.device)
        # Of rows: they conflict with a pick, or are taken; float32 does not tell whether they do; <sum S, row>.
        self.is_out = self.is_taken.clone()
        self.is_doubtful = torch.zeros_like(self.is_taken)
        self.dots = torch.zeros(self.rows.n, dtype=torch.float64, device=self.rows.device)
        self.likely: list[int] = []
        nearness = self.along[i].masked_fill(self.is_taken, -torch.inf)
        near = (nearness >= nearness.max() - 2 * self.error - TIE).nonzero()[:, 0].cpu().numpy()
        best, cosines = -np.inf, []
        for part in np.array_split(near, -(-len(near) // CONTENDERS)):
            cosines.append((self.rows.exact(part) @ self.direction).cpu().numpy())
            best = max(best, cosines[-1].max())
        row = int(near[np.concatenate(cosines) >= best - TIE].min())
        self._take(row, self.direction)
        return row

    def _take(self, row: int, beside: torch.Tensor) -> None:
        """Choose a row; its gain is its cosine with the vector beside it."""
        self.last = self.rows.exact([row])[0]
        self.sum += self.last
        self.squared_length = float(self.sum @ self.sum)
        self.sum_along = float(self.sum @ self.direction)
        self.is_taken[row] = self.is_out[row] = True
        self.n_left -= 1
        self.picks.append(row)
        # numpy's sum of products: the same bits whatever the number of threads.
        self.gains.append(float((self.last.cpu().numpy() * beside.cpu().numpy()).sum()))
        self.component.append(self.i)
        self.walk.append(self.n_walks - 1)

    def _next(self) -> int | None:
        """The allowed row most similar to the last pick, now chosen; None when no row is allowed."""
        last_row, n_picks = self.picks[-1], len(self.picks) - self.start
        cosines = self.columns.of(last_row, self.likely, ~self.is_out).double()
        self.is_out |= cosines < -self.error
        if self.rows.lengths[last_row] > 0:
            self.is_doubtful |= (cosines.abs() <= self.error) & self.has_length
        self.dots += cosines
        length = self.squared_length**0.5
        self.floor = self.consistency * abs(self.sum_along) / length if length > NO_LENGTH else 0.0
        # (b) with the errors of all cosines to its favour.
        least_squares = self.squared_length + 2 * (self.dots - n_picks * self.error) + self.has_length
        reach = (self.sum_along + self.along[self.i].double()).abs() + self.error
        is_open = ~self.is_out & (reach >= self.floor * (1 - TIE) * least_squares.clamp(min=0).sqrt())
        values = cosines.masked_fill_(~is_open, -torch.inf)
        n_open = int(is_open.sum())
        tried, exact, best, first = [], [], -np.inf, True
        while n_open > 0:
            limits, numbers = values.topk(min(CONTENDERS, n_open))
            if first:
                self.likely, first = numbers.tolist(), False
            contenders = numbers[limits >= best - self.error - TIE].cpu().numpy()
            if len(contenders):
                similarities, is_allowed = self._decide(contenders)
                tried.append(contenders[is_allowed])
                exact.append(similarities[is_allowed])
                best = max(best, exact[-1].max(initial=-np.inf))
            if len(contenders) < len(numbers):
                break
            values[numbers] = -torch.inf
            n_open -= len(numbers)
        if best == -np.inf:
            return None
        allowed = np.concatenate(tried)
        row = int(allowed[np.concatenate(exact) >= best - TIE].min())
        self.likely = [other for other in self.likely if other != row]
        self._take(row, self.last)
        return row

    def _decide(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Float64 cosines [b] of rows with the last pick, and whether (a) and (b) allow them."""
        index = torch.from_numpy(numbers).to(self.rows.device)
        vectors = self.rows.exact(numbers)
        to_last, to_sum, along = (vectors @ torch.stack([self.last, self.sum, self.direction], 1)).unbind(1)
        squares = self.squared_length + 2 * to_sum + self.has_length[index]
        directed = (self.sum_along + along).abs() / squares.clamp(min=NO_LENGTH**2).sqrt()
        agreement = torch.where(squares > NO_LENGTH**2, directed, 0.0)
        is_allowed = agreement >= self.floor * (1 - TIE)
        doubtful = self.is_doubtful[index]
        if bool(doubtful.any()):
            conflicts = torch.zeros(int(doubtful.sum()), dtype=torch.bool, device=self.rows.device)
            for start in range(self.start, len(self.picks), PICKS):
                cosines = vectors[doubtful] @ self.rows.exact(self.picks[start : start + PICKS]).T
                conflicts |= (cosines < -TIE).any(1)
            self.is_out[index[doubtful][conflicts]] = True
            self.is_doubtful[index] = False
            is_allowed[doubtful.nonzero()[:, 0][conflicts]] = False
        return to_last.cpu().numpy(), is_allowed.cpu().numpy()
