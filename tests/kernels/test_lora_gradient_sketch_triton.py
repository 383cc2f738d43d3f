"""lora_gradient_sketch's Triton kernels without a GPU: values in the interpreter, machine code, what it should take."""

import pytest
import torch

triton = pytest.importorskip("triton")

from fastsel.kernels._runtime import triton_predict, triton_proof, triton_sjlt  # noqa: E402
from fastsel.kernels._runtime.testing import assert_as_exact, placed  # noqa: E402
from fastsel.kernels._runtime.triton_launch import INTERPRETED, Launch  # noqa: E402
from fastsel.kernels._runtime.triton_proof import assert_sound, code_of  # noqa: E402
from fastsel.kernels.lora_gradient_sketch import AdamStep, SketchSpec, predicted_work, reference  # noqa: E402
from fastsel.kernels.lora_gradient_sketch import gpu_triton as kernel  # noqa: E402
from fastsel.kernels.lora_gradient_sketch.cases import CASES, Case, make_inputs  # noqa: E402

DTYPES = {2: torch.bfloat16, 4: torch.float32}
outside = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
SMALL = Case("small", (3, 20, 0, 17), 24, 20, 5, "several tiles everywhere, all with ends", s=3, k=40)


@outside
@pytest.mark.parametrize(
    "expression", [pytest.param("not slow", id="fast"), pytest.param("slow", marks=pytest.mark.slow, id="slow")]
)
def test_values_under_the_interpreter(expression, run_under_the_interpreter):
    run_under_the_interpreter(__file__, expression)


@outside
def test_refuses_what_it_cannot_take():
    inputs = make_inputs(CASES["tiny"], torch.float32, "cpu")
    assert kernel.unsupported(*inputs) == "needs a CUDA or ROCm device; these tensors are on cpu"
    x, *others = make_inputs(CASES["tiny"], torch.float64, "cpu")
    assert "x is float64" in kernel.unsupported(x, *others)
    spec = SketchSpec(8, kind="rademacher")
    assert "sketches by SJLT, got rademacher" in kernel.unsupported(*inputs[:-2], spec, None)


# ------------------------------------------------------------------------------------ in the interpreter's process


def compare(inputs, exact_results=None):
    inputs = [placed(x) for x in inputs]
    got = kernel.compute(*inputs)
    widened = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    truth, plain = exact_results or (reference.compute(*widened), reference.compute(*inputs))
    n_terms = len(inputs[0]) + inputs[2].numel() + inputs[3].numel()
    # Pairs of bfloat16 numbers hold 16 bits: the tolerance of a product in float32, 16 times.
    targets = inputs[8]
    in_pairs = inputs[0].dtype == torch.bfloat16 or (targets is not None and targets.dtype == torch.bfloat16)
    margin = 16 if in_pairs else 1
    for name in ("dots", "sqnorms", "sketch"):
        ours, exact, same_dtype = (getattr(result, name) for result in (got, truth, plain))
        assert (ours is None) == (exact is None)
        if ours is not None:
            error = assert_as_exact if margin == 1 else assert_close
            error(ours, exact, same_dtype.float(), reduction_length=margin * n_terms, what=name)
    return got


def assert_close(ours, exact, _, *, reduction_length, what):
    largest = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
    assert ours.numel() == 0 or (ours.double() - exact).abs().max() <= 1e-4 * largest, what


@pytest.fixture
def small_tiles(monkeypatch):
    """Little work for the interpreter, and many programs, chunks and passes in a small case."""
    monkeypatch.setattr(kernel, "PRODUCTS_TABLE", dict.fromkeys(kernel.PRODUCTS_TABLE, (16, 16, 16, 4, 2, 16)))
    monkeypatch.setattr(kernel, "GRADIENTS_TABLE", dict.fromkeys(kernel.GRADIENTS_TABLE, (16, 32, 16, 4, 2)))
    monkeypatch.setattr(kernel, "WHOLE", 32)
    monkeypatch.setattr(kernel, "GAMMAS", 1000)
    monkeypatch.setattr(kernel, "DOTS_STRETCH", 64)
    monkeypatch.setattr(kernel, "DOTS_BLOCK", dict.fromkeys((2, 4), (16, 16, 32, 4, 2)))
    monkeypatch.setattr(triton_sjlt, "SJLT_TABLE", dict.fromkeys(triton_sjlt.SJLT_TABLE, (64, 2, 16, 1)))
    monkeypatch.setattr(triton_sjlt, "FEWEST_LANES", 32)


