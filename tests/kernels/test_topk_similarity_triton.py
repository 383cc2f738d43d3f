"""topk_similarity on a GPU without a GPU: its values in Triton's interpreter, and what its machine code holds."""

import pytest
import torch

pytest.importorskip("triton")

from fastsel.kernels._runtime import triton_predict  # noqa: E402
from fastsel.kernels._runtime.testing import assert_as_exact, placed  # noqa: E402
from fastsel.kernels._runtime.triton_launch import INTERPRETED, Launch  # noqa: E402
from fastsel.kernels._runtime.triton_proof import MATRIX_OPCODE, TARGETS, assert_sound, code_of  # noqa: E402
from fastsel.kernels.topk_similarity import gpu_triton as kernel  # noqa: E402
from fastsel.kernels.topk_similarity import reference, topk_similarity  # noqa: E402
from fastsel.kernels.topk_similarity.cases import CASES, Case, make_inputs  # noqa: E402

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
    """Little work for the interpreter, and many tiles and slices in a small case."""
    if INTERPRETED:
        monkeypatch.setattr(kernel, "LAUNCH_TABLE", dict.fromkeys(kernel.LAUNCH_TABLE, (16, 16, 16, 4, 2, "ieee")))
        monkeypatch.setattr(kernel, "LEAST_TILES", 2)
        monkeypatch.setattr(kernel, "PROGRAMS_WANTED", 4)


small = pytest.mark.usefixtures("small_tiles")


def compare(inputs):
    """The kernel against the reference in float64; returns the kernel's results."""
    inputs = [placed(x) for x in inputs]
    queries, points, k, metric, exclude, minimum = inputs
    got = topk_similarity(
        queries, points, k, metric=metric, exclude=exclude, minimum=minimum, implementation="triton"
    )._asdict()
    truth = reference.compute(queries.double(), points.double(), *inputs[2:])
    plain = reference.compute(*inputs)
    if len(queries):
        for name in ("values", "minimum") if minimum else ("values",):
            assert_as_exact(got[name], truth[name], plain[name], reduction_length=points.shape[1], what=name)
    assert torch.equal(got["indices"], truth["indices"])
    return got


FAST = [
    *(CASES[name] for name in ("one", "tiny", "no_queries", "padded")),
    Case("slices", 18, 86, 20, 4, "two blocks of queries, three slices, a short one, a masked end of features"),
    Case("squared", 17, 40, 16, 6, "one slice, distances, each without itself", "sqeuclidean", "long", True),
]


@small
@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def check_matches_the_reference(case):
    compare(make_inputs(case, torch.float32, "cpu"))


@small
def check_16_bit_rows():
    compare(make_inputs(FAST[-1], torch.bfloat16, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("odd_squared", torch.float32), ("itself", torch.float16)])
def check_matches_the_reference_on_larger_cases(name, dtype):
    compare(make_inputs(CASES[name], dtype, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "dtype", "k"),
    [
        *((architecture, dtype, 4) for architecture in TARGETS for dtype in DTYPES.values()),
        ("sm_90", torch.float32, 50),
    ],
)
def check_tiles_of_every_architecture(architecture, dtype, k, monkeypatch):
    monkeypatch.setattr(kernel, "triton_architecture", lambda tensor: architecture)
    compare(make_inputs(Case("tiles", 70, 290, 80, k, "two blocks of queries for most, several tiles"), dtype, "cpu"))


@small
def check_ties_go_to_the_lowest_point_of_all_slices():
    points = torch.randint(0, 2, (30, 6), generator=torch.Generator().manual_seed(0)).float()
    queries = torch.randint(0, 2, (9, 6), generator=torch.Generator().manual_seed(1)).float()
    compare((queries, points.repeat(3, 1), 5, "dot", None, True))


@small
def check_points_with_nan_are_as_if_they_were_not_there():
    queries, points, k, *_ = make_inputs(Case("nan", 5, 70, 16, 5, ""), torch.float32, "cpu")
    points[[0, 41]] = torch.nan
    queries[3, 1] = torch.nan
    queries, points = placed(queries), placed(points)
    for metric in ("dot", "sqeuclidean"):
        got = topk_similarity(queries, points, k, metric=metric, minimum=True, implementation="triton")
        truth = reference.compute(queries.double(), points.double(), k, metric, None, True)
        assert torch.equal(got.indices, truth["indices"])
        torch.testing.assert_close(got.minimum.double(), truth["minimum"], rtol=1e-5, atol=1e-5)


@small
def check_any_strides():
    queries, points, *rest = make_inputs(Case("s", 9, 60, 16, 5, ""), torch.float32, "cpu")
    wide = torch.randn(120, 32)[::2, ::2].copy_(points)
    compare((queries.T.contiguous().T, wide, *rest))


@small
def check_the_bits_do_not_depend_on_slices_or_on_the_batch(monkeypatch):
    queries, points, *rest = make_inputs(Case("b", 17, 70, 20, 5, ""), torch.float32, "cpu")
    whole = compare((queries, points, *rest))
    few = compare((queries[:3], points, *rest))
    monkeypatch.setattr(kernel, "PROGRAMS_WANTED", 1)
    one_slice = compare((queries, points, *rest))
    for name in ("values", "indices", "minimum"):
        assert torch.equal(whole[name], one_slice[name]) and torch.equal(whole[name][:3], few[name])


