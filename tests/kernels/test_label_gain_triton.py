"""The proofs of label_gain's Triton kernels that need no GPU: values in the interpreter, machine code, resources."""

import pytest
import torch

triton = pytest.importorskip("triton")

from fastsel.kernels._runtime.testing import assert_as_exact, placed  # noqa: E402
from fastsel.kernels._runtime.triton_launch import INTERPRETED  # noqa: E402
from fastsel.kernels._runtime.triton_proof import assert_sound, compile_launch, programs_per_multiprocessor  # noqa: E402
from fastsel.kernels.label_gain import gpu_triton, label_gain  # noqa: E402
from fastsel.kernels.label_gain.cases import CASES, Case, make_inputs  # noqa: E402
from fastsel.kernels.label_gain.label_rows import LabelRows  # noqa: E402

OPTIONS = ("rule", "phi", "a", "b", "alpha")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.parametrize(
    "expression", [pytest.param("not slow", id="fast"), pytest.param("slow", marks=pytest.mark.slow, id="slow")]
)
def test_values_under_the_interpreter(expression, run_under_the_interpreter):
    run_under_the_interpreter(__file__, expression)


# ------------------------------------------------------------------------------------ in the interpreter's process


def placed_rows(label_rows):
    arrays = (label_rows.indptr, label_rows.indices, label_rows.values)
    return LabelRows(*map(placed, arrays), label_rows.n_labels)


def compare(inputs):
    label_rows, state, rows, *options = (placed_rows(x) if isinstance(x, LabelRows) else placed(x) for x in inputs)
    options = dict(zip(OPTIONS, options, strict=True))
    got = label_gain(label_rows, state, rows, **options, implementation="triton")
    truth = label_gain(label_rows, state, rows, **options, implementation="reference")
    longest = int(label_rows.indptr.diff().max()) if len(label_rows) else 1
    assert_as_exact(got, truth, truth, reduction_length=longest)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["one", "tiny", "empty", "unlabelled", "exponential_exact", "few_exact"])
def check_values(name, dtype):
    compare(make_inputs(CASES[name], dtype, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["odd", "exponential", "few_of_many", "long_rows", "front"])
def check_values_of_larger_cases(name, dtype):
    compare(make_inputs(CASES[name], dtype, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["first_order", "exact"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def check_blocks_of_every_architecture(architecture, rule, monkeypatch):
    monkeypatch.setattr(gpu_triton, "triton_architecture", lambda tensor: architecture)
    case = Case("blocks", 150, 300, 20, "several blocks of rows and labels, each with a masked end", 130, rule)
    compare(make_inputs(case, torch.float32, "cpu"))


def check_a_rows_bits_do_not_depend_on_the_rows_beside_it():
    label_rows, state, _, *options = make_inputs(Case("bits", 70, 40, 20, ""), torch.float32, "cpu")
    whole = compare((label_rows, state, None, *options))
    part = compare((label_rows, state, torch.tensor([69, 3, 3]), *options))
    assert torch.equal(part, whole[[69, 3, 3]])


def check_planted_reading_past_the_entries_is_caught():
    label_rows, state, rows, *options = make_inputs(CASES["tiny"], torch.float32, "cpu")
    _, (_, add_up) = gpu_triton.plan(label_rows, state, rows, *options, architecture="sm_90")
    longer = label_rows.indptr.clone()
    longer[-1] += 8
    with pytest.raises(triton.runtime.errors.InterpreterError, match="OutOfBoundsError"):
        add_up._replace(arguments=add_up.arguments | {"indptr_ptr": longer}).run()


# ------------------------------------------------------------------------------------ machine code


def launches(architecture, dtype, rule, phi="power", asked=None):
    """Those of the tulu3 case, on tensors without memory."""
    label_rows = object.__new__(LabelRows)
    label_rows.indptr = torch.empty(939_001, dtype=torch.int64, device="meta")
    label_rows.indices = torch.empty(18_780_000, dtype=torch.int32, device="meta")
    label_rows.values = torch.empty(18_780_000, dtype=dtype, device="meta")
    label_rows.n_labels = 4531
    state = torch.empty(4531, dtype=torch.float64, device="meta")
    rows = None if asked is None else torch.empty(asked, dtype=torch.int64, device="meta")
    return gpu_triton.plan(label_rows, state, rows, rule, phi, 1e-6, 0.8, 1.0, architecture=architecture)[1]


def matters():
    for architecture, rule in gpu_triton.LAUNCH_TABLE:
        marks = [] if (architecture, rule) == ("sm_90", "first_order") else [pytest.mark.slow]
        yield pytest.param(architecture, rule, id=f"{architecture}-{rule}", marks=marks)


@compiles
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize(("architecture", "rule"), list(matters()))
def test_machine_code(architecture, rule):
    for dtype in (torch.float32, torch.float64):
        for launch in launches(architecture, dtype, rule, asked=None if dtype == torch.float32 else 4096):
            code = assert_sound(launch, architecture)
            assert code.stack_bytes == code.local_accesses == code.atomics == 0
            assert not code.matrix
            # Latency is hidden by programs that run beside each other: at least half of the warps a chip can hold.
            assert programs_per_multiprocessor(code, architecture) * code.num_warps >= (
                28 if architecture == "gfx942" else 32
            )


@compiles
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("phi", ["power", pytest.param("exp", marks=pytest.mark.slow)])
def test_everything_is_computed_in_float64(phi):
    """0.8 and 1e-6 as float32 would move gains by 1e-8: the compiler's text holds no float32 at all."""
    for rule in ("first_order", "exact"):
        for launch in launches("sm_90", torch.float64, rule, phi):
            text = compile_launch(launch, "sm_90").asm["ttir"]
            assert "f64" in text and "f32" not in text
