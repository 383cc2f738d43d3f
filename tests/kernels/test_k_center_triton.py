"""k_center's Triton kernel without a GPU: values in the interpreter, machine code, and what that code should take."""

import pytest
import torch

triton = pytest.importorskip("triton")

from fastsel.kernels._runtime import triton_predict, triton_proof  # noqa: E402
from fastsel.kernels._runtime.testing import assert_as_exact, placed  # noqa: E402
from fastsel.kernels._runtime.triton_launch import INTERPRETED, Launch  # noqa: E402
from fastsel.kernels._runtime.triton_proof import assert_sound, code_of  # noqa: E402
from fastsel.kernels.k_center import gpu_triton as kernel  # noqa: E402
from fastsel.kernels.k_center import k_center, reference  # noqa: E402
from fastsel.kernels.k_center.cases import CASES, Case, make_inputs  # noqa: E402

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
    x = torch.zeros(3, 4)
    assert kernel.unsupported(x, x, None, None, x[0], x[0]) == "needs a CUDA or ROCm device; these tensors are on cpu"
    assert "takes float32, bfloat16 and float16" in kernel.unsupported(x.double(), x, None, None, x[0], x[0])
    turned = torch.empty(2**14, 2**17, device="meta").T
    assert "points spreads 16384 over 131072 each" in kernel.unsupported(turned, turned, None, None, x[0], x[0])


# ------------------------------------------------------------------------------------ in the interpreter's process


def compare(inputs):
    inputs = [placed(x) for x in inputs]
    points, centres, nearest, rows, *sqnorms = inputs
    got = k_center(
        points, centres, nearest, rows=rows, point_sqnorms=sqnorms[0], centre_sqnorms=sqnorms[1],
        implementation="triton",
    )  # fmt: skip
    widened = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    truth, plain = reference.compute(*widened), reference.compute(*inputs)
    assert_as_exact(got.nearest, truth[0], plain[0], reduction_length=points.shape[1])
    for block, at in enumerate(got.farthest.tolist()):
        values = got.nearest[128 * block : 128 * (block + 1)]
        assert at == 128 * block + int((values == values.max()).nonzero()[0, 0])
    return got


@pytest.fixture(params=[pytest.param(0, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow), 256])
def small_tiles(monkeypatch, request):
    """Few centres a tile and few features a step: many passes in a small case."""
    table = {key: (128, request.param, 16, 16, 4, 2, "ieee") for key in kernel.LAUNCH_TABLE}
    monkeypatch.setattr(kernel, "LAUNCH_TABLE", table)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["one", "tiny", "empty", "no_rows", "odd", "some_rows"])
