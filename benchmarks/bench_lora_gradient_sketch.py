"""lora_gradient_sketch against whole gradients in plain torch, on a packed batch of every module of SmolLM2-135M."""

import pytest
import torch

from fastsel.kernels.lora_gradient_sketch import AdamStep, SketchSpec, lora_gradient_sketch
from fastsel.kernels.lora_gradient_sketch.cases import PACK

SCALE, RANK, LAYERS = 2.0, 8, 30
SHAPES = ((576, 576), (576, 192), (576, 192), (576, 576))  # q, k, v, o: inputs, outputs
N_TARGETS, SKETCH_SIZE = 16, 8192


def modules(layers, mode, lengths=PACK):
    """(tensors of a module, its options) in the order of the parameters; tokens are shared, parameters are not."""
    generator = torch.Generator().manual_seed(0)
    t = sum(lengths)
    x, delta = torch.randn(t, 576, generator=generator), torch.randn(t, 576, generator=generator) / 100
    offsets, first, found = torch.tensor([0, *lengths]).cumsum(0), 0, []
    for d_in, d_out in SHAPES * layers:
        p = RANK * (d_in + d_out)
        lora_a, lora_b = (
            torch.randn(RANK, d_in, generator=generator) / 24,
            torch.randn(d_out, RANK, generator=generator) / 10,
        )
        adam = AdamStep(torch.randn(p, generator=generator) / 10, torch.rand(p, generator=generator) / 25)
        options = {"scale": SCALE, "adam": adam}
        if mode == "direct":
            options["targets"] = torch.randn(N_TARGETS, p, generator=generator)
        else:
            options["sketch"] = SketchSpec(SKETCH_SIZE, seed=0, first=first)
        found.append(((x, delta[:, :d_out].contiguous(), lora_a, lora_b, offsets), options))
        first += p
    return found


def ours(layers, mode, implementation="native"):
    """[n, 17] dots and squared norms, or the sketch: sums over all modules."""
    n = len(layers[0][0][4]) - 1
    total = torch.zeros(n, N_TARGETS + 1, dtype=torch.float64) if mode == "direct" else torch.zeros(n, SKETCH_SIZE)
    for tensors, options in layers:
        if mode == "direct":
            got = lora_gradient_sketch(*tensors, **options, implementation=implementation)
            total += torch.cat([got.dots, got.sqnorms[:, None]], 1)
        else:
            lora_gradient_sketch(*tensors, **options, out=total, implementation=implementation)
    return total


def whole_gradients(layers):
    """gamma [n, p]: each example's gradient by two products, concatenated, then the step: what one writes first."""
    gradients, (m, v) = [], ([], [])
    for (x, delta, lora_a, lora_b, offsets), options in layers:
        n, segments = len(offsets) - 1, offsets.diff().tolist()
        d, u = delta @ lora_b * SCALE, x @ lora_a.T * SCALE
        parts = zip(*(y.split(segments) for y in (d, x, delta, u)), strict=True)
        gradients.append(torch.stack([torch.cat([(a.T @ b).flatten(), (c.T @ e).flatten()]) for a, b, c, e in parts]))
        assert len(gradients[-1]) == n
        m.append(options["adam"].exp_avg), v.append(options["adam"].exp_avg_sq)
    g, m, v = torch.cat(gradients, 1), torch.cat(m), torch.cat(v)
    return (0.9 * m + 0.1 * g) / (0.999 * v + 0.001 * g * g + 1e-8).sqrt()


def in_float64(layers):
    """The same modules, for what is true."""
    return [
        (
            tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors),
            options | {"adam": AdamStep(options["adam"].exp_avg.double(), options["adam"].exp_avg_sq.double())},
        )
        for tensors, options in layers
    ]


def as_exact(truth):
    """A step divides by the root of a moment that may be near 0, so that float32 may err much: plain code, or ours."""

    def check(got, expected):
        error, plain_error = (float((found.double() - truth).abs().max()) for found in (got, expected))
        assert error <= 2 * plain_error + 5e-6 * float(truth.abs().max()), (error, plain_error)

    return check


@pytest.mark.parametrize("layers", [LAYERS, pytest.param(1, marks=pytest.mark.gate)])
def test_direct(compare, peak_memory, layers):
    given = modules(layers, "direct")
    targets = torch.cat([options["targets"] for _, options in given], 1)

    def reduced(gammas):
        return torch.cat([gammas @ targets.to(gammas.dtype).T, gammas.square().sum(1, keepdim=True)], 1)

    def plain():
        return reduced(whole_gradients(given))

    _, our_peak = peak_memory(lambda: ours(given, "direct"))
    _, peer_peak = peak_memory(plain)
    compare(
        lambda: ours(given, "direct"), plain, op="lora_gradient_sketch",
        case=f"direct, {N_TARGETS} targets, {layers * 4} modules of SmolLM2-135M, 14 rows of 1,905 tokens",
        name="whole gradients in torch", check=as_exact(reduced(whole_gradients(in_float64(given)))),
        info={"our_peak_bytes": our_peak, "note": f"peer's peak {peer_peak / 2**20:.0f} MiB"},
    )  # fmt: skip


@pytest.mark.parametrize("layers", [LAYERS, pytest.param(1, marks=pytest.mark.gate)])
def test_sketch(compare, peak_memory, layers):
    from fastsel.kernels._runtime.rng import sjlt_map

    given = modules(layers, "sketch")
    p = sum(tensors[2].numel() + tensors[3].numel() for tensors, _ in given)
    # Made before the clock: the peer reads 9 bytes a coordinate, we hash anew.
    (rows,), (signs,) = sjlt_map(0, torch.arange(p), SKETCH_SIZE, 1)

    def reduced(gammas):
        return torch.zeros(len(gammas), SKETCH_SIZE, dtype=gammas.dtype).index_add_(1, rows, gammas * signs)

    def plain():
        return reduced(whole_gradients(given))

    _, our_peak = peak_memory(lambda: ours(given, "sketch"))
    _, peer_peak = peak_memory(plain)
    compare(
        lambda: ours(given, "sketch"), plain, op="lora_gradient_sketch",
        case=f"SJLT, k={SKETCH_SIZE:,}, {layers * 4} modules of SmolLM2-135M, 14 rows of 1,905 tokens",
        name="whole gradients in torch, index_add_", check=as_exact(reduced(whole_gradients(in_float64(given)))),
        info={"our_peak_bytes": our_peak, "note": f"peer's peak {peer_peak / 2**20:.0f} MiB"},
    )  # fmt: skip
