import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastsel.errors import UsageError
from fastsel.kernels._runtime import native
from fastsel.selectors import facility_location
from fastsel.selectors.coverage import Coverage

EXACT = ("auto", "incremental", "lazy", "naive")
APPROXIMATE = ("stochastic", "threshold", "partitioned")
TIE = 1e-9


def random_rows(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def clustered_rows(n, d, seed=0):
    """100 clusters of very different sizes and widths."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((100, d))
    label = random.zipf(1.3, n) % 100
    width = 0.3 + 0.7 * random.random((100, 1))
    return (centres[label] + width[label] * random.standard_normal((n, d))).astype(np.float32)


def curved_rows(n, d, seed=0):
    """Few directions carry most of the variance, with duplicates: what text embeddings look like."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, d)) * (1 + np.arange(d)) ** -0.7 + 0.2
    x[random.integers(0, n, n // 20)] = x[random.integers(0, n, n // 20)]
    return x.astype(np.float32)


KINDS = {"random": random_rows, "clustered": clustered_rows, "curved": curved_rows}


def similarities(x, points=None, similarity="cosine", gamma=None):
    """All of them in float64, as the formulas read."""
    x = np.asarray(x, np.float64)
    points = x if points is None else np.asarray(points, np.float64)
    gamma = 1 / x.shape[1] if gamma is None else gamma
    if similarity == "cosine":
        x, points = (y / np.where((z := np.linalg.norm(y, axis=1)) > 0, z, 1)[:, None] for y in (x, points))
    if similarity in ("cosine", "dot"):
        return x @ points.T
    squared = np.stack([((row - points) ** 2).sum(1) for row in x])
    return np.exp(-gamma * (squared if similarity == "rbf" else np.sqrt(squared)))


def naive(s, k, floor=0.0, weights=None, quality=None, alpha=0.0, initial=(), costs=None, groups=None):
    """Float64 greedy as the definition reads, with the same tie rule."""
    n, m = s.shape
    w = np.ones(m) if weights is None else np.asarray(weights)
    q = np.zeros(n) if quality is None else np.asarray(quality)
    best = np.full(m, -np.inf if floor is None else floor)
    left = np.ones(n, bool)
    for row in initial:
        best, left[row] = np.maximum(best, s[row]), False
    room, quota, indices, gains = k, dict(groups[1]) if groups else {}, [], []
    while True:
        may = left & (np.ones(n, bool) if costs is None else np.asarray(costs) <= room + 1e-9)
        if groups:
            may &= np.array([quota.get(label, n) > 0 for label in groups[0]])
        if not may.any() or (costs is None and room < 1):
            break
        terms = s if np.isinf(best).any() else np.maximum(s - best, 0)
        worth = (1 - alpha) * (terms * w).sum(1) + alpha * q
        value = np.where(may, worth if costs is None else worth / np.asarray(costs), -np.inf)
        largest = value.max()
        row = int(np.flatnonzero(value >= largest - TIE * abs(largest))[0])
        indices.append(row), gains.append(worth[row])
        best, left[row] = np.maximum(best, s[row]), False
        room -= 1 if costs is None else costs[row]
        if groups and groups[0][row] in quota:
            quota[groups[0][row]] -= 1
    return np.array(indices, np.int64), np.array(gains)


def assert_same(got, expected):
    indices, gains = got
    assert indices.dtype == np.int64 and gains.dtype == np.float64
    assert indices.tolist() == expected[0].tolist()
    np.testing.assert_allclose(gains, expected[1], rtol=1e-9, atol=1e-12 * max(1.0, abs(expected[1]).max(initial=0)))


def test_worked_example():
    """Cosines of (1,0), (0.8,0.6), (0,1), (-1,0): row 1 covers 0.8 + 1 + 0.6 = 2.4; then row 3 adds 1, row 2 adds 0.4,
    row 0 adds 0.2.
    """
    x = [[1, 0], [0.8, 0.6], [0, 1], [-1, 0]]
    indices, gains = facility_location(x, 4)
    assert indices.tolist() == [1, 3, 2, 0]
    assert gains == pytest.approx([2.4, 1.0, 0.4, 0.2], abs=1e-12)


@pytest.mark.parametrize("optimizer", EXACT)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_float64_greedy(kind, optimizer):
    x = KINDS[kind](400, 24)
    assert_same(facility_location(x, 120, optimizer=optimizer), naive(similarities(x), 120))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_matches_float64_greedy_at_five_thousand(kind):
    """The list of float64 greedy, each gain to 1e-9 given the same prefix. Greedy's own gains are kept current in
    float64 by the points that moved (500 sums over all pairs take minutes) and from scratch every 50 picks.
    """
    x, stats = KINDS[kind](5000, 384), {}
    indices, gains = facility_location(x, 500, stats=stats)
    s = np.maximum(similarities(x), 0)
    best, current, left = np.zeros(5000), s.sum(1), np.ones(5000, bool)
    for step, row in enumerate(indices.tolist()):
        if step % 50 == 0:
            current = sum(np.maximum(s[:, v] - best[v], 0).sum(1) for v in np.array_split(np.arange(5000), 10))
        largest = current[left].max()
        assert row == np.flatnonzero(left & (current >= largest * (1 - TIE)))[0], f"pick {step}"
        assert gains[step] == pytest.approx(np.maximum(s[row] - best, 0).sum(), rel=1e-9)
        moved = np.flatnonzero(s[row] > best)
        before, after = best[moved], s[row, moved]
        current = current - (np.maximum(s[:, moved] - before, 0) - np.maximum(s[:, moved] - after, 0)).sum(1)
        best, left[row] = np.maximum(best, s[row]), False
    assert gains.sum() == pytest.approx(best.sum(), rel=1e-9)
    assert stats["passes"] <= 2 + np.log(500)


@pytest.mark.parametrize("optimizer", EXACT)
@pytest.mark.parametrize(
    "options",
    [
        {"similarity": "dot"},
        {"similarity": "dot", "floor": None},
        {"similarity": "rbf", "gamma": 0.05},
        {"similarity": "exp_distance"},
        {"floor": None},
        {"floor": 0.25},
        {"weights": np.linspace(0, 2, 150)},
        {"quality": np.linspace(0, 3, 150) ** 2, "alpha": 0.7},
        {"quality": np.ones(150), "alpha": 1.0},
        {"initial": [3, 149, 70]},
        {"initial": [3], "floor": None},
        {"groups": (np.arange(150) % 3, {0: 5, 2: 2})},
    ],
    ids=str,
)
def test_matches_with_options(options, optimizer):
    x = clustered_rows(150, 12) + 1
    expected = similarities(x, None, options.get("similarity", "cosine"), options.get("gamma"))
    others = {name: value for name, value in options.items() if name not in ("similarity", "gamma")}
    assert_same(facility_location(x, 40, optimizer=optimizer, **options), naive(expected, 40, **others))


@pytest.mark.parametrize("optimizer", EXACT)
def test_matches_with_queries(optimizer):
    x, points = random_rows(130, 12), random_rows(210, 12, seed=1)
    weights = np.random.default_rng(2).random(210)
    got = facility_location(x, 50, queries=points, weights=weights, optimizer=optimizer)
    assert_same(got, naive(similarities(x, points), 50, weights=weights))


@pytest.mark.parametrize("optimizer", EXACT)
def test_matches_with_costs(optimizer):
    """Each pick adds the most per cost; the single best row where that alone is worth more."""
    x, costs = random_rows(120, 12), np.random.default_rng(1).random(120) + 0.2
    assert_same(facility_location(x, 7.5, costs=costs, optimizer=optimizer), naive(similarities(x), 7.5, costs=costs))
    # Row 0 covers all and takes the whole budget; row 1 covers itself for next to nothing, and is the better ratio.
    x = np.eye(9)
    x[0] = 1
    indices, gains = facility_location(x, 10, costs=[10, *[0.01] * 1, *[11] * 7], optimizer=optimizer)
    assert indices.tolist() == [0] and gains == pytest.approx([1 + 8 / 3])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60), d=st.integers(1, 8), k=st.integers(0, 70), seed=st.integers(0, 999),
    levels=st.sampled_from([None, 1, 2]), optimizer=st.sampled_from(EXACT), floor=st.sampled_from([0.0, None, 0.3]),
)  # fmt: skip
# Every error measured before the last pick was 0, and the allowance with it: a tied row's rounded gain was passed over.
@example(n=32, d=6, k=17, seed=129, levels=1, optimizer="auto", floor=None)
def test_law_any_shape_with_ties(n, d, k, seed, levels, optimizer, floor):
    """Few levels make many rows equal, zero or mirrored."""
    x = np.random.default_rng(seed).standard_normal((n, d))
    x = x if levels is None else np.round(np.clip(x, -levels, levels))
    assert_same(facility_location(x, k, optimizer=optimizer, floor=floor), naive(similarities(x), min(k, n), floor))


@pytest.mark.parametrize("optimizer", EXACT + APPROXIMATE)
def test_law_a_prefix_is_the_selection_for_less_and_initial_continues(optimizer):
    x = clustered_rows(200, 16)
    if optimizer in EXACT:
        indices, gains = facility_location(x, 40, optimizer=optimizer)
        for j in (0, 1, 17):
            fewer = facility_location(x, j, optimizer=optimizer)
            assert fewer[0].tolist() == indices[:j].tolist() and np.array_equal(fewer[1], gains[:j])
        rest = facility_location(x, 23, initial=indices[:17], optimizer=optimizer)
        assert rest[0].tolist() == indices[17:].tolist()
        np.testing.assert_allclose(rest[1], gains[17:], rtol=1e-9)
    again = [facility_location(x, 30, optimizer=optimizer, seed=5) for _ in range(2)]
    assert np.array_equal(again[0][0], again[1][0]) and np.array_equal(again[0][1], again[1][1])
    assert len(set(again[0][0].tolist())) == 30


def test_law_at_least_a_share_of_the_optimum():
    """1 - 1/e for a count, 1/2 for quotas, (1 - 1/e) / 2 for costs, by trying all subsets."""
    for seed in range(5):
        x, costs = random_rows(9, 3, seed), np.random.default_rng(seed).random(9) + 0.1
        s = np.maximum(similarities(x), 0)

        def objective(rows, s=s):
            return s[list(rows)].max(0).sum() if rows else 0.0

        subsets = [rows for size in range(5) for rows in itertools.combinations(range(9), size)]
        labels, quota = np.arange(9) % 2, {0: 1, 1: 1}
        found = facility_location(x, 3)[1].sum()
        assert found >= (1 - 1 / np.e) * max(objective(rows) for rows in subsets if len(rows) == 3)
        found = facility_location(x, 1.0, costs=costs)[1].sum()
        assert found >= (1 - 1 / np.e) / 2 * max(objective(rows) for rows in subsets if costs[list(rows)].sum() <= 1)
        found = facility_location(x, 9, groups=(labels, quota))[1].sum()
        fits = [rows for rows in subsets if sum(r % 2 == 0 for r in rows) <= 1 and sum(r % 2 for r in rows) <= 1]
        assert found >= max(objective(rows) for rows in fits) / 2


@pytest.mark.parametrize("optimizer", APPROXIMATE)
@pytest.mark.parametrize("kind", KINDS)
def test_approximations_come_close(optimizer, kind):
    x = KINDS[kind](400, 24)
    s = np.maximum(similarities(x), 0)
    best = naive(s, 40)[1].sum()
    indices, gains = facility_location(x, 40, optimizer=optimizer)
    assert len(set(indices.tolist())) == 40
    assert gains.sum() == pytest.approx(s[indices].max(0).sum(), rel=1e-9)
    assert gains.sum() >= 0.93 * best
    assert len(facility_location(x, 1000, optimizer=optimizer)[0]) == 400


def test_neighbours_solve_the_sparse_problem():
    """Each point counts its 20 most similar rows; with all rows as neighbours it is the whole problem."""
    x = clustered_rows(200, 16)
    s = similarities(x)
    kept = np.zeros_like(s)
    for v in range(200):
        near = np.argsort(-s[:, v], kind="stable")[:20]
        kept[near, v] = np.maximum(s[near, v], 0)
    indices, gains = facility_location(x, 30, neighbours=20)
    expected = naive(kept, 30)
    assert indices.tolist() == expected[0].tolist()
    np.testing.assert_allclose(gains, expected[1], rtol=1e-5)
    quality = np.linspace(0, 1, 200)
    options = {"quality": quality, "alpha": 0.5, "initial": [7], "weights": quality + 1}
    whole = facility_location(x, 30, neighbours=200, **options)
    assert whole[0].tolist() == facility_location(x, 30, **options)[0].tolist()


@pytest.mark.parametrize("optimizer", ["auto", "lazy", "stochastic"])
def test_law_same_bits_for_any_number_of_threads(optimizer):
    x, before = curved_rows(500, 40), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(facility_location(x, 60, optimizer=optimizer))
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_edges_what_comes_in(tmp_path):
    x = clustered_rows(120, 16)
    expected = facility_location(x, 25)
    np.save(tmp_path / "x.npy", x)
    for given_x in (
        x.astype(np.float64),
        torch.from_numpy(x),
        x.T.copy().T,
        np.load(tmp_path / "x.npy", mmap_mode="r"),
    ):
        assert_same(facility_location(given_x, 25), expected)
    halves = x.astype(np.float16)
    assert_same(facility_location(halves, 25), naive(similarities(halves), 25))
    assert_same(facility_location(torch.from_numpy(x).bfloat16(), 25), naive(
        similarities(torch.from_numpy(x).bfloat16().double().numpy()), 25
    ))  # fmt: skip
    assert_same(facility_location(x, 25, implementation="torch"), expected)


def test_edges_streamed_blocks(tmp_path, monkeypatch):
    """A mapped file of more rows than a block holds is read block by block, distances about the mean included."""
    x = random_rows(300, 10) + 5
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    monkeypatch.setattr("fastsel.selectors.coverage.BLOCK_ROWS", 64)
    for options in ({}, {"similarity": "rbf"}, {"weights": np.linspace(1, 2, 300)}):
        s = similarities(x, None, options.get("similarity", "cosine"))
        assert_same(facility_location(mapped, 30, **options), naive(s, 30, weights=options.get("weights")))


def test_edges_far_from_the_origin():
    """Distances of rows a thousand times as long as they are apart: float32 alone would not tell them apart."""
    x = random_rows(150, 8).astype(np.float64) + 1000
    assert_same(facility_location(x, 30, similarity="rbf"), naive(similarities(x, None, "rbf"), 30))


@pytest.mark.parametrize("optimizer", EXACT)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_edges_a_long_row_whose_products_cancel(dtype, optimizer):
    """Its gain of 1.5 a point is less than what float32 rounds from a row of that length."""
    x = np.random.default_rng(0).random((200, 3)) / 2
    x[:, 2] = 0
    x[150] = [1e8, -1e8 + 1.5, 0]
    x, queries = x.astype(dtype), np.ones((5, 3))
    for k in (1, 5):
        got = facility_location(x, k, queries=queries, similarity="dot", optimizer=optimizer)
        assert_same(got, naive(similarities(x, queries, "dot"), k))
    assert dtype == np.float32 or got[0][0] == 150


def test_edges_zero_rows_equal_rows_and_nothing():
    x = np.zeros((5, 3))
    assert facility_location(x, 9)[0].tolist() == [0, 1, 2, 3, 4]
    assert facility_location(x, 9)[1].tolist() == [0] * 5
    x = np.ones((700, 3))
    indices, gains = facility_location(x, 700)
    assert indices.tolist() == list(range(700)) and gains[0] == pytest.approx(700) and abs(gains[1:]).max() < 1e-9
    assert facility_location(np.eye(50), 50)[0].tolist() == list(range(50))
    assert [len(y) for y in facility_location(np.zeros((0, 3)), 2)] == [0, 0]
    assert [len(y) for y in facility_location(x, 0)] == [0, 0]
    assert facility_location(x, 3, groups=(["a"] * 700, {"a": 0}))[0].tolist() == []
    assert facility_location(x, 3, queries=np.zeros((0, 3)))[0].tolist() == [0, 1, 2]


def test_counts():
    x, stats = random_rows(1000, 32), {}
    facility_location(x, 200, stats=stats)
    assert 0.5 <= stats["passes"] <= 2 + np.log(200)
    assert 200 <= stats["exact_evaluations"] <= 0.1 * 200 * 1000 and stats["syncs"] <= 200
    for optimizer in APPROXIMATE:
        facility_location(x, 20, optimizer=optimizer, stats=stats)
        assert stats["passes"] < 6


def test_edges_quality_alone_is_a_ranking_for_every_optimizer():
    """alpha = 1 leaves nothing of coverage, also where no gain was ever computed."""
    x = np.random.default_rng(0).standard_normal((40, 4))
    quality = np.random.default_rng(1).random(40)
    for optimizer in ("auto", "incremental", "lazy", "naive"):
        indices, gains = facility_location(x, 5, quality=quality, alpha=1.0, optimizer=optimizer)
        assert indices.tolist() == np.argsort(-quality)[:5].tolist()
        assert np.array_equal(gains, quality[indices])
    indices, gains = facility_location(x, 20, quality=quality, alpha=1.0, optimizer="stochastic")
    assert len(set(indices.tolist())) == 20 and np.array_equal(gains, quality[indices])


def test_refuses_rows_whose_products_overflow_by_number():
    x = np.ones((10, 3))
    x[6] = 1e25
    with pytest.raises(UsageError, match="row 6 is so long that float32 overflows"):
        facility_location(x, 3, similarity="dot")
    assert len(facility_location(x, 3)[0]) == 3  # cosine does not mind


def test_refuses_rows_that_are_not_finite_by_number():
    for bad in (np.nan, np.inf):
        x = random_rows(20, 3)
        x[7, 1] = bad
        with pytest.raises(UsageError, match="x: row 7 holds NaN or infinity"):
            facility_location(x, 3)
        with pytest.raises(UsageError, match="queries: row 7 holds NaN or infinity"):
            facility_location(x[:5], 3, queries=x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": -1}, "k=-1 must not be negative"),
        ({"k": 2.5}, "k must be a whole number of rows"),
        ({"k": -1.0, "costs": np.ones(20)}, "k is the total cost"),
        ({"costs": np.zeros(20)}, "costs: row 0 costs 0, it must be above 0"),
        ({"costs": np.ones(3)}, r"costs must be \[20\]"),
        ({"optimizer": "greedy"}, "optimizer must be one of auto"),
        ({"similarity": "cos"}, "similarity must be one of cosine"),
        ({"gamma": 0.0}, "gamma must be positive"),
        ({"floor": np.nan}, "floor must be finite, or None"),
        ({"alpha": 0.5}, "above 0 only with quality"),
        ({"alpha": 2, "quality": np.ones(20)}, "alpha must be from 0 to 1"),
        ({"quality": np.full(20, np.nan), "alpha": 0.5}, "quality: row 0 has nan"),
        ({"weights": -np.ones(20)}, "weights: row 0 has -1.0"),
        ({"queries": np.ones((4, 2))}, "queries must have 3 columns"),
        ({"initial": [20]}, "initial: there is no row 20"),
        ({"groups": ([0] * 3, {})}, r"one label a row, \[20\]"),
        ({"groups": ([0] * 20, {1: 3})}, "no row has the label 1"),
        ({"groups": ([0] * 20, {0: -3})}, "the quota of 0 must be a whole number"),
        ({"neighbours": 0}, "neighbours must be a whole number of at least 1"),
        ({"neighbours": 3, "similarity": "rbf"}, "neighbours= takes similarity='cosine' or 'dot'"),
        ({"optimizer": "partitioned", "costs": np.ones(20)}, "takes neither costs nor groups nor initial"),
        ({"epsilon": 1.0}, "epsilon must be between 0 and 1"),
    ],
    ids=str,
)
def test_refuses_wrong_arguments(options, message):
    with pytest.raises(UsageError, match=message):
        facility_location(random_rows(20, 3), **({"k": 3} | options))


