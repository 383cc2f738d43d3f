import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsel.kernels._runtime import native, rng
from fastsel.kernels._runtime.dispatch import NoImplementationError
from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.kernels.random_projection import cpu_native, random_projection, reference
from fastsel.kernels.random_projection.cases import CASES, Case, make_call

NEEDS_LIBRARY = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
BOTH = [pytest.param("native", marks=NEEDS_LIBRARY), "torch"]
ALL = [*BOTH, "reference"]
KINDS = ("sjlt", "rademacher")
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def assert_matches(inputs, implementation):
    x, k, options, out = inputs
    got = random_projection(x, k, **options, out=out.clone(), implementation=implementation)
    truth = random_projection(x.double(), k, **options, out=out.double(), implementation="reference")
    plain = random_projection(x, k, **options, out=out.clone(), implementation="reference")
    assert_as_exact(got, truth, plain, reduction_length=max(1, x.shape[1]))


def matches():
    for name in ("native", "torch"):
        for case in CASES.values():
            for dtype in [] if case.slow else DTYPES:
                if (name, dtype) != ("native", "float64"):  # native refuses float64
                    marks = [NEEDS_LIBRARY] * (name == "native")
                    yield pytest.param(name, case, DTYPES[dtype], id=f"{name}-{case.name}-{dtype}", marks=marks)


@pytest.mark.parametrize(("implementation", "case", "dtype"), list(matches()))
def test_matches_reference(implementation, case, dtype):
    assert_matches(make_call(case, dtype, "cpu"), implementation)


@pytest.mark.slow
@NEEDS_LIBRARY
@pytest.mark.parametrize("case", [case for case in CASES.values() if case.slow], ids=lambda case: case.name)
def test_matches_float64_blocks_at_full_size(case):
    """The reference's matrix would take 33 GB: the truth is that of float64 tiles, of some columns for dense signs."""
    x, k, options, out = make_call(case, torch.float32, "cpu")
    got = random_projection(x, k, **options, out=out.clone(), implementation="native")
    if case.kind == "sjlt":
        truth = random_projection(x.double(), k, **options, out=out.double(), implementation="torch")
    else:
        columns = torch.arange(k - 64, k)
        got, truth = got[:, columns], out[:, columns].double()
        for start in range(0, case.p, 1 << 16):
            tile = x[:, start : start + (1 << 16)].double()
            numbers = torch.arange(case.first + start, case.first + start + tile.shape[1])
            truth += tile @ rng.rademacher_signs(options["seed"], numbers, columns).double()
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=8e-6 * float(truth.abs().max()))


@pytest.mark.parametrize("implementation", ALL)
def test_matches_the_words_themselves(implementation):
    """A single one in each row: out is a row of R, read off the map and the signs."""
    first, k = 2**40 - 3, 40
    numbers = torch.arange(first, first + 6)
    rows, signs = rng.sjlt_map(5, numbers, k, 2)
    got = random_projection(torch.eye(6), k, sparsity=2, seed=5, first=first, implementation=implementation)
    expected = torch.zeros(6, k).scatter_(1, rows.T, signs.T / 2**0.5)
    torch.testing.assert_close(got, expected)
    got = random_projection(torch.eye(6), k, kind="rademacher", seed=5, first=first, implementation=implementation)
    assert torch.equal(got, rng.rademacher_signs(5, numbers, torch.arange(k)))


@pytest.mark.parametrize("implementation", BOTH)
@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 10), p=st.integers(1, 700), k=st.integers(1, 150), sparsity=st.integers(1, 4),
    kind=st.sampled_from(KINDS), first=st.one_of(st.integers(0, 100), st.integers(2**40 - 400, 2**40)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_law_any_shape_and_options(implementation, b, p, k, sparsity, kind, first, seed):
    sparsity = min(sparsity, k) if kind == "sjlt" else 1
    case = Case("drawn", b, p, k, "", kind=kind, sparsity=sparsity, first=first)
    assert_matches(make_call(case, torch.float32, "cpu", seed), implementation)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 500), max_size=4), first=st.sampled_from([0, 13, 2**40]))
