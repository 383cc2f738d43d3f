"""NovelSelect: at each step the row with the greatest density-weighted, rank-weighted distance to the rows chosen."""

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastsel.errors import UsageError
from fastsel.kernels.novelty import novelty, similarity_columns
from fastsel.kernels.novelty.api import DISTANCE_STEP
from fastsel.selectors.density import RULES, local_density
from fastsel.selectors.rows import Rows, check_k, check_rows, check_values

logger = logging.getLogger("fastsel")
CONTENDERS = (32, 256)  # fewest and most rows scored exactly at a time
COLUMNS = (4, 64)  # fewest and most columns fetched in one pass over the matrix
COLUMN_VALUES = 2**25  # similarities kept: 128 MB
# Scores as near as this, relatively, are equal: float64 sums of the same numbers in another order differ by less.
TIE = 1e-12
UNIT = 2.0**-24  # of float32 rounding


def novelselect(
    x: Any,
    k: int,
    *,
    rule: str = "official",
    alpha: float = 1.0,
    beta: float = 0.5,
    neighbours: int = 10,
    reference: Any = None,
    first: int | None = None,
    quality: ArrayLike | None = None,
    initial: ArrayLike | None = None,
    seed: int = 42,
    density: ArrayLike | None = None,
    implementation: str = "auto",
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Choose k rows, each the most novel beside those before it; exact, without a matrix [n, n] or [n, k].

        v(x | S) = quality_x sum_r r^-alpha A(x, j_r),   A(x, j) = (1 - cos(x, j)) c
        official:  c = sigma_x + sigma_j,  j_1, j_2, ... in order of A;   divided by |S|
        paper:     c = sigma_j,            j_1, j_2, ... in order of 1 - cos
        sigma_x = (mean squared distance of x to its `neighbours` nearest rows of the reference + 1e-9)^-beta

    Args:
        x: [n, d] embeddings; numpy, torch on any device, or mapped from a file; any length, cosines are taken.
        k: how many rows, at least 0; more than there are takes all.
        rule: "official", as the authors' code has it, or "paper".
        alpha: >= 0; how fast a far pick loses its say: 0 adds all distances up, a large one leaves the nearest alone.
        beta: >= 0; 0 takes no density.
        neighbours: at least 1.
        reference: [m, d], the pool whose density counts; x itself when None.
        first: the row to begin with; when None it is drawn as the authors do, numpy.random.RandomState(seed).
        quality: [n] at least 0, multiplies the novelty; None is 1 for all.
        initial: row numbers already chosen: they count as picks and are not chosen again.
        seed: of the first row.
        density: [n] sigma, ready made and at least 0; beta, neighbours and reference are then not used.
        implementation: of the kernels.

    Returns:
        indices int64 [k] in the order of choice, and gains float64 [k]: v of each row when it was chosen, 0 for a row
        that nothing came before. The first j of k are the choice of j; v may rise and fall along the list.

    Raises:
        UsageError: x, k or an option is not as above; a row of x with NaN or infinity is named.

    Ties: scores within 1e-12 of the best, relatively, are equal, and the lowest row wins. Under "paper", picks whose
        distances to a row agree to 2^-40 rank by their weighted distances, smallest first.
    Duplicates: a copy of a chosen row is only the nearest to it, and may well be chosen too when both lie far out:
        make rows distinct first if that is not wanted. sigma: squared distances of the rows as they are (official) or
        at unit length (paper, where sigma is then the paper's but for a constant); equal rows of the reference count
        once; its nearest row is left out whatever it is (official), or only where it equals the row (paper).
    Exactness: a row scored once needs no score while that score plus the later picks' append bounds (kernels/novelty)
        stays below the best; contenders are scored in float32 with a bound on its error, and those it cannot tell
        apart in float64. Under "paper" a farther pick may weigh more than a nearer one: its bound is wider
        (see _paper_increments) and contenders are scored in float64 throughout.
    Cost: one product of x with a chosen row where that row was not foreseen: with it, the columns of the next likely
        rows are fetched in the same pass. Memory: x at unit length in float32 (nothing for a mapped file), the
        columns of at most 64 rows a pass, of those kept within 128 MB, 12 bytes k d for the chosen rows.
    Source: Yang et al., ACL 2025 (arXiv 2502.17184), and the authors' code, UmeanNever/NovelSum@b594962.
    """
    rows = Rows(x, unit=True)
    k = check_k(k, rows.n)
    if rule not in RULES:
        raise UsageError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not 0 <= alpha < np.inf:
        raise UsageError(f"alpha must be a number of at least 0, got {alpha}")
    before = check_rows(initial, rows.n, "initial")
    value = check_values(quality, rows.n, "quality", least=0.0)
    if first is not None:
        check_rows([first], rows.n, "first")
        if len(before):
            raise UsageError("first= and initial= both say what to begin with: give one of them")
    k = min(k, rows.n - len(before))
    if k == 0:
        return np.zeros(0, np.int64), np.zeros(0)
    if density is None:
        sigma = local_density(x, reference, rule=rule, beta=beta, neighbours=neighbours, implementation=implementation)
    else:
        sigma = check_values(density, rows.n, "density", least=0.0)
    greedy = _Greedy(rows, sigma, value, rule, alpha, len(before) + k, implementation)
    greedy.begin(before)
    if not len(before):
        greedy.add(int(np.random.RandomState(seed).randint(0, rows.n)) if first is None else int(first))
    while greedy.t < len(before) + k:
        greedy.add(greedy.best())
    logger.info(
        "novelselect: %d of %d rows; %d scored exactly, %.3f %% of rows times picks; %d passes over the matrix",
        *(k, rows.n, greedy.n_scored, 100 * greedy.n_scored / (rows.n * k), greedy.n_passes),
    )
    return np.array(greedy.picks[len(before) :], dtype=np.int64), greedy.gains(len(before))


class _Greedy:
    """The rows chosen so far, and for every row the most that its score can be: `bounds`, -inf for the chosen.

    A bound is what the row scored last plus the append bounds of the picks since, w_u times the weighted distance to
    pick u; each holds the error of the float32 numbers that it was made of.
    """

    def __init__(
        self,
        rows: Rows,
        sigma: NDArray[np.float64],
        quality: NDArray[np.float64],
        rule: str,
        alpha: float,
        most: int,
        implementation: str,
    ) -> None:
        self.rows, self.implementation, self.is_paper = rows, implementation, rule == "paper"
        device = rows.device
        self.sigma, self.sigma_on_host = torch.from_numpy(sigma).to(device), sigma
        self.quality = None if (quality == 1).all() else torch.from_numpy(quality).to(device)
        self.quality_on_host = quality
        self.picks: list[int] = []
        self.picked = torch.empty(most, rows.d, dtype=torch.float32, device=device)
        self.picked_exactly = torch.empty(most, rows.d, dtype=torch.float64, device=device)
        self.n_exact = 0  # of picked_exactly, filled when they are needed
        self.picked_sigma = torch.empty(most, dtype=torch.float64, device=device)
        self.weights = torch.arange(1, most + 1, dtype=torch.float64, device=device) ** -alpha
        self.weight_sums = self.weights.cumsum(0).tolist()
        self.weight_list = self.weights.tolist()
        self.bounds = torch.zeros(rows.n, dtype=torch.float64, device=device)
        # Error of a float32 product of unit vectors and a few roundings; of a score, times densities and weights.
        self.rounding = UNIT * (8 + rows.d**0.5)
        self.error = (sigma + sigma.max()) * (0.0 if self.is_paper else self.rounding)
        self.columns: dict[int, torch.Tensor] = {}
        self.likely: list[int] = []  # rows that may be chosen next, best first
        self.n_hits = 1  # columns that were of use since the last pass
        self.n_contenders = CONTENDERS[0]
        self.n_scored = self.n_passes = 0
        if self.is_paper:
            # Of a row as last scored: its distances to the nearest, second, fourth, ... pick.
            self.quantiles = torch.full((rows.n, most.bit_length()), torch.inf, dtype=torch.float32, device=device)
            self.ranks = [2**j for j in range(most.bit_length())]

    @property
    def t(self) -> int:
        return len(self.picks)

    def begin(self, before: NDArray[np.int64]) -> None:
        """Take the picks that are there already."""
        if self.is_paper:
            for start in range(0, len(before), COLUMNS[1]):
                self.likely = before[start + 1 : start + COLUMNS[1]].tolist()
                self.n_hits = COLUMNS[1]
                for pick in before[start : start + COLUMNS[1]].tolist():
                    self.add(pick)
        elif len(before):
            for pick in before.tolist():
                self._append(pick)
            m = self.t
            errors = torch.from_numpy(self.error * self.weight_sums[m - 1]).to(self.bounds.device)
            for start, block in self.rows.blocks():
                part = slice(start, start + len(block))
                self.bounds[part] += errors[part] + novelty(
                    block, self.picked[:m], self.weights[:m], self.sigma[part], self.picked_sigma[:m],
                    rank_by="order", implementation=self.implementation,
                )  # fmt: skip
            if self.quality is not None:
                self.bounds *= self.quality
            self.bounds[self.picks] = -torch.inf
            self.n_passes += 1

    def _append(self, pick: int) -> None:
        self.picked[self.t] = self.rows.take(slice(pick, pick + 1))[0]
        self.picked_sigma[self.t] = self.sigma_on_host[pick]
        self.bounds[pick] = -torch.inf
        self.picks.append(pick)

    def _exactly(self) -> torch.Tensor:
        """Float64 [t, d], the picks."""
        if self.n_exact < self.t:
            self.picked_exactly[self.n_exact : self.t] = self.rows.exact(self.picks[self.n_exact :])
            self.n_exact = self.t
        return self.picked_exactly[: self.t]

    def add(self, pick: int) -> None:
        """Choose a row: every other row's bound grows by what it can gain from it."""
        self._append(pick)
        # As far as it may be: the products are float32.
        distances = (1 + self.rounding) - self._column(pick).double()
        if self.is_paper:
            increments = self._paper_increments(distances)
        else:
            densities = self.sigma + self.sigma_on_host[pick]
            increments = densities.mul_(distances).mul_(self.weight_list[self.t - 1])
        self.bounds += increments if self.quality is None else increments.mul_(self.quality)

    def _paper_increments(self, distances: torch.Tensor) -> torch.Tensor:
        """What each score can gain from the newest pick u, at rank p and distance d, when picks rank by distance.

        With s the least sigma of the picks, score = s sum_r w_r d_r + sum_r w_r (sigma_r - s) d_r. The first sum grows
        by at most w_t d, the second by at most w_p (sigma_u - s) d, as u takes rank p and no other pick's rank falls.
        p exceeds the rank of any distance below d that was taken when the row was last scored: ranks only grow.
        """
        t, weights = self.t, self.weight_list
        least = self.picked_sigma[:t].min()
        nearer = (distances[:, None] > self.quantiles + 3 * self.rounding).sum(1)
        by_rank = [weights[0], *(weights[min(rank, t - 1)] for rank in self.ranks)]
        at_rank = torch.tensor(by_rank, dtype=torch.float64, device=distances.device)[nearer]
        factors: torch.Tensor = weights[t - 1] * least + at_rank * (self.picked_sigma[t - 1] - least)
        return distances * factors

    def _column(self, pick: int) -> torch.Tensor:
        """Float32 [n], cosines of all rows with a chosen one; foreseen, or fetched with those of likely rows."""
        if pick in self.columns:
            self.n_hits += 1
            return self.columns.pop(pick)
        # Twice as many as were of use the last time: a pass with a few columns costs little more than with one.
        room = max(1, COLUMN_VALUES // self.rows.n)
        n_columns = min(max(2 * self.n_hits, COLUMNS[0]), COLUMNS[1], room)
        wanted = [pick, *(row for row in self.likely if row != pick and row not in self.columns)][:n_columns]
        vectors = self.rows.take(wanted)
        if self.rows.is_mapped:
            fetched = torch.empty(len(wanted), self.rows.n, dtype=torch.float32, device=self.rows.device)
            for start, block in self.rows.blocks():
                fetched[:, start : start + len(block)] = similarity_columns(block, vectors)
        else:
            fetched = similarity_columns(self.rows.whole(), vectors)
        self.n_hits, self.n_passes = 1, self.n_passes + 1
        # A column stays true: those fetched earlier are kept while there is room, the oldest go first.
        for old in list(self.columns)[: max(0, len(self.columns) + len(wanted) - room)]:
            del self.columns[old]
        # Copies: a part of `fetched` would keep all of it in memory.
        self.columns |= {row: column.clone() for row, column in zip(wanted, fetched, strict=True)}
        return self.columns.pop(pick)

    def best(self) -> int:
        """The row with the greatest score; the lowest of those with equal ones."""
        weight = self.weight_sums[self.t - 1]
        # One more than are scored: where it stays behind, so do all others.
        limits, rows = self.bounds.topk(min(self.n_contenders + 1, len(self.bounds) - self.t))
        limit = float(limits[-1]) if len(rows) > self.n_contenders else -np.inf
        rows = rows[: self.n_contenders]
        bounds = limits[: self.n_contenders].cpu().numpy()
        found, highest, floor, n_needed = [], [], -np.inf, 0
        while len(rows):
            numbers = rows.cpu().numpy()
            margin, quality = self.error[numbers] * weight, self.quality_on_host[numbers]
            scores = self._score(rows, numbers)
            found.append(numbers)
            highest.append((scores + margin) * quality)
            self.bounds.index_copy_(0, rows, torch.from_numpy(highest[-1]).to(self.bounds.device))
            # Rows that tie with the best are contenders too, also where adding up their bounds rounded them below it.
            least = float(((scores - margin) * quality).max())
            floor = max(floor, least - 4 * TIE * abs(least))
            n_needed += int((bounds >= floor).sum())
            if limit < floor:
                break
            left = np.setdiff1d((self.bounds >= floor).nonzero()[:, 0].cpu().numpy(), np.concatenate(found))
            rows = torch.from_numpy(left).to(self.bounds.device)
            limits, limit = self.bounds[rows], -np.inf
            if len(left) > CONTENDERS[1]:
                limits, first = limits.topk(CONTENDERS[1] + 1)
                limit = float(limits[-1])
                rows, limits = rows[first[:-1]], limits[:-1]
            bounds = limits.cpu().numpy()
        self.n_contenders = min(max(n_needed, CONTENDERS[0]), CONTENDERS[1])
        contenders, most = np.concatenate(found), np.concatenate(highest)
        self.likely = contenders[np.argsort(-most, kind="stable")[: COLUMNS[1]]].tolist()
        return self._decide(contenders[most >= floor])

    def _score(self, rows: torch.Tensor, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """Float64 [b], scores of rows against all picks."""
        t = self.t
        self.n_scored += len(numbers)
        if self.is_paper:
            vectors, picked = self.rows.exact(numbers), self._exactly()
            scores = self._novelty(vectors, picked, self.weights[:t], rows)
            ranks = [rank for rank in self.ranks if rank <= t]
            one_hot = torch.zeros(t, len(ranks), dtype=torch.float64, device=rows.device)
            one_hot[[rank - 1 for rank in ranks], range(len(ranks))] = 1
            distances = novelty(vectors, picked, one_hot, implementation=self.implementation)
            self.quantiles[rows[:, None], torch.arange(len(ranks), device=rows.device)] = distances.float()
        else:
            vectors = self.rows.take(numbers) if self.rows.is_mapped else self.rows.whole().index_select(0, rows)
            scores = self._novelty(vectors, self.picked[:t], self.weights[:t], rows).double()
        return np.asarray(scores.cpu().numpy())

    def _novelty(
        self, vectors: torch.Tensor, picked: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        row_density = None if self.is_paper else self.sigma.index_select(0, rows)
        return novelty(
            vectors, picked, weights, row_density, self.picked_sigma[: self.t],
            rank_by="distance" if self.is_paper else "weighted", implementation=self.implementation,
        )  # fmt: skip

    def _decide(self, numbers: NDArray[np.int64]) -> int:
        """The best of rows that float32 cannot tell apart."""
        if len(numbers) == 1:
            return int(numbers[0])
        rows = torch.from_numpy(numbers).to(self.sigma.device)
        scores = self._novelty(self.rows.exact(numbers), self._exactly(), self.weights[: self.t], rows).cpu().numpy()
        scores = scores * self.quality_on_host[numbers]
        best = scores.max()
        return int(numbers[scores >= best - TIE * abs(best)].min())

    def gains(self, n_before: int) -> NDArray[np.float64]:
        """Float64: the score of each pick against those before it."""
        picked, sigma = self._exactly().cpu().numpy(), self.picked_sigma.cpu().numpy()
        weights = self.weights.cpu().numpy()
        gains = np.zeros(self.t - n_before)
        for i in range(max(1, n_before), self.t):
            distances = 1 - picked[:i] @ picked[i]
            if self.is_paper:
                values = distances * sigma[:i]
                score = weights[:i] @ values[np.lexsort((values, np.round(distances / DISTANCE_STEP)))]
            else:
                score = weights[:i] @ np.sort(distances * (sigma[i] + sigma[:i])) / i
            gains[i - n_before] = score * self.quality_on_host[self.picks[i]]
        return gains