def test_edges_bytes_are_left_where_they_do_not_pay(monkeypatch):
    """Rows whose first feature is a thousand times the others: bytes hold nothing of what tells them apart, and there
    is no room to keep all rows that this lets in.
    """
    left, leave = [], Coverage.leave_rounding
    monkeypatch.setattr("fastsel.selectors.coverage.CACHE_BYTES", 0)
    monkeypatch.setattr(Coverage, "leave_rounding", lambda self: (left.append(1), leave(self)))
    x = random_rows(600, 40)
    x[:, 0] = 1000
    assert_same(facility_location(x, 80), naive(similarities(x), 80))
    if native.unavailable() is None and native.instruction_set() == "avx512vnni":
        assert left == [1]


@pytest.fixture
def in_bfloat16(monkeypatch):
    """Gains from rows rounded to bfloat16, as on a GPU; the list receives a number where float32 is gone back to."""
    left, start, leave = [], Coverage.__init__, Coverage.leave_rounding

    def rounded(self, *arguments, **options):
        start(self, *arguments, **options)
        if self.rounded_to:
            self.rounded_to = "bfloat16"

    monkeypatch.setattr(Coverage, "__init__", rounded)
    monkeypatch.setattr(Coverage, "leave_rounding", lambda self: (left.append(1), leave(self)))
    return left


@pytest.mark.parametrize("optimizer", ["auto", "incremental", "lazy", "naive"])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_float64_greedy_from_rows_in_bfloat16(kind, optimizer, in_bfloat16):
    x = KINDS[kind](400, 24)
    found = facility_location(x, 60, optimizer=optimizer, implementation="torch")
    assert_same(found, naive(similarities(x), 60))
    queries = KINDS[kind](150, 24)[::-1].copy()
    assert_same(facility_location(x, 40, queries=queries, optimizer=optimizer, implementation="torch"),
                naive(similarities(x, queries), 40))  # fmt: skip


def test_edges_bfloat16_is_left_where_it_does_not_pay(in_bfloat16, monkeypatch):
    monkeypatch.setattr("fastsel.selectors.coverage.CACHE_BYTES", 0)
    x = random_rows(600, 40)
    x[:, 0] = 1000
    assert_same(facility_location(x, 80, implementation="torch"), naive(similarities(x), 80))
    assert in_bfloat16 == [1]
