"""swiglu's Triton kernels without a GPU: values in the interpreter, machine code, and what that code should take."""

import pytest
import torch

triton = pytest.importorskip("triton")

from fastsel.kernels._runtime import triton_predict, triton_proof  # noqa: E402
from fastsel.kernels._runtime.testing import assert_as_exact, placed  # noqa: E402
from fastsel.kernels._runtime.triton_launch import INTERPRETED, Launch  # noqa: E402
from fastsel.kernels._runtime.triton_proof import assert_sound, code_of, programs_per_multiprocessor  # noqa: E402
from fastsel.kernels.swiglu import gpu_triton as kernel  # noqa: E402
from fastsel.kernels.swiglu import reference, swiglu, swiglu_gradient  # noqa: E402
from fastsel.kernels.swiglu.cases import CASES, Case, make_inputs  # noqa: E402

DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
ALL_DTYPES = (*DTYPES.values(), torch.float16)
outside = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")


@outside
@pytest.mark.parametrize(
    "expression", [pytest.param("not slow", id="fast"), pytest.param("slow", marks=pytest.mark.slow, id="slow")]
)
def test_values_under_the_interpreter(expression, run_under_the_interpreter):
    run_under_the_interpreter(__file__, expression)


@outside
def test_refuses_tensors_on_a_cpu():
    x = torch.zeros(3, 4)
    assert kernel.unsupported(x, x, None, None) == "needs a CUDA or ROCm device; these tensors are on cpu"


# ------------------------------------------------------------------------------------ in the interpreter's process


def found(gate, up, d_out, out=None):
    """[the output], or both gradients."""
    if d_out is None:
        return [swiglu(gate, up, implementation="triton")]
    return list(swiglu_gradient(gate, up, d_out, out=out, implementation="triton"))


def compare(inputs):
    inputs = [placed(x) for x in inputs]
    widened = [None if x is None else x.double() for x in inputs]
    got, truth, plain = found(*inputs), reference.compute(*widened), reference.compute(*inputs)
    if inputs[2] is None:
        truth, plain = [truth], [plain]
    for ours, exact, same in zip(got, truth, plain, strict=True):
        assert ours.dtype == inputs[0].dtype and ours.is_contiguous()
        assert_as_exact(ours, exact, same, reduction_length=1)
        if ours.element_size() == 2:  # rounded once; the interpreter cuts bfloat16
            units = 1.0 if INTERPRETED and ours.dtype == torch.bfloat16 else 0.5
            allowed = 1.01 * units * torch.finfo(ours.dtype).eps * exact.abs() + 1e-5
            assert ((ours.double() - exact).abs() <= allowed).all()
    return got


