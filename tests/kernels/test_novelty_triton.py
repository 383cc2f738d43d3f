"""novelty on a GPU without a GPU: its values in Triton's interpreter, and what its machine code holds."""

import pytest
import torch

pytest.importorskip("triton")

from fastsel.kernels._runtime import triton_predict, triton_proof  # noqa: E402
from fastsel.kernels._runtime.testing import assert_as_exact, placed  # noqa: E402
from fastsel.kernels._runtime.triton_launch import INTERPRETED, Launch  # noqa: E402
from fastsel.kernels._runtime.triton_proof import TARGETS, assert_sound  # noqa: E402
from fastsel.kernels.novelty import gpu_triton as kernel  # noqa: E402
from fastsel.kernels.novelty import novelty, reference  # noqa: E402
from fastsel.kernels.novelty.cases import CASES, Case, make_inputs  # noqa: E402

DTYPES = {2: torch.bfloat16, 4: torch.float32}


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.parametrize(
    "expression", [pytest.param("not slow", id="fast"), pytest.param("slow", marks=pytest.mark.slow, id="slow")]
)
def test_values_under_the_interpreter(expression, run_under_the_interpreter):
    run_under_the_interpreter(__file__, expression)


# ------------------------------------------------------------------------------------ in the interpreter's process


@pytest.fixture
def small_tiles(monkeypatch):
    """Little work for the interpreter: tiles of 16, and runs of 16 values, so that 17 picks have to be merged."""
    if INTERPRETED:
        monkeypatch.setattr(kernel, "LAUNCH_TABLE", dict.fromkeys(kernel.LAUNCH_TABLE, (16, 16, 16, 4, 2, "ieee")))
        monkeypatch.setattr(kernel, "ORDER_BLOCK", {2: (16, 16, 4), 4: (16, 16, 4)})
        monkeypatch.setattr(kernel, "RUN", {"weighted": 16, "distance": 16})
        monkeypatch.setattr(kernel, "SORTED_VALUES", 32)  # the interpreter sorts about a hundred numbers a second


small = pytest.mark.usefixtures("small_tiles")


def compare(inputs):
    """The kernel against the reference in float64; returns the kernel's result."""
    inputs = [placed(x) for x in inputs]
    *tensors, rank_by = inputs
    got = novelty(*tensors, rank_by=rank_by, implementation="triton")
    truth = reference.compute(*(None if x is None else x.double() for x in tensors), rank_by)
    plain = reference.compute(*inputs)
    assert_as_exact(got, truth, plain, reduction_length=sum(tensors[1].shape))
    return got


FAST = [
    *(CASES[name] for name in ("one", "tiny", "empty", "no_picks", "bound_paper")),
    Case("one_run", 17, 14, 20, "two blocks of rows, a masked end of features", s=2),
    Case("runs", 3, 35, 20, "three runs, the last with three values", s=2),
    Case("runs_distance", 2, 20, 16, "two runs of 64-bit keys", "distance", "pick"),
    Case("row_density", 4, 9, 16, "one density", densities="row"),
    Case("order", 20, 9, 20, "two blocks of rows, two densities", "order", s=2),
]


@small
@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def check_matches_the_reference(case):
    compare(make_inputs(case, torch.float32, "cpu"))


@small
@pytest.mark.parametrize("rank_by", ["weighted", "order"])
def check_16_bit_rows(rank_by):
    compare((*make_inputs(FAST[-4], torch.bfloat16, "cpu")[:-1], rank_by))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank_by", ["weighted", "distance", "order"])
def check_tiles_as_they_are(rank_by, dtype):
    compare((*make_inputs(Case("real", 3, 100, 96, "a run of 128 values"), dtype, "cpu")[:-1], rank_by))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("architecture", TARGETS)
def check_values_of_every_architecture(architecture, dtype):
    """The first step alone: two blocks of rows, several of picks, a masked end of features, padding behind them."""
    inputs = [placed(x) for x in make_inputs(Case("tiles", 140, 300, 80, ""), dtype, "cpu")]
    rows, picks, _, p, q, _ = inputs
    launch = kernel.plan(*inputs, architecture=architecture)[1][0]
    launch.run()
    keys = launch.arguments["keys_ptr"]
    exact = (1 - rows.double() @ picks.double().T) * (p[:, None] + q)
    torch.testing.assert_close(keys[:, :300].double(), exact, rtol=3e-6, atol=3e-6)
    assert keys.shape == (140, 512) and (keys[:, 300:] == torch.inf).all()