def test_law_pieces_add_up_to_the_whole(implementation, kind, cuts, first):
    x = torch.randn(3, 500, generator=torch.Generator().manual_seed(1))
    whole = random_projection(x, 50, kind=kind, first=first, implementation=implementation)
    out = torch.zeros(3, 50)
    edges = [0, *sorted(cuts), 500]
    for start, stop in reversed(list(zip(edges, edges[1:], strict=False))):
        piece = x[:, start:stop]
        same = random_projection(piece, 50, kind=kind, first=first + start, out=out, implementation=implementation)
        assert same is out
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", BOTH)
def test_law_masked_pieces_add_up_to_the_masked_whole(implementation):
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1))
    options = {"mask": 300, "total": 6000, "seed": 4, "implementation": implementation}
    whole = random_projection(x, 64, first=500, **options)
    out = random_projection(x[:, 1234:], 64, first=1734, **options)
    random_projection(x[:, :1234], 64, first=500, out=out, **options)
    torch.testing.assert_close(out, whole, rtol=0, atol=2e-5)
    kept = rng.coordinate_mask(4, 6000, 300)
    padded = torch.nn.functional.pad(x, (500, 500))
    torch.testing.assert_close(
        random_projection(padded[:, kept], 64, seed=4, implementation=implementation), whole, rtol=0, atol=2e-5
    )


@NEEDS_LIBRARY
@pytest.mark.parametrize("kind", KINDS)
def test_law_no_bit_depends_on_threads_batch_or_cuts_between_chunks(kind):
    p, k = 300_000 if kind == "sjlt" else 140_000, 200 if kind == "sjlt" else 70
    x, first, chunk = torch.randn(9, p, dtype=torch.bfloat16), 70_000, 2**17 if kind == "sjlt" else 2**16
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = random_projection(x, k, kind=kind, first=first, implementation="native")
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(random_projection(x, k, kind=kind, first=first, implementation="native"), expected)
    finally:
        torch.set_num_threads(before)
    for rows in (slice(0, 1), slice(3, 5), slice(2, 7), slice(8, 9)):
        got = random_projection(x[rows], k, kind=kind, first=first, implementation="native")
        assert torch.equal(got, expected[rows])
    out, start = torch.zeros(9, k), 0
    while start < p:
        stop = min(p, ((first + start) // chunk + 1) * chunk - first)
        piece = x[:, start:stop]
        random_projection(piece, k, kind=kind, first=first + start, out=out, implementation="native")
        start = stop
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("kind", "sparsity", "k"), [("sjlt", 1, 512), ("sjlt", 4, 500), ("rademacher", 1, 500)])
def test_law_inner_products_are_kept_up_to_one_over_root_k(kind, sparsity, k):
    """Over seeds: the mean of the projected inner product is the inner product, and its spread that of the theory.

    For unit vectors with cosine c: variance (1 + c^2) / k of the inner product, and (1 - c^2)^2 / k of the cosine.
    SJLT does better by the share of pairs of coordinates in one block, here 1 in 39.
    """
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(20_000, generator=generator)
    v = 0.6 * u + 0.8 * torch.randn(20_000, generator=generator)
    x = torch.nn.functional.normalize(torch.stack([u, v]), dim=1)
    c = float(x[0] @ x[1])
    n_seeds = 400
    scale = k if kind == "rademacher" else 1
    products, norms, cosines = [], [], []
    for seed in range(n_seeds):
        y = random_projection(x, k, kind=kind, sparsity=sparsity, seed=seed).double()
        products.append(float(y[0] @ y[1]) / scale)
        norms.append(float(y[0] @ y[0]) / scale)
        cosines.append(products[-1] / float(y[0].norm() * y[1].norm() / scale))
    for values, mean, variance in (
        (products, c, (1 + c * c) / k),
        (norms, 1.0, 2 / k),
        (cosines, c, (1 - c * c) ** 2 / k),
    ):
        found = torch.tensor(values)
        assert abs(found.mean() - mean) < 4.5 * (variance / n_seeds) ** 0.5
        assert abs(found.std() / variance**0.5 - 1) < 4.5 / (2 * n_seeds) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_law_another_seed_is_another_matrix_and_the_same_seed_the_same(kind):
    x = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    a, b = (random_projection(x, 128, kind=kind, seed=seed) for seed in (1, 2))
    assert torch.equal(a, random_projection(x, 128, kind=kind, seed=1 - 2**64))
    assert abs(float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))) < 0.35


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_edges_a_bad_element_spoils_its_own_row_alone(implementation, kind, bad):
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    clean = random_projection(x, 40, kind=kind, implementation=implementation)
    x[2, 17] = bad
    got = random_projection(x, 40, kind=kind, implementation=implementation)
    assert not torch.isfinite(got[2]).all()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(got[others], clean[others], rtol=0, atol=2e-5)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_edges_any_strides(implementation, kind):
    x = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    expected = random_projection(x, 33, kind=kind, implementation=implementation)
    turned, wide = x.T.contiguous().T, torch.randn(12, 400)[::2, ::2].copy_(x)
    out = torch.zeros(6, 50)[:, 5:38]
    for given_x in (turned, wide):
        out.zero_()
        random_projection(given_x, 33, kind=kind, out=out, implementation=implementation)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("kind", KINDS)