@pytest.mark.slow
@small
def check_rows_beyond_two_to_the_31(spread_storage):
    far = 2**30  # elements between rows: row 2 begins at 2^31
    storage = spread_storage(2 * far + 16, torch.float32)
    rows = storage.as_strided((3, 16), (far, 1))
    rows.copy_(torch.randn(3, 16))
    compare((rows, torch.randn(20, 16), 2, "dot", None, True))
    compare((torch.randn(20, 16), rows, 2, "dot", None, True))


# ------------------------------------------------------------------------------------ planted faults: each is caught


def _planted():
    inputs = make_inputs(Case("p", 8, 64, 16, 3, "planted"), torch.float32, "cpu")
    return kernel.plan(*inputs, architecture="sm_90")


@small
def check_planted_reading_past_the_points_is_caught():
    import triton

    _, (scan, _) = _planted()
    with pytest.raises(triton.runtime.errors.InterpreterError, match="OutOfBoundsError"):
        scan._replace(arguments=scan.arguments | {"N": 66, "slice_points": 80}).run()


@small
def check_planted_a_slice_left_out_is_caught(monkeypatch):
    plain_run = Launch.run

    def run(launch):
        plain_run(launch._replace(grid=(launch.grid[0], 1)) if launch.kernel is kernel.scan_kernel else launch)

    monkeypatch.setattr(Launch, "run", run)
    with pytest.raises(AssertionError):
        compare(make_inputs(FAST[-2], torch.float32, "cpu"))


# ------------------------------------------------------------------------------------ machine code

machine = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
    pytest.mark.usefixtures("compiled_afresh"),
]
# Most that a prediction may exceed the floor; above 1.3 the reason is in docs/measured.md.
PREDICTED = [
    ("A100", torch.bfloat16, 1.3),
    ("A100", torch.float32, 1.1),
    ("H100", torch.bfloat16, 1.6),
    ("H100", torch.float32, 1.1),
]
SIZES = (1_000_000, 1_000_000, 1024)  # queries, points, features


def launches(architecture, dtype, sizes=SIZES, k=10, metric="sqeuclidean", exclude=True):
    b, n, d = sizes
    queries, points = (torch.empty(rows, d, dtype=dtype, device="meta") for rows in (b, n))
    number = torch.empty(b, dtype=torch.int64, device="meta") if exclude else None
    return kernel.plan(queries, points, k, metric, number, True, architecture=architecture)[1]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
class TestMachineCode:
    pytestmark = machine

    def test_scan_of_16_bit_rows(self, architecture):
        code = assert_sound(launches(architecture, torch.bfloat16, metric="dot")[0], architecture)
        assert code.stack_bytes == code.local_accesses == code.atomics == code.narrow_loads == 0
        assert any(opcode.startswith(MATRIX_OPCODE[architecture]) for opcode in code.matrix)


class TestAllMachineCode:
    pytestmark = machine

    def test_deciding_on_hopper(self):
        assert_sound(launches("sm_90", torch.bfloat16)[1], "sm_90")

    @pytest.mark.slow
    @pytest.mark.parametrize("key", kernel.LAUNCH_TABLE, ids=lambda key: "-".join(map(str, key)))
    def test_every_entry_of_the_table(self, key):
        architecture, itemsize, variant = key
        sizes = (5000, 50_001, 200) if variant == "unaligned" else (5000, 50_000, 384)
        k, metric = {"few": (10, "dot"), "some": (25, "sqeuclidean")}.get(variant, (50, "sqeuclidean"))
        scan, decide = launches(architecture, DTYPES[itemsize], sizes, k, metric)
        blocks = tuple(scan.constants[name] for name in ("BLOCK_Q", "BLOCK_P", "BLOCK_D"))
        assert blocks == kernel.LAUNCH_TABLE[key][:3]
        assert_sound(scan, architecture, allowed=["narrow loads"] if variant == "unaligned" else [])
        assert_sound(decide, architecture)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
    def test_sizes_and_strides_of_one_compile(self, dtype):
        for launch in launches("sm_90", dtype, (1, 1, 1), 1, "dot", False):
            assert_sound(launch, "sm_90", allowed=["narrow loads"])

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("chip", "dtype", "most"), PREDICTED, ids=[f"{chip}-{dtype}" for chip, dtype, _ in PREDICTED]
    )
    def test_predicted_time(self, chip, dtype, most):
        chip = triton_predict.CHIPS[chip]
        scan = launches(chip.architecture, dtype, metric="dot")[0]
        prediction = triton_predict.predict(code_of(scan, chip.architecture), kernel.work(scan, *SIZES), chip)
        assert 1 <= prediction.ratio <= most


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_refuses_what_it_cannot_count():
    x = torch.zeros(2, 4)
    assert kernel.unsupported(x, x, 2, "dot", None, False) == "needs a CUDA or ROCm device; these tensors are on cpu"
    assert "k = 200 needs 205" in kernel.unsupported(x, x, 200, "dot", None, False)
    assert "1 to 2^31 points" in kernel.unsupported(x, x[:0], 2, "dot", None, False)
    wide = torch.empty(2**14, 2**17, device="meta").T
    wide, queries = torch.empty(2**14, 2**17, device="meta").T, torch.empty(4, 2**14, device="meta")
    assert "points spread 16384 over 131072 each" in kernel.unsupported(queries, wide, 2, "dot", None, False)
