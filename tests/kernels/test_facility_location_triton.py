"""facility_location's Triton kernel without a GPU: values in the interpreter, machine code, and predicted times."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastsel.kernels._runtime import triton_predict, triton_proof  # noqa: E402
from fastsel.kernels._runtime.testing import EPSILON, placed  # noqa: E402
from fastsel.kernels._runtime.triton_launch import INTERPRETED, Launch  # noqa: E402
from fastsel.kernels._runtime.triton_proof import assert_sound, code_of  # noqa: E402
from fastsel.kernels.facility_location import facility_location, reference  # noqa: E402
from fastsel.kernels.facility_location import gpu_triton as kernel  # noqa: E402
from fastsel.kernels.facility_location.cases import CASES, Case, make_inputs  # noqa: E402

DTYPES = {2: torch.bfloat16, 4: torch.float32}
outside = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")


@outside
@pytest.mark.parametrize(
    "expression", [pytest.param("not slow", id="fast"), pytest.param("slow", marks=pytest.mark.slow, id="slow")]
)
def test_values_under_the_interpreter(expression, run_under_the_interpreter):
    run_under_the_interpreter(__file__, expression)


@outside
def test_refuses_what_it_cannot_take():
    x, best = torch.zeros(3, 4), torch.zeros(3)
    options = (best, None, None, "dot", 1.0)
    assert kernel.unsupported(x, x, *options) == "needs a CUDA or ROCm device; these tensors are on cpu"
    assert "takes float32, bfloat16 and float16" in kernel.unsupported(x.double(), x.double(), *options)
    turned = torch.empty(2**14, 2**17, device="meta").T
    assert "points has strides [1, 131072]" in kernel.unsupported(x, turned, *options)
    far = torch.empty(0, device="meta").as_strided((3, 4), (2**23, 1))
    assert "candidates has strides [8388608, 1]" in kernel.unsupported(far, x, *options)


# ------------------------------------------------------------------------------------ in the interpreter's process


def compare(inputs):
    """The kernel against the reference in float64; returns the kernel's gains.

    A gain may err by twice as much as plain float32 code does, and by the roundings of float32 sums within a tile.
    """
    inputs = [placed(x) for x in inputs]
    candidates, points, best, raised, weights, similarity, gamma = inputs
    got = facility_location(
        candidates, points, best, raised=raised, weights=weights, similarity=similarity, gamma=gamma,
        implementation="triton",
    )  # fmt: skip
    widened = [x.double() if isinstance(x, torch.Tensor) else x for x in inputs]
    truth, plain = reference.compute(*widened), reference.compute(*inputs)
    assert got.dtype == torch.float64 and got.shape == truth.shape
    if got.numel():
        size = 1.0 if weights is None else float(weights.abs().max())
        rounding = 4 * EPSILON[torch.float32] * (float(truth.abs().max()) + size * len(points) ** 0.5)
        allowed = 2 * float((plain - truth).abs().max()) + rounding
        assert float((got - truth).abs().max()) <= allowed
    return got


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles, slices and blocks of unequal parts in a small case."""
    table = {
        key: (32, 16, 32, 16, 4, 2, "tf32" if key[1] == 4 else "ieee", (1, 2, 4)[index % 3])
        for index, key in enumerate(kernel.LAUNCH_TABLE)
    }
    monkeypatch.setattr(kernel, "LAUNCH_TABLE", table)
    monkeypatch.setattr(kernel, "MOST_SLICE_POINTS", 64)
    monkeypatch.setattr(kernel, "GROUP", 2)


small = pytest.mark.usefixtures("small_tiles")
SMALL_CASES = [
    name for name, case in CASES.items() if not case.slow and case.n * case.m * case.d < 3_000_000 and name != "odd"
]


@small
@pytest.mark.parametrize("name", SMALL_CASES)
def check_values_match_the_reference(name):
    compare(make_inputs(CASES[name], torch.float32, "cpu"))