small = pytest.mark.usefixtures("small_tiles")


@small
@pytest.mark.parametrize(
    "name",
    ["one", "tiny", "empty", "no_tokens"]
    + [pytest.param(n, marks=pytest.mark.slow) for n in ("sgd", "sign", "published", "bergson", "no_eps")],
)
def check_values_match_the_reference(name):
    compare(make_inputs(CASES[name], torch.float32, "cpu"))


@small
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def check_values_of_several_tiles_and_chunks(dtype):
    compare(make_inputs(SMALL, dtype, "cpu"))


@pytest.mark.slow
@small
@pytest.mark.parametrize("sparsity", [1, 3])
def check_sketches_of_coordinates_that_begin_anywhere(sparsity):
    inputs = [placed(x) for x in make_inputs(SMALL._replace(s=0, sparsity=sparsity), torch.float32, "cpu")]
    for first in (2**31 - 50, 2**40 + 5):
        compare((*inputs[:-2], SketchSpec(40, seed=-3, first=first, sparsity=sparsity), None))
    out = placed(torch.ones(4, 40))
    got = kernel.compute(*inputs[:-1], out)
    assert got.sketch is out
    wide = placed(torch.ones(4, 80))[:, ::2]
    torch.testing.assert_close(kernel.compute(*inputs[:-1], wide).sketch, out, rtol=1e-6, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("architecture", triton_proof.TARGETS)
def check_values_with_the_tiles_of_every_architecture(architecture, dtype, monkeypatch):
    monkeypatch.setattr(kernel, "triton_architecture", lambda tensor: architecture)
    compare(make_inputs(Case("tiles", (70, 3), 150, 140, 20, "", s=17, k=200), dtype, "cpu"))


@small
def check_an_example_that_is_not_finite_spoils_itself_alone():
    for step in ("less", "sign"):
        inputs = [placed(x) for x in make_inputs(SMALL._replace(step=step, k=0), torch.float32, "cpu")]
        clean = kernel.compute(*inputs)
        for value in (torch.nan, torch.inf):
            inputs[0][5, 3] = value  # in the second example
            got = kernel.compute(*inputs)
            for ours, expected in zip(got[:2], clean[:2], strict=True):
                assert torch.equal(ours[[0, 2, 3]], expected[[0, 2, 3]])
            assert not torch.isfinite(got.sqnorms[1]) and not torch.isfinite(got.dots[1]).any()


@pytest.mark.slow
@small
def check_any_strides_and_targets_of_16_bits():
    inputs = make_inputs(SMALL, torch.float32, "cpu")
    x, delta, lora_a, lora_b, offsets, scale, adam, sign, targets, sketch, _ = inputs
    wide = torch.zeros(6, 2 * targets.shape[1], dtype=torch.bfloat16)[::2, ::2].copy_(targets)
    compare(
        (
            x.T.contiguous().T, torch.cat([delta, delta], 1)[:, :20], lora_a.T.contiguous().T, lora_b, offsets, scale,
            AdamStep(adam.exp_avg.double(), adam.exp_avg_sq.double()), sign, wide, sketch, None,
        )
    )  # fmt: skip


def kernel_named(function):
    return getattr(triton_sjlt if function in ("sjlt_kernel", "sum_kernel") else kernel, function)


PLANTED = [
    ("gradients_kernel", {"STOP": 21}), ("gradients_kernel", {"N_COLUMNS": 25}), ("gradients_kernel", {"ROW": 1}),
    ("gradients_kernel", {"eps_inside": 1e-3}), ("products_kernel", {"D_IN": 16}), ("products_kernel", {"OF_DELTA": 1}),
    ("pairs_kernel", {"OF_X": 1}), ("dots_kernel", {"P": 60}), ("sjlt_kernel", {"first_units": 9}),
    ("sjlt_kernel", {"row_first": 1}),
]  # fmt: skip


@small
@pytest.mark.parametrize(("function", "planted"), PLANTED, ids=str)
def check_planted_wrong_arguments_are_caught(function, planted, monkeypatch):
    plain_run = Launch.run

    def run(launch):
        if launch.kernel is kernel_named(function):
            launch = launch._replace(arguments=launch.arguments | planted)
        plain_run(launch)

    monkeypatch.setattr(Launch, "run", run)
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        compare(make_inputs(SMALL, torch.float32, "cpu"))


# ------------------------------------------------------------------------------------ machine code


def launches(architecture, dtype, lengths=(300,) * 16, d_in=4096, d_out=4096, r=128, s=16, k=8192, targets=None):
    def meta(*shape, of=dtype):
        return torch.empty(shape, dtype=of, device="meta")

    p, t = r * (d_in + d_out), sum(lengths)
    adam = AdamStep(meta(p, of=torch.float32), meta(p, of=torch.float32))
    offsets = torch.empty(len(lengths) + 1, dtype=torch.int64, device="meta")
    tensors = meta(t, d_in), meta(t, d_out), meta(r, d_in), meta(d_out, r), offsets
    options = 2.0, adam, False, meta(s, p, of=targets or dtype) if s else None, SketchSpec(k) if k else None, None
    return kernel.plan(*tensors, *options, architecture=architecture)[1]


def first_of(function, found):
    return next(launch for launch in found if launch.kernel is kernel_named(function))


KERNELS = ("products_kernel", "pairs_kernel", "gradients_kernel", "dots_kernel", "sjlt_kernel", "sum_kernel")


@outside
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_machine_code_of_gradients(architecture):
    code = assert_sound(first_of("gradients_kernel", launches(architecture, torch.bfloat16)), architecture)
    assert any(opcode.startswith(triton_proof.MATRIX_OPCODE[architecture]) for opcode in code.matrix)


@outside
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("function", KERNELS)
@pytest.mark.parametrize("key", kernel.PRODUCTS_TABLE, ids=lambda key: "-".join(map(str, key)))
def test_machine_code_of_every_entry(key, function):
    architecture, itemsize = key
    for sizes in ({"s": 0}, {"k": 0}, {}):  # gamma as a number or as a pair
        sound = [
            one for one in launches(architecture, DTYPES[itemsize], **sizes) if one.kernel is kernel_named(function)
        ]
        for launch in {id(one): one for one in sound[:1] + sound[-1:]}.values():  # of A and of B
            # 16 examples are no tile for HGMMA and UTCHMMA; HMMA does it, a fortieth of all products.
            assert_sound(
                launch, architecture, allowed=["matrix instructions: HMMA"] if function == "dots_kernel" else []
            )


@outside
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_machine_code_of_small_ranks_and_of_no_alignment(dtype):
    for sizes in ({"r": 8}, {"r": 5, "d_in": 203, "d_out": 131, "s": 1, "k": 1001, "lengths": (1,)}):
        for launch in launches("sm_90", dtype, **sizes):
            assert_sound(launch, "sm_90", allowed=["narrow loads"])


# Milliseconds an example over Llama-2-7B's 128 modules (r = 128) in units of the floor; see docs/measured.md.
@outside
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize(("chip", "most"), [("A100", 1.55), ("H100", 3.6)])
def test_predicted_time_of_a_module(chip, most):
    chip, d, r, n, tokens = triton_predict.CHIPS[chip], 4096, 128, 16, 300
    found = launches(chip.architecture, torch.bfloat16, k=0)
    works = [predicted_work.work(launch, tokens) for launch in found]
    seconds = sum(
        triton_predict.predict_streaming(code_of(launch, chip.architecture), chip=chip, **work).seconds
        for launch, work in zip(found, works, strict=True)
    )
    rate = chip.matrix_flops["16-bit"] * chip.multiprocessors * chip.clock_hz
    n_bytes = 2 * n * tokens * d * 2 + 2 * r * d * (8 + 2 * 16)
    floor = max(sum(work["needed_flops"] for work in works) / rate, n_bytes / chip.memory_bytes_s)
    assert 1 <= seconds / floor <= most