def drawn(t, f, gradient=True, dtype=torch.float32):
    return make_inputs(Case("drawn", t, f, gradient, ""), dtype, "cpu")


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["one", "tiny", "empty", "odd", "odd_gradient", "saturated", "saturated_gradient"])
def check_values_match_the_reference(name, dtype):
    compare(make_inputs(CASES[name], dtype, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["whole_blocks", "smollm2", "smollm2_gradient"])
def check_values_of_larger_cases(name, dtype):
    compare(make_inputs(CASES[name], dtype, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("key", kernel.LAUNCH_TABLE, ids=lambda key: "-".join(map(str, key)))
def check_values_with_the_blocks_of_every_architecture(key, gradient, monkeypatch):
    monkeypatch.setattr(kernel, "triton_architecture", lambda tensor: key[0])
    compare(drawn(67, 129, gradient, DTYPES[key[1]]))


@pytest.mark.parametrize("gradient", [False, True])
def check_values_of_any_strides(gradient):
    gate, up, d_out, _ = drawn(21, 1100, gradient)
    fused = torch.cat([gate, up], 1)  # what one product with both matrices gives: rows of a block and a masked part
    halves = fused[:, :1100], fused[:, 1100:]
    expected = compare((gate, up, d_out, None))
    others = [d_out] if d_out is None else [d_out, d_out[:1].expand(21, -1), d_out.T.contiguous().T]
    for other in others:
        got = compare((*halves, other, None))
        assert not gradient or other.stride(0) == 0 or all(map(torch.equal, got, expected))
    compare((gate.T.contiguous().T, up, d_out, None))
    compare((torch.stack([gate, up], 2)[..., 1], gate[:1].expand(21, -1), d_out, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def check_results_may_lie_where_inputs_lie(dtype):
    inputs = drawn(9, 700, dtype=dtype)[:3]
    expected = found(*map(placed, inputs))
    for first in range(3):
        for second in {0, 1, 2} - {first}:
            copies = [placed(x).clone() for x in inputs]
            got = found(*copies, out=(copies[first], copies[second]))
            assert got[0] is copies[first] and got[1] is copies[second]
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
            assert all(torch.equal(copies[i], placed(inputs[i])) for i in {0, 1, 2} - {first, second})


@pytest.mark.slow
def check_rows_beyond_two_to_the_31(spread_storage):
    far = 2**30  # elements between rows: row 2 begins at 2^31
    storage = spread_storage(2 * far + 16, torch.float32)
    gate = storage.as_strided((3, 16), (far, 1))
    gate.copy_(torch.randn(3, 16))
    compare((gate, gate, None, None))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("planted", [{"N": 900}, {"N": 903 + 32}, {"stride_up": 1}], ids=str)
def check_planted_wrong_sizes_are_caught(planted, gradient, monkeypatch):
    plain_run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: plain_run(launch._replace(arguments=launch.arguments | planted)))
    gate, up, d_out, _ = drawn(3, 903, gradient)
    up = torch.randn(3, 904)[:, :903]  # rows that a stride leads to
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        compare((gate, up, d_out, None))


# ------------------------------------------------------------------------------------ machine code


def launch_of(architecture, dtype, gradient, t=4096, f=11_008, spread=1):
    """That of the llama case, on tensors without memory; `spread`: inputs are parts of rows so many times as long."""
    inputs = [torch.empty(t, spread * f, dtype=dtype, device="meta")[:, :f] for _ in range(3 if gradient else 2)]
    (launch,) = kernel.plan(*inputs, *[None] * (4 - len(inputs)), architecture=architecture)[1]
    return launch


def everything():
    for key in kernel.LAUNCH_TABLE:
        for gradient in (False, True):
            marks = [] if key[1] == 2 and gradient and key[0] != "gfx942" else [pytest.mark.slow]
            yield pytest.param(*key, gradient, id=f"{key[0]}-{key[1]}-{gradient}", marks=marks)


@outside
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize(("architecture", "itemsize", "gradient"), list(everything()))
def test_machine_code(architecture, itemsize, gradient):
    for spread in (1, 2):
        launch = launch_of(architecture, DTYPES[itemsize], gradient, spread=spread)
        assert launch.constants["BLOCK"] == kernel.LAUNCH_TABLE[architecture, itemsize][0]
        code = assert_sound(launch, architecture)
        assert code.stack_bytes == code.local_accesses == code.atomics == code.shared_bytes == 0
        assert not code.matrix
        loads = {name: n for name, n in code.opcodes.items() if name.startswith(("LDG", "global_load", "buffer_load"))}
        vectors = (3 if gradient else 2) * (1 if architecture == "gfx942" else 2)  # a wave there has 64 lanes
        assert sum(loads.values()) == vectors and all("128" in name or "x4" in name for name in loads), loads
        # Latency is hidden by loads in flight: at least half of the warps a chip can hold.
        assert programs_per_multiprocessor(code, architecture) * code.num_warps >= (
            16 if architecture == "gfx942" else 32
        )


@outside
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("architecture", triton_proof.TARGETS)
def test_machine_code_of_odd_rows_and_of_over_two_to_the_31_elements(architecture, gradient):
    for dtype in DTYPES.values():
        assert_sound(launch_of(architecture, dtype, gradient, 1, 1), architecture)
        assert_sound(launch_of(architecture, dtype, gradient, 301, 129, spread=3), architecture)
        launch = launch_of(architecture, dtype, gradient, 2**20, 4096)
        assert launch.arguments["N"] == 2**32
        assert_sound(launch, architecture)


@outside
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_afresh")
def test_float64_is_computed_in_float64():
    for gradient in (False, True):
        text = triton_proof.compile_launch(launch_of("sm_90", torch.float64, gradient), "sm_90").asm["ttir"]
        assert "f64" in text and "f32" not in text


# Most that a prediction may exceed the floor, which is bytes.
PREDICTED = [(chip, dtype, 1.05) for chip in triton_predict.CHIPS for dtype in (torch.bfloat16, torch.float32)]


@outside
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("chip", "dtype", "most"), PREDICTED, ids=[f"{c}-{d}" for c, d, _ in PREDICTED])
def test_predicted_time(chip, dtype, most, gradient):
    figures = triton_predict.CHIPS[chip]
    launch = launch_of(figures.architecture, dtype, gradient)
    needed = (5 if gradient else 3) * 4096 * 11_008 * dtype.itemsize
    prediction = triton_predict.predict_straight(code_of(launch, figures.architecture), launch.grid[0], needed, figures)
    assert 1 <= prediction.ratio <= most


@outside
def test_predicted_time_of_code_without_a_loop():
    """Four warps issue 64 instructions each, one a cycle for each quarter; the program with a loop is refused."""
    text = "/*0010*/ FADD R0, R0, R0 ;\n" * 63 + "/*0020*/ EXIT ;\n"
    code = triton_proof.MachineCode(8, 0, 0, 0, 0, 4, *[{}] * 2, 0, 0, 0, frozenset(), text)
    chip = triton_predict.CHIPS["H100"]
    found = triton_predict.predict_straight(code, 132 * 1000, 0, chip)
    assert found.seconds == pytest.approx(1000 * 64 / chip.clock_hz) and found.inner_limit == "issue"
    assert triton_predict.predict_straight(code, 132, int(3.35e12), chip).seconds == pytest.approx(1)
    with pytest.raises(ValueError, match="has a loop"):
        looped = ".L_x_0:\n" + text.replace("/*0020*/ EXIT", "/*0020*/ BRA `(.L_x_0) ;\n/*0030*/ EXIT")
        triton_predict.predict_straight(code._replace(listing=looped), 1, 1, chip)