@small
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["tiny", "whole_tiles"])
def check_values_match_the_reference_in_16_bits(name, dtype):
    compare(make_inputs(CASES[name], dtype, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["odd", "wide", "update"])
def check_values_match_the_reference_on_larger_cases(name):
    compare(make_inputs(CASES[name], torch.float32, "cpu"))


TILES = Case("tiles", 300, 290, 96, "two blocks, two tiles")
VARIANTS = {
    "candidates": TILES._replace(n=50, raised=True),
    "points": TILES._replace(m=100, raised=True),
    "dot": TILES._replace(raised=True),
    "all": TILES._replace(raised=True, weights=True, similarity="exp_distance", gamma=0.5),
    "unaligned": TILES._replace(d=77, weights=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("key", kernel.LAUNCH_TABLE, ids=lambda key: "-".join(map(str, key)))
def check_values_with_the_tiles_of_every_architecture(key, monkeypatch):
    architecture, itemsize, variant = key
    monkeypatch.setattr(kernel, "triton_architecture", lambda tensor: architecture)
    compare(make_inputs(VARIANTS[variant], DTYPES[itemsize], "cpu"))


@small
def check_values_of_any_strides_and_with_some_points_unset():
    candidates, points, best, raised, weights, *rest = make_inputs(
        Case("s", 70, 90, 32, "", raised=True, weights=True), torch.float32, "cpu"
    )
    candidates = candidates.T.contiguous().T
    points = torch.randn(180, 64)[::2, ::2].copy_(points)
    best = torch.zeros(180)[::2].copy_(best)
    assert not any(x.is_contiguous() for x in (candidates, points, best))
    compare((candidates, points, best, raised, weights, *rest))
    best[::3] = -torch.inf
    for some in ((raised, weights), (raised, None), (None, weights), (None, None)):
        compare((candidates, points, best, *some, *rest))
    compare((candidates, points, best.double(), raised.double(), None, *rest))


@small
def check_points_that_did_not_move_add_nothing_and_runs_repeat():
    candidates, points, best, *_ = map(placed, make_inputs(Case("m", 90, 80, 48, ""), torch.float32, "cpu"))
    still = facility_location(candidates, points, best, raised=best.clone(), implementation="triton")
    assert still.tolist() == [0.0] * 90
    first, again = (facility_location(candidates, points, best, implementation="triton") for _ in range(2))
    assert torch.equal(first, again) and first.max() > 0
    raised = torch.maximum(best, points @ points[3])
    lost = facility_location(candidates, points, best, raised=raised, implementation="triton")
    after = facility_location(candidates, points, raised, implementation="triton")
    torch.testing.assert_close(first - lost, after, rtol=1e-5, atol=1e-5)


@triton.jit
def split_kernel(x_ptr, high_ptr, rest_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    high, rest = kernel.tf32_and_rest(tl.load(x_ptr + at))
    tl.store(high_ptr + at, high)
    tl.store(rest_ptr + at, rest)


def check_numbers_split_for_tf32_lose_nothing():
    x = torch.cat([torch.randn(2046) * 10.0 ** torch.arange(-30, 32, 62 / 2046).floor(), torch.tensor([0.0, -0.0])])
    x = placed(x)
    high, rest = torch.empty_like(x), torch.empty_like(x)
    Launch(split_kernel, (1,), {"x_ptr": x, "high_ptr": high, "rest_ptr": rest}, {"N": 2048}, {"num_warps": 4}).run()
    assert torch.equal(high.double() + rest.double(), x.double())
    assert not (high.view(torch.int32) & 0x1FFF).any()  # what a TF32 product leaves out
    assert (rest.abs() <= high.abs() * 2.0**-11).all()


@pytest.mark.slow
def check_rows_beyond_two_to_the_31(spread_storage):
    stride = 2**22  # elements: row 512 begins at 2^31
    storage = spread_storage(520 * stride, torch.bfloat16)
    far = storage.as_strided((520, 16), (stride, 1))
    far.copy_(torch.randn(520, 16))
    near = torch.randn(40, 16, dtype=torch.bfloat16)
    compare((far, near, torch.zeros(40), None, None, "dot", 1.0))
    compare((near, far, torch.zeros(520), None, None, "dot", 1.0))


@small
@pytest.mark.parametrize(
    "planted",
    [{"M": 79}, {"PADDED_M": 64}, {"N": 89}, {"D": 32}, {"slice_points": 16}, {"slices": 1}],
    ids=str,
)
def check_planted_wrong_sizes_are_caught(planted, monkeypatch):
    inputs = make_inputs(Case("p", 90, 80, 48, "planted", best="floor"), torch.float32, "cpu")
    compare(inputs)
    plain_run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: plain_run(launch._replace(arguments=launch.arguments | planted)))
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        compare(inputs)


@small
@pytest.mark.parametrize("name", ["best_ptr", "room_ptr", "weights_ptr"])
def check_planted_missing_vectors_are_caught(name, monkeypatch):
    case = Case("p", 90, 80, 48, "planted", raised=name != "weights_ptr", weights=name == "weights_ptr")
    inputs = make_inputs(case, torch.float32, "cpu")
    plain_run = Launch.run
    without = {name: None}
    monkeypatch.setattr(Launch, "run", lambda launch: plain_run(launch._replace(arguments=launch.arguments | without)))
    with pytest.raises(AssertionError):
        compare(inputs)


# ------------------------------------------------------------------------------------ machine code

MILLION = 2**20


def launches_of(architecture, dtype, n=MILLION, m=MILLION, d=1024, has_floor=True, **given):
    def meta(*shape, of=dtype):
        return torch.empty(shape, dtype=of, device="meta")

    vectors = [
        meta(m, of=torch.float32) if wanted else None for wanted in (True, *map(given.get, ("raised", "weights")))
    ]
    options = {"architecture": architecture, "has_floor": has_floor}
    return kernel.plan(meta(n, d), meta(m, d), *vectors, given.get("similarity", "dot"), 0.5, **options)[1]


@outside
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_machine_code_of_an_update_in_16_bits(architecture):
    code = assert_sound(launches_of(architecture, torch.bfloat16, raised=True)[-1], architecture)
    assert code.stack_bytes == code.local_accesses == code.atomics == code.narrow_loads == 0
    assert any(opcode.startswith(triton_proof.MATRIX_OPCODE[architecture]) for opcode in code.matrix)


OF_VARIANT = {
    "candidates": [{"n": 50}, {"n": 50, "raised": True}, {"n": 16, "weights": True}, {"n": 16, "has_floor": False}],
    "points": [{"m": 100}, {"m": 100, "raised": True}, {"m": 16, "weights": True}, {"m": 16, "has_floor": False}],
    "dot": [{}, {"raised": True}, {"weights": True}, {"has_floor": False}],
    "all": [
        {"raised": True, "weights": True},
        {"raised": True, "weights": True, "has_floor": False},
        {"raised": True, "weights": True, "similarity": "rbf"},
        {"raised": True, "weights": True, "similarity": "exp_distance"},
    ],
    "unaligned": [{"raised": True, "weights": True, "similarity": "exp_distance", "d": 77}],
}


@outside
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("key", kernel.LAUNCH_TABLE, ids=lambda key: "-".join(map(str, key)))
def test_machine_code_of_every_entry(key):
    architecture, itemsize, variant = key
    for given in OF_VARIANT[variant]:
        *measures, launch = launches_of(architecture, DTYPES[itemsize], **given)
        blocks = tuple(launch.constants[name] for name in ("BLOCK_C", "MORE_C", "BLOCK_P", "BLOCK_D"))
        assert blocks == kernel.LAUNCH_TABLE[key][:4]
        assert_sound(launch, architecture, allowed=["narrow loads"] if variant == "unaligned" else [])
        for measure in measures[:1]:
            assert_sound(measure, architecture)


@outside
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("architecture", triton_proof.TARGETS)
def test_machine_code_of_sizes_of_one_and_of_a_part_of_a_block(architecture):
    for sizes in ({"n": 1, "m": 1, "d": 1}, {"n": 1, "m": 1, "d": 1040}):
        for given in ({"raised": True}, {"weights": True, "similarity": "exp_distance"}):
            for launch in launches_of(architecture, torch.bfloat16, **sizes, **given):
                assert_sound(launch, architecture, allowed=["narrow loads"] if sizes["d"] == 1 else [])


@outside
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_float32_numbers_meet_in_three_products(architecture):
    launch = launches_of(architecture, torch.float32)[-1]
    text = triton_proof.compile_launch(launch, architecture).asm["ttir"]
    parts = 2 if launch.constants["MORE_C"] else 1
    assert text.count("tt.dot ") == 3 * parts and launch.constants["PRECISION"] == "tf32"


# Most that a prediction may exceed its floor; docs/measured.md has the table.
PREDICTED = [
    ("A100", torch.bfloat16, {}, 1.05),
    ("A100", torch.float32, {}, 1.05),
    ("H100", torch.bfloat16, {}, 1.1),
    ("H100", torch.bfloat16, {"raised": True}, 1.15),
    ("H100", torch.float32, {"raised": True}, 1.05),
    ("B200", torch.bfloat16, {"raised": True}, 1.2),
    ("B200", torch.float32, {"raised": True}, 1.1),
    ("H100", torch.bfloat16, {"raised": True, "m": 1024}, 1.2),
]


@outside
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize(("chip", "dtype", "given", "most"), PREDICTED, ids=str)
def test_predicted_time(chip, dtype, given, most):
    chip = triton_predict.CHIPS[chip]
    launch = launches_of(chip.architecture, dtype, **given)[-1]
    code = code_of(launch, chip.architecture)
    work = kernel.work(launch, MILLION, given.get("m", MILLION), 1024)
    if chip.architecture == "sm_90" and dtype == torch.bfloat16:  # its opcodes name their shapes
        assert hopper_flops_in_the_inner_loop(code) == work.flops
    assert 1 <= triton_predict.predict(code, work, chip).ratio <= most


def hopper_flops_in_the_inner_loop(code):
    opcodes, loops = triton_proof.instructions_and_loops(code.listing)
    ((start, stop),), _ = triton_proof.matrix_loops(opcodes, loops)
    flops = 0
    for opcode in opcodes[start:stop]:
        if opcode.startswith("HGMMA"):  # HGMMA.64x256x16: a group of four warps
            m, n, k = map(int, opcode.split(".")[1].split("x"))
            flops += 2 * m * n * k * code.num_warps // 4
    return flops