@small
def check_equal_distances_of_different_runs_are_counted_once():
    """Every distance occurs many times, in every run: ranks are a permutation, or the sums are wrong."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 2, (2, 4), generator=generator).float()
    picks = torch.randint(0, 2, (25, 4), generator=generator).float()
    weights = torch.arange(25, 0, -1, dtype=torch.float64)[:, None]
    q = torch.randint(1, 3, (25,), generator=generator).double()
    for rank_by in ("weighted", "distance"):
        compare((rows, picks, weights, None, q, rank_by))


@small
def check_distances_below_zero():
    generator = torch.Generator().manual_seed(0)
    rows, picks = torch.randn(2, 8, generator=generator), torch.randn(21, 8, generator=generator)
    for rank_by in ("weighted", "distance", "order"):
        compare((rows, picks, torch.ones(21, 1, dtype=torch.float64).cumsum(0), None, None, rank_by))


@small
def check_any_strides():
    rows, picks, weights, p, q, _ = make_inputs(Case("s", 5, 20, 16, ""), torch.float32, "cpu")
    wide = torch.zeros(40, 32)[::2, ::2].copy_(picks)
    for rank_by in ("weighted", "order"):
        compare((rows.T.contiguous().T, wide, weights, p, q, rank_by))


@small
def check_the_bits_repeat_and_do_not_depend_on_the_batch():
    rows, picks, weights, p, q, _ = make_inputs(Case("b", 5, 12, 16, ""), torch.float32, "cpu")
    for rank_by in ("weighted", "distance", "order"):
        whole = compare((rows, picks, weights, p, q, rank_by))
        assert torch.equal(compare((rows[:3], picks, weights, p[:3], q, rank_by)), whole[:3])


@pytest.mark.slow
@small
def check_rows_beyond_two_to_the_31(spread_storage):
    far = 2**30  # elements between rows: row 2 begins at 2^31
    storage = spread_storage(2 * far + 16, torch.float32)
    rows = storage.as_strided((3, 16), (far, 1))
    rows.copy_(torch.randn(3, 16))
    weights = torch.ones(3, 1, dtype=torch.float64)
    for rank_by in ("weighted", "order"):
        compare((rows, torch.randn(3, 16), weights, None, None, rank_by))
        compare((torch.randn(3, 16), rows, weights, None, None, rank_by))


# ------------------------------------------------------------------------------------ planted faults: each is caught


@small
def check_planted_reading_past_the_rows_is_caught():
    import triton

    inputs = make_inputs(Case("p", 16, 10, 16, ""), torch.float32, "cpu")
    for rank_by in ("weighted", "order"):
        launch = kernel.plan(*inputs[:-1], rank_by, architecture="sm_90")[1][0]
        with pytest.raises(triton.runtime.errors.InterpreterError, match="OutOfBoundsError"):
            launch._replace(grid=(2, 1), arguments=launch.arguments | {"N": 40}).run()


@small
def check_planted_ties_counted_twice_are_caught(monkeypatch):
    """Equal values of two runs that both let the other first: the sums are wrong, and no comparison accepts them."""
    plain_run = Launch.run

    def run(launch):
        if launch.kernel is kernel.merge_kernel:
            keys = launch.arguments["keys_ptr"]
            keys[:, :16] = keys[:, 16:32]  # a run that stands there twice
        plain_run(launch)

    monkeypatch.setattr(Launch, "run", run)
    with pytest.raises(AssertionError):
        compare(make_inputs(FAST[6], torch.float32, "cpu"))


# ------------------------------------------------------------------------------------ machine code

machine_code = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
    pytest.mark.usefixtures("compiled_afresh"),
]


def meta(*shape, dtype):
    """A tensor with a shape and an aligned address, but no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(architecture, dtype, rank_by="weighted", n=256, t=1000, d=1024, densities=(True, True), s=1):
    p, q = (meta(size, dtype=torch.float64) if given else None for given, size in zip(densities, (n, t), strict=True))
    weights = meta(t, s, dtype=torch.float64)
    rows, picks = meta(n, d, dtype=dtype), meta(t, d, dtype=dtype)
    return kernel.plan(rows, picks, weights, p, q, rank_by, architecture=architecture)[1]


