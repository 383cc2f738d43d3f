"""ClusterUCB: clusters are arms of a bandit, so that rewards are asked for where good ones were found before."""

import logging
from collections.abc import Callable
from heapq import heapify, heappop, heapreplace
from math import inf, sqrt
from random import Random
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastsel.budget import rank_rows
from fastsel.errors import UsageError
from fastsel.selectors.rows import check_k

logger = logging.getLogger("fastsel")
RULES = ("shuffled", "official")


class Draws(NamedTuple):
    """Rows in the order they were drawn, their clusters and rewards; and how many rewards were asked for."""

    rows: NDArray[np.int64]
    arms: NDArray[np.int64]
    rewards: NDArray[np.float64]
    n_evaluated: int


def bandit(
    labels: ArrayLike,
    reward: Callable[[NDArray[np.int64]], ArrayLike],
    k: int,
    *,
    budget: float = 0.2,
    cold_start: float = 0.0,
    beta: float = 1.0,
    rule: str = "shuffled",
    batch: int = 16,
    seed: int = 42,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Draw a share of the rows, cluster by cluster as an upper confidence bound says, and keep the k best of them.

        next cluster = argmax over clusters with rows left of  mean of its rewards + beta * their standard deviation
        next row     = one of its rows not drawn yet, at random

    Args:
        labels: [n] whole numbers, the cluster of each row; -1 keeps a row out (one without a gradient, say).
        reward: rewards [b] of rows, given their numbers int64 [b]; finite, and always the same for the same row.
        k: how many rows to keep, at least 0; all that were drawn when those are fewer.
        budget: share of the rows with a cluster that are drawn, cold start included; 1 draws all.
        cold_start: share of each cluster that is drawn first, at least one row; 0: a cluster without a draw comes
            before all others, the lowest first.
        beta: weight of the standard deviation (of all rewards of the cluster, divided by their number).
        rule: "shuffled": the rows of each cluster are put into a random order once, and drawn from its front.
            "official": every draw takes the next number of one random.Random(seed), as the authors' does, and int(n
            (budget - cold_start)) rows are drawn after the cold start, whatever that took.
        batch: most rows that reward is asked for at a time. Rows that will likely be drawn soon are asked for together;
            what is drawn does not depend on it. 1 asks for no row that is not drawn.
        seed: of the draws.

    Returns:
        indices int64 [k], highest reward first, and gains float64 [k], their rewards. Ties go to the lowest row. The
        first j of k are the choice of j.

    Raises:
        UsageError: labels, k or an option is not as above; a reward is not finite (its row is named).

    Ties: of equal bounds the lowest cluster is drawn from.
    Empty and used-up clusters are passed over, whatever the sign of the others' bounds; when none is left, drawing
        ends. The authors' code stops with an error there.
    Exactness: mean and deviation are running sums (Welford's); a mean over a list, as the authors' code takes it, may
        differ in its last bit.
    Cost: log2(clusters) comparisons a draw. Rewards asked for in vain: at most batch - 1 at a time, which under
        "shuffled" are mostly drawn later.
    Source: ClusterUCB, EMNLP 2025 Findings (arXiv 2506.10288), and the authors' UCB_Beta, ZigeW/ClusterUCB@8cbd9f0.
    """
    draws = draw_rows(
        labels, reward, budget=budget, cold_start=cold_start, beta=beta, rule=rule, batch=batch, seed=seed
    )
    k = check_k(k, len(draws.rows))
    by_row = np.argsort(draws.rows)
    rows, rewards = draws.rows[by_row], draws.rewards[by_row]
    best = rank_rows(rewards, np.ones(len(rows), bool), largest=True)[:k]
    return rows[best], rewards[best]


def draw_rows(
    labels: ArrayLike, reward: Callable[[NDArray[np.int64]], ArrayLike], *, budget: float, cold_start: float,
    beta: float, rule: str, batch: int, seed: int,
) -> Draws:  # fmt: skip
    """Every row that bandit draws, in order."""
    clusters = np.asarray(labels)
    if clusters.ndim != 1 or (clusters.size and clusters.dtype.kind not in "iu"):
        raise UsageError(f"labels must be whole numbers [n], got {clusters.dtype} {list(clusters.shape)}")
    if clusters.size and clusters.min() < -1:
        row = int(clusters.argmin())
        raise UsageError(f"labels: row {row} has {clusters[row]}; a cluster is 0 or more, and -1 is none")
    for name, value in (("budget", budget), ("cold_start", cold_start)):
        if not 0 <= value <= 1:
            raise UsageError(f"{name} must be a share from 0 to 1, got {value}")
    if cold_start > budget:
        raise UsageError(f"cold_start={cold_start} is more than the whole budget={budget}")
    if not 0 <= beta < inf:
        raise UsageError(f"beta must be a number of at least 0, got {beta}")
    if rule not in RULES:
        raise UsageError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if isinstance(batch, bool) or not isinstance(batch, (int, np.integer)) or batch < 1:
        raise UsageError(f"batch must be a whole number of at least 1, got {batch!r}")
    n = int((clusters >= 0).sum())
    in_order = np.argsort(clusters, kind="stable")[len(clusters) - n :].astype(np.int64)
    sizes = np.bincount(clusters[in_order]) if n else np.zeros(0, np.int64)
    members = np.split(in_order, np.cumsum(sizes)[:-1]) if n else []
    urn: _Urn = _SharedStream(members, seed) if rule == "official" else _Shuffled(members, seed)
    game = _Game(reward, urn, [int(size) for size in sizes], float(beta), int(batch))
    if cold_start:
        game.begin(cold_start)
    n_more = int(n * (budget - cold_start)) if rule == "official" else int(n * budget + 1e-9) - len(game.rows)
    game.play(min(n_more, n - len(game.rows)))
    logger.info(
        "bandit: %d of %d rows drawn from %d clusters; %d rewards asked for in %d calls",
        *(len(game.rows), n, int((sizes > 0).sum()), len(game.known), game.n_calls),
    )
    return Draws(
        np.array(game.rows, np.int64), np.array(game.arms, np.int64),
        np.array([game.known[row] for row in game.rows], np.float64), len(game.known),
    )  # fmt: skip


class _Urn(Protocol):
    """Which row of a cluster is next."""

    def draw(self, arm: int) -> int: ...

    def draw_many(self, arm: int, count: int) -> list[int]: ...

    def fork(self) -> "_Urn":
        """One that draws the same from here on, and leaves this one alone."""


class _Shuffled:
    """The rows of each cluster in an order of their own."""

    def __init__(self, members: list[NDArray[np.int64]], seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.orders = [generator.permutation(rows).tolist() for rows in members]
        self.taken = [0] * len(members)

    def draw(self, arm: int) -> int:
        row: int = self.orders[arm][self.taken[arm]]
        self.taken[arm] += 1
        return row

    def draw_many(self, arm: int, count: int) -> list[int]:
        return [self.draw(arm) for _ in range(count)]

    def fork(self) -> "_Shuffled":
        copy = object.__new__(_Shuffled)
        copy.orders, copy.taken = self.orders, self.taken.copy()
        return copy


class _SharedStream:
    """random.sample of the rows left, in the order of the pool, from one stream for all clusters."""

    def __init__(self, members: list[NDArray[np.int64]], seed: int) -> None:
        self.left: list[list[int]] = [rows.tolist() for rows in members]
        self.random = Random(seed)
        self.is_own = [True] * len(members)

    def _own(self, arm: int) -> list[int]:
        if not self.is_own[arm]:
            self.left[arm], self.is_own[arm] = self.left[arm].copy(), True
        return self.left[arm]

    def draw(self, arm: int) -> int:
        left = self._own(arm)
        return left.pop(self.random.randrange(len(left)))  # random.sample(left, 1) takes this one number

    def draw_many(self, arm: int, count: int) -> list[int]:
        left = self._own(arm)
        places = self.random.sample(range(len(left)), count)
        rows = [left[place] for place in places]
        for place in sorted(places, reverse=True):
            del left[place]
        return rows

    def fork(self) -> "_SharedStream":
        copy = object.__new__(_SharedStream)
        copy.left, copy.is_own = self.left.copy(), [False] * len(self.left)
        copy.random = Random()
        copy.random.setstate(self.random.getstate())
        return copy


class _Game:
    """The arms' rewards so far, and rewards known beyond them."""

    def __init__(
        self, reward: Callable[[NDArray[np.int64]], ArrayLike], urn: _Urn, sizes: list[int], beta: float, batch: int
    ) -> None:
        self.reward, self.urn, self.beta, self.batch = reward, urn, beta, batch
        self.left = sizes.copy()
        self.count = [0] * len(sizes)
        self.mean = [0.0] * len(sizes)
        self.squares = [0.0] * len(sizes)  # of differences from the mean
        self.known: dict[int, float] = {}
        self.rows: list[int] = []
        self.arms: list[int] = []
        self.n_calls, self.n_hits, self.reward_sum = 0, 1, 0.0

    def begin(self, share: float) -> None:
        """Draw a share of every cluster."""
        drawn = [(arm, self.urn.draw_many(arm, max(int(n * share), 1))) for arm, n in enumerate(self.left) if n]
        rows = [row for _, part in drawn for row in part]
        for start in range(0, len(rows), self.batch):
            self._ask(rows[start : start + self.batch])
        for arm, part in drawn:
            for row in part:
                self._count(arm, row)

    def play(self, n_draws: int) -> None:
        """Draw rows one at a time, each from the cluster with the highest bound."""
        heap = [(self._priority(arm), arm) for arm, n in enumerate(self.left) if n]
        heapify(heap)
        for i in range(n_draws):
            arm = heap[0][1]
            row = self.urn.draw(arm)
            if row in self.known:
                self.n_hits += 1
            else:
                # Twice as many as were of use the last time.
                n_ahead = min(self.batch, 2 * self.n_hits, n_draws - i) - 1
                self._ask([row, *self._foresee(heap, arm, n_ahead)])
                self.n_hits = 1
            self._count(arm, row)
            if self.left[arm]:
                heapreplace(heap, (self._priority(arm), arm))
            else:
                heappop(heap)

    def _priority(self, arm: int) -> float:
        n = self.count[arm]
        return -(self.mean[arm] + self.beta * sqrt(self.squares[arm] / n)) if n else -inf

    def _count(self, arm: int, row: int) -> None:
        value = self.known[row]
        self.rows.append(row)
        self.arms.append(arm)
        self.left[arm] -= 1
        self.count[arm] += 1
        difference = value - self.mean[arm]
        self.mean[arm] += difference / self.count[arm]
        self.squares[arm] += difference * (value - self.mean[arm])
        self.reward_sum += value

    def _foresee(self, heap: list[tuple[float, int]], arm: int, wanted: int) -> list[int]:
        """Up to that many rows that come next if each reward were its cluster's mean, after a draw from the first arm.

        A mean as reward leaves the mean where it is and the deviation a little smaller: the same arm goes on until its
        bound falls to that of another.
        """
        if wanted < 1:
            return []
        urn, heap, found = self.urn.fork(), heap.copy(), []
        extra: dict[int, int] = {}
        overall = self.reward_sum / len(self.rows) if self.rows else 0.0
        for _ in range(4 * wanted):
            extra[arm] = extra.get(arm, 0) + 1
            if self.left[arm] > extra[arm]:
                n = self.count[arm]
                middle = self.mean[arm] if n else overall
                deviation = sqrt(self.squares[arm] / (n + extra[arm]))
                heapreplace(heap, (-(middle + self.beta * deviation), arm))
            else:
                heappop(heap)
            if not heap:
                break
            arm = heap[0][1]
            row = urn.draw(arm)
            if row not in self.known:
                found.append(row)
                if len(found) == wanted:
                    break
        return found

    def _ask(self, rows: list[int]) -> None:
        """Rewards of rows not known yet."""
        given = self.reward(np.array(rows, np.int64))
        values = np.asarray(given.detach().cpu() if isinstance(given, torch.Tensor) else given, dtype=np.float64)
        if values.shape != (len(rows),):
            raise UsageError(f"reward must return one number for each of {len(rows)} rows, got {list(values.shape)}")
        if not np.isfinite(values).all():
            place = int((~np.isfinite(values)).argmax())
            raise UsageError(
                f"reward: row {rows[place]} has {values[place]}, which is not a finite number; give rows that have no "
                "reward the label -1"
            )
        self.known.update(zip(rows, values.tolist(), strict=True))
        self.n_calls += 1