def check_values_match_the_reference(name, dtype):
    compare(make_inputs(CASES[name], dtype, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("architecture", triton_proof.TARGETS)
@pytest.mark.parametrize(
    ("b", "d"), [(9, 128), (30, 128), (150, 96), (150, 77)], ids=["fewest", "few", "many", "unaligned"]
)
def check_values_with_the_tiles_of_every_architecture(architecture, b, d, dtype, monkeypatch):
    monkeypatch.setattr(kernel, "triton_architecture", lambda tensor: architecture)
    compare(make_inputs(Case("tiles", 200, d, b, "", m=180), dtype, "cpu"))


@pytest.mark.usefixtures("small_tiles")
def check_values_of_any_strides_and_ties():
    points, centres, nearest, _, *sqnorms = make_inputs(Case("s", 140, 32, 20, ""), torch.float32, "cpu")
    points = points.T.contiguous().T
    centres = torch.randn(40, 64)[::2, ::2].copy_(centres)
    compare((points, centres, torch.randn(280)[::2].copy_(nearest), None, *sqnorms))
    same = torch.ones(200, 16)
    got = compare((same, same[:2], None, None, torch.full((200,), 16.0), torch.full((2,), 16.0)))
    assert got.farthest.tolist() == [0, 128]


@pytest.mark.slow
def check_rows_beyond_two_to_the_31(spread_storage):
    far = 2**30  # elements between rows: row 2 begins at 2^31
    storage = spread_storage(2 * far + 16, torch.float32)
    points = storage.as_strided((3, 16), (far, 1))
    points.copy_(torch.randn(3, 16))
    sqnorms = points.square().sum(1)
    compare((points, points, None, torch.tensor([2, 0]), sqnorms, sqnorms))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("planted", [{"M": 141}, {"B": 19}, {"D": 16}], ids=str)
def check_planted_wrong_sizes_are_caught(planted, monkeypatch):
    plain_run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: plain_run(launch._replace(arguments=launch.arguments | planted)))
    inputs = make_inputs(Case("p", 140, 32, 20, "planted", begun=False), torch.float32, "cpu")
    inputs[1][19] = inputs[0][5]  # the last centre is the nearest of a point
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        compare(inputs)


# ------------------------------------------------------------------------------------ machine code


def launch_of(architecture, dtype, n=1_000_000, b=256, d=1024, rows=False, begun=True):
    def meta(*shape, of=dtype):
        return torch.empty(shape, dtype=of, device="meta")

    floats, m = torch.float32, n
    inputs = (
        meta(n, d), meta(b, d), meta(m, of=floats) if begun else None, meta(m, of=torch.int64) if rows else None,
        meta(n, of=floats), meta(b, of=floats),
    )  # fmt: skip
    (launch,) = kernel.plan(*inputs, architecture=architecture)[1]
    return launch


@outside
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_machine_code_for_16_bit_points(architecture):
    code = assert_sound(launch_of(architecture, torch.bfloat16), architecture)
    assert code.stack_bytes == code.local_accesses == code.atomics == code.narrow_loads == 0
    assert any(opcode.startswith(triton_proof.MATRIX_OPCODE[architecture]) for opcode in code.matrix)


@outside
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("rows", [False, True], ids=["all", "rows"])
@pytest.mark.parametrize("key", kernel.LAUNCH_TABLE, ids=lambda key: "-".join(map(str, key)))
def test_machine_code_of_every_entry(key, rows):
    architecture, itemsize, variant = key
    b, d = {"fewest": 9, "few": 40}.get(variant, 256), (77 if variant == "unaligned" else 1024)
    launch = launch_of(architecture, DTYPES[itemsize], b=b, d=d, rows=rows, begun=not rows)
    blocks = tuple(launch.constants[name] for name in ("BLOCK_N", "MORE_N", "BLOCK_B", "BLOCK_D"))
    assert blocks == kernel.LAUNCH_TABLE[key][:4] and blocks[0] == 128
    assert_sound(launch, architecture, allowed=["narrow loads"] if variant == "unaligned" else [])


@outside
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("architecture", triton_proof.TARGETS)
def test_machine_code_of_masked_features_and_sizes_of_one(architecture):
    # 80 features are a block and a masked part of one; sizes of 1 become constants, which is other code.
    assert_sound(launch_of(architecture, torch.bfloat16, n=1, b=1, d=80), architecture)
    assert_sound(launch_of(architecture, torch.float32, n=1, b=1, d=1), architecture, allowed=["narrow loads"])


# Most that a prediction may exceed the floor; what lies above 1.3 has its reason in docs/measured.md, or is a tile
# that was fastest on an H200.
PREDICTED = [
    ("A100", torch.bfloat16, 64, 1.05), ("A100", torch.bfloat16, 256, 1.15), ("A100", torch.float32, 256, 1.05),
    ("H100", torch.bfloat16, 64, 1.05), ("H100", torch.bfloat16, 256, 1.2), ("H100", torch.bfloat16, 1024, 1.4),
    ("H100", torch.float32, 256, 1.1),
    ("B200", torch.bfloat16, 64, 1.05), ("B200", torch.bfloat16, 256, 1.15), ("B200", torch.float32, 64, 1.3),
    ("B200", torch.bfloat16, 1024, 1.2), ("B200", torch.float32, 1024, 1.4),
]  # fmt: skip


@outside
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize(("chip", "dtype", "b", "most"), PREDICTED, ids=[f"{c}-{d}-{b}" for c, d, b, _ in PREDICTED])
def test_predicted_time(chip, dtype, b, most):
    architecture = triton_predict.CHIPS[chip].architecture
    launch = launch_of(architecture, dtype, b=b)
    work = kernel.work(launch, 1_000_000, b, 1024)
    prediction = triton_predict.predict(code_of(launch, architecture), work, triton_predict.CHIPS[chip])
    assert 1 <= prediction.ratio <= most