class TestMachineCode:
    pytestmark = machine_code

    @pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
    def test_the_append_bound(self, architecture):
        for dtype in DTYPES.values():
            (launch,) = launches(architecture, dtype, "order", n=1_000_000, t=1)
            code = assert_sound(launch, architecture)
            assert code.stack_bytes == code.local_accesses == code.atomics == 0
            assert code.wide_loads and not code.matrix
            # It reads its rows at the memory's rate: whatever else it does takes less.
            for chip in triton_predict.CHIPS.values():
                if chip.architecture == architecture:
                    passes, needed = 1024 // launch.constants["BLOCK_D"], 1_000_000 * (1024 * dtype.itemsize + 12)
                    found = triton_predict.predict_streaming(code, launch.grid[0], passes, needed, chip)
                    assert 1 <= found.ratio <= 1.05 and found.programs_resident >= 2

    def test_distances_of_16_bit_rows_on_hopper(self):
        assert_sound(launches("sm_90", torch.bfloat16)[0], "sm_90")

    @pytest.mark.slow
    @pytest.mark.parametrize("key", kernel.LAUNCH_TABLE, ids=lambda key: "-".join(map(str, key)))
    def test_every_entry_of_the_table(self, key):
        architecture, itemsize, alignment = key
        d = 1024 if alignment == "aligned" else 200
        launch = launches(architecture, DTYPES[itemsize], d=d)[0]
        assert (
            tuple(launch.constants[name] for name in ("BLOCK_N", "BLOCK_T", "BLOCK_D")) == kernel.LAUNCH_TABLE[key][:3]
        )
        assert_sound(launch, architecture, allowed=["narrow loads"] if alignment == "unaligned" else [])

    @pytest.mark.slow
    @pytest.mark.parametrize("densities", [(True, False), (False, True), (False, False)], ids=str)
    def test_other_densities(self, densities):
        for rank_by in ("distance", "order"):
            assert_sound(launches("sm_90", torch.bfloat16, rank_by, densities=densities)[0], "sm_90")

    @pytest.mark.slow
    @pytest.mark.parametrize(("rank_by", "t"), [("weighted", 200), ("distance", 100)])
    def test_sorting(self, rank_by, t):
        assert_sound(launches("sm_90", torch.bfloat16, rank_by, t=t)[1], "sm_90")

    @pytest.mark.slow
    def test_sorting_the_longest_run_and_merging(self):
        *_, sort, merge = launches("sm_90", torch.bfloat16, t=10_000)
        assert sort.constants["RUN"] == 4096 and sort.arguments["out_ptr"] is None
        for launch in (sort, merge):
            assert_sound(launch, "sm_90")

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
    def test_sizes_and_strides_of_one_compile(self, dtype):
        for rank_by in ("weighted", "order"):
            for launch in launches("sm_90", dtype, rank_by, n=1, t=1, d=1):
                assert_sound(launch, "sm_90", allowed=["narrow loads"])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_a_stream_that_has_no_loop_is_not_predicted():
    code = triton_proof.MachineCode(8, 0, 0, 0, 0, 4, *[{}] * 2, 0, 0, 0, frozenset(), "/*0010*/ EXIT ;")
    with pytest.raises(ValueError, match="no loop"):
        triton_predict.predict_streaming(code, 1, 1, 1, triton_predict.CHIPS["H100"])


def test_refuses_what_it_cannot_sort_and_cpu_tensors():
    x, weights = torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.float64)
    if not INTERPRETED:
        assert kernel.unsupported(x, x, weights, None, None, "order") == (
            "needs a CUDA or ROCm device; these tensors are on cpu"
        )
    many = torch.zeros(1, 4).expand(32_769, 4)
    assert "at most 32768 picks" in kernel.unsupported(x, many, weights, None, None, "weighted")
    assert "at most 16384 picks" in kernel.unsupported(x, many, weights, None, None, "distance")
    assert "sorts at most" not in (kernel.unsupported(x, many, weights, None, None, "order") or "")
    assert "takes float32" in kernel.unsupported(x.double(), x.double(), weights, None, None, "order")
