"""random_projection's Triton kernels without a GPU: values in the interpreter, machine code, predicted times."""

import pytest
import torch

triton = pytest.importorskip("triton")

from fastsel.kernels._runtime import rng, triton_predict, triton_proof, triton_sjlt  # noqa: E402
from fastsel.kernels._runtime.testing import assert_as_exact, placed  # noqa: E402
from fastsel.kernels._runtime.triton_launch import INTERPRETED, Launch  # noqa: E402
from fastsel.kernels._runtime.triton_proof import assert_sound, code_of  # noqa: E402
from fastsel.kernels.random_projection import gpu_triton as kernel  # noqa: E402
from fastsel.kernels.random_projection import random_projection  # noqa: E402
from fastsel.kernels.random_projection.cases import CASES, Case, make_call  # noqa: E402

outside = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")


@outside
@pytest.mark.parametrize(
    "expression", [pytest.param("not slow", id="fast"), pytest.param("slow", marks=pytest.mark.slow, id="slow")]
)
def test_values_under_the_interpreter(expression, run_under_the_interpreter):
    run_under_the_interpreter(__file__, expression)


@outside
def test_refuses_what_it_cannot_take():
    x, out = torch.zeros(3, 4), torch.zeros(3, 2)
    options = (2, "sjlt", 1, 0, 0, out)
    assert kernel.unsupported(x, *options) == "needs a CUDA or ROCm device; these tensors are on cpu"
    assert "takes float32, bfloat16 and float16" in kernel.unsupported(x.double(), *options)


# ------------------------------------------------------------------------------------ in the interpreter's process


def compare(inputs):
    x, k, options, out = map(placed, inputs)
    got = random_projection(x, k, **options, out=out.clone(), implementation="triton")
    truth = random_projection(x.double(), k, **options, out=out.double(), implementation="reference")
    plain = random_projection(x, k, **options, out=out.clone(), implementation="reference")
    assert_as_exact(got, truth, plain, reduction_length=max(1, x.shape[1]))
    return got


@pytest.fixture
def small_tiles(monkeypatch):
    """Narrow tiles, short segments: several programs along every axis of the grid in a small case."""
    monkeypatch.setattr(triton_sjlt, "SJLT_TABLE", dict.fromkeys(triton_sjlt.SJLT_TABLE, (64, 2, 16, 1)))
    monkeypatch.setattr(kernel, "RADEMACHER_TABLE", {key: (16, 16, 4, 2, "ieee") for key in kernel.RADEMACHER_TABLE})
    monkeypatch.setattr(triton_sjlt, "FEWEST_LANES", 32)
    monkeypatch.setattr(triton_sjlt, "SUM_BLOCK", 32)
    for module in (kernel, triton_sjlt):
        monkeypatch.setattr(module, "segments_of", lambda first, p, _: (8, ((first + p - 1) >> 8) - (first >> 8) + 1))