def test_edges_elements_beyond_two_to_the_31(implementation, kind, tmp_path):
    """A sparse file of 16 GB: three rows 2^31 elements apart, of which the few columns at each end are looked at."""
    far = 2**31 + 64
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * far + 128, dtype=torch.float32)
    x = storage.as_strided((3, 128), (far, 1))
    x.copy_(torch.randn(3, 128))
    got = random_projection(x, 17, kind=kind, first=2**40, implementation=implementation)
    expected = random_projection(x.clone(), 17, kind=kind, first=2**40, implementation=implementation)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@NEEDS_LIBRARY
@pytest.mark.slow
def test_edges_a_row_longer_than_two_to_the_31(tmp_path):
    """bfloat16 zeros but for some: b p = 2 (2^30 + 2^20) elements, more than 31 bits count."""
    p = 2**30 + 2**20
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * p, dtype=torch.bfloat16)
    x = storage.view(2, p)
    places = torch.tensor([0, 5, 2**29 + 1, p - 1])
    x[0, places], x[1, places] = 1.0, 2.0
    got = random_projection(x, 64, implementation="native")
    rows, signs = rng.sjlt_map(0, places, 64, 1)
    expected = torch.zeros(64).index_add_(0, rows[0], signs[0])
    assert torch.equal(got, torch.stack([expected, 2 * expected]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3)}, "x must have shape"),
        ({"x": torch.ones(3, 2, dtype=torch.int64)}, "x must be float32"),
        ({"k": 0}, "k must be 1 to 2"),
        ({"kind": "gaussian"}, "kind must be one of sjlt, rademacher, got 'gaussian'"),
        ({"sparsity": 9}, "sparsity must be 1 to k = 8"),
        ({"sparsity": 2, "kind": "rademacher"}, "1 for rademacher, got 2"),
        ({"first": -1}, "first must be 0 or more"),
        ({"first": 2**63 - 2}, "below 2"),
        ({"mask": 2}, "needs total"),
        ({"mask": 2, "total": 1}, "at least first"),
        ({"mask": 9, "total": 8}, "at least mask"),
        ({"mask": 2, "total": 4, "kind": "rademacher"}, "mask goes with kind='sjlt'"),
        ({"out": torch.ones(3, 7)}, r"out must have shape \[3, 8\]"),
        ({"out": torch.ones(3, 8, dtype=torch.float64)}, "out must be float32, got float64"),
        ({"out": torch.ones(8, 3).T}, "out must have contiguous rows"),
        ({"implementation": "cuda"}, "implementation='cuda' is not known"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        random_projection(**{"x": torch.ones(3, 2), "k": 8, **change})


def test_refuses_float64_in_native_code_and_takes_it_in_torch():
    x = torch.randn(2, 9, dtype=torch.float64)
    with pytest.raises(NoImplementationError, match="native: takes float32, bfloat16 and float16, got float64"):
        random_projection(x, 4, implementation="native")
    assert random_projection(x, 4).dtype == torch.float64
    assert reference.unsupported(x) is None


@NEEDS_LIBRARY
def test_auto_runs_the_compiled_library(caplog):
    with caplog.at_level("DEBUG", logger="fastsel.kernels"):
        random_projection(torch.ones(3, 2), 4)
    assert caplog.messages == [cpu_native.__name__]