SMALL = [
    Case("sjlt", 3, 400, 50, "", first=13),
    Case("sjlt_parts", 2, 300, 100, "", sparsity=3, first=5),
    Case("sjlt_exact", 3, 384, 128, ""),
    Case("sjlt_to_one", 2, 300, 1, "", first=7),
    Case("far", 3, 300, 64, "", first=2**38 - 100),
    Case("dense", 3, 300, 40, "", kind="rademacher", first=2**37 - 100),
    Case("dense_rows", 17, 90, 33, "", kind="rademacher", first=3),
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def check_values_match_the_reference(case):
    compare(make_call(case, torch.float32, "cpu"))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", [SMALL[0], SMALL[1], SMALL[2], SMALL[4]], ids=lambda case: case.name)
def check_values_of_blocks_that_shared_memory_does_not_hold(case, monkeypatch):
    monkeypatch.setattr(triton_sjlt, "SHARED_BITS", 4)
    compare(make_call(case, torch.float32, "cpu"))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
def check_values_of_16_bit_rows(kind, dtype):
    compare(make_call(Case("halves", 2, 100, 40, "", kind=kind, first=13), dtype, "cpu"))


@pytest.mark.parametrize(
    "name", ["one", "one_dense", "no_rows", "no_columns", "more_than_given", "near_the_end", "masked"]
)
def check_values_of_named_cases(name):
    compare(make_call(CASES[name], torch.float32, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", triton_proof.TARGETS)
@pytest.mark.parametrize("name", ["odd", "odd_dense", "whole_blocks"])
def check_values_with_the_tiles_of_every_architecture(architecture, name, monkeypatch):
    monkeypatch.setattr(kernel, "triton_architecture", lambda tensor: architecture)
    compare(make_call(CASES[name], torch.float32, "cpu"))


def check_values_are_the_map_backwards():
    """Ones in one block: out is the sign at each row that a coordinate meets."""
    rows, signs = rng.sjlt_map(3, torch.arange(2**40, 2**40 + 64), 100, 1)
    got = random_projection(placed(torch.ones(1, 64)), 100, seed=3, first=2**40, implementation="triton")
    assert torch.equal(got.cpu(), torch.zeros(1, 100).scatter_(1, rows, signs))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
def check_values_of_any_strides_and_a_bad_row(kind):
    x = placed(torch.randn(3, 200))
    x[1, 5] = float("nan")
    clean = random_projection(x, 33, kind=kind, implementation="triton")
    assert torch.isfinite(clean[[0, 2]]).all() and clean[1].isnan().any()
    turned = random_projection(x.T.contiguous().T, 33, kind=kind, implementation="triton")
    out = placed(torch.zeros(3, 64))[:, 5:38]
    wide = placed(torch.randn(6, 400))[::2, ::2].copy_(x)
    random_projection(wide, 33, kind=kind, out=out, implementation="triton")
    assert torch.equal(turned[[0, 2]], clean[[0, 2]]) and torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
def check_values_of_elements_beyond_two_to_the_31(kind, spread_storage):
    far = 2**31 + 64
    storage = spread_storage(2 * far + 128, torch.float32)
    x = storage.as_strided((3, 128), (far, 1))
    x.copy_(torch.randn(3, 128))
    got = random_projection(x, 17, kind=kind, first=2**40, implementation="triton")
    assert torch.equal(got, random_projection(x.clone(), 17, kind=kind, first=2**40, implementation="triton"))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
@pytest.mark.parametrize("planted", [{"P": 149}, {"first": 12, "first_units": 12}, {"seed": 1}], ids=str)
def check_planted_faults_are_caught(kind, planted, monkeypatch):
    plain_run = Launch.run

    def run(launch):
        wrong = dict(planted)
        if "seed" in wrong:
            wrong = {name: 77 for name in ("row_first", "key_first")}
        known = {name: value for name, value in wrong.items() if name in launch.arguments}
        plain_run(launch._replace(arguments=launch.arguments | known))

    monkeypatch.setattr(Launch, "run", run)
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        compare(make_call(Case("planted", 2, 150, 50, "", kind=kind, first=13), torch.float32, "cpu"))


# ------------------------------------------------------------------------------------ machine code


def launches_of(architecture, kind, dtype, b=64, p=2**27, k=8192, sparsity=1, first=0):
    def meta(*shape, of=dtype):
        return torch.empty(shape, dtype=of, device="meta")

    out = meta(b, k, of=torch.float32)
    return kernel.plan(meta(b, p), k, kind, sparsity, 5, first, out, architecture=architecture)


@outside
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_machine_code_of_16_bit_rows(architecture):
    dense, sums = launches_of(architecture, "rademacher", torch.bfloat16)
    code = assert_sound(dense, architecture)
    assert any(opcode.startswith(triton_proof.MATRIX_OPCODE[architecture]) for opcode in code.matrix)
    for launch in (launches_of(architecture, "sjlt", torch.bfloat16)[0], sums):
        code = assert_sound(launch, architecture)
        assert code.stack_bytes == code.local_accesses == code.atomics == 0


# Rows, coordinates, k, sparsity, first: sizes of one become constants, which is other code; k that is no power of two.
SHAPES = {
    "one_row": (1, 1_000_003, 8192, 1, 0),
    "any_k": (8, 1_000_003, 1000, 3, 77),
    "small_k": (16, 1_000_003, 100, 1, 2**40),
    "many_k": (16, 2**27, 65_536, 4, 0),
    "all_ones": (1, 1, 1, 1, 1),
}


@outside
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
@pytest.mark.parametrize("architecture", triton_proof.TARGETS)
def test_machine_code_of_every_entry(architecture, kind, dtype):
    assert_sound(launches_of(architecture, kind, dtype)[0], architecture)
    for b, p, k, sparsity, first in SHAPES.values():
        one = 1 if kind == "rademacher" else sparsity
        launch = launches_of(architecture, kind, dtype, b, p, k, one, first)[0]
        # Rows that begin at no multiple of 16 bytes, and tiles of few rows, are read narrowly.
        assert_sound(launch, architecture, allowed=["narrow loads"])


# Most that a prediction may exceed the floor, for 64 rows of Llama-2-7B's adapters (r = 128); see docs/measured.md.
PREDICTED = [
    ("A100", "sjlt", torch.float32, 1.05), ("H100", "sjlt", torch.float32, 1.05), ("B200", "sjlt", torch.float32, 1.5),
    ("A100", "sjlt", torch.bfloat16, 1.1), ("H100", "sjlt", torch.bfloat16, 1.2),
    ("H100", "rademacher", torch.float32, 1.1), ("A100", "rademacher", torch.bfloat16, 1.05),
    ("H100", "rademacher", torch.bfloat16, 1.3),
]  # fmt: skip


@outside
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize(("chip", "kind", "dtype", "most"), PREDICTED, ids=[f"{c}-{k}-{d}" for c, k, d, _ in PREDICTED])
def test_predicted_time(chip, kind, dtype, most):
    b, p, k = 64, 2**27, 8192
    chip = triton_predict.CHIPS[chip]
    launch = launches_of(chip.architecture, kind, dtype, b, p, k)[0]
    code = code_of(launch, chip.architecture)
    if kind == "rademacher":
        prediction = triton_predict.predict(code, kernel.work(launch, b, p, k), chip)
    else:
        blocks = 2 ** (launch.constants["SEGMENT_BITS"] - launch.constants["BITS"])
        programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
        needed = b * p * dtype.itemsize + 8 * launch.grid[0] * b * k
        numbers = launch.constants["ROWS"] * launch.constants["BLOCK_K"] * dtype.itemsize // 4
        prediction = triton_predict.predict_streaming(code, programs, blocks, needed, chip, gathered=numbers)
    assert 1 <= prediction.ratio <= most
