"""Predicted times of the Triton kernels on GPUs that are not here, from their machine code: python predict_triton.py

Prints one row a case and chip, or only those of an operation that is named. Nothing is measured;
see docs/decisions/0004-triton-proofs-without-a-gpu.md.
"""

import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch

from fastsel.kernels._runtime.triton_launch import Launch, Work
from fastsel.kernels._runtime.triton_predict import (
    CHIPS,
    Chip,
    floor_seconds,
    predict,
    predict_straight,
    predict_streaming,
)
from fastsel.kernels._runtime.triton_proof import compile_launch, machine_code
from fastsel.kernels.facility_location import gpu_triton as gains
from fastsel.kernels.k_center import gpu_triton as nearest
from fastsel.kernels.linear_token_stats import gpu_triton as stats
from fastsel.kernels.linear_token_stats.cases import ALL_OUTPUTS
from fastsel.kernels.lora_gradient_sketch import AdamStep, SketchSpec
from fastsel.kernels.lora_gradient_sketch import gpu_triton as lora
from fastsel.kernels.lora_gradient_sketch import predicted_work as lora_work
from fastsel.kernels.novelty import gpu_triton as novel
from fastsel.kernels.random_projection import gpu_triton as projection
from fastsel.kernels.swiglu import gpu_triton as gated
from fastsel.kernels.topk_similarity import gpu_triton as topk
from fastsel.kernels.tree_attention import gpu_triton as tree
from fastsel.kernels.tree_attention.segments import Segments

STATS = {  # tokens, words, features
    "SmolLM2-135M head, 2,048 rows": (2048, 49_152, 576),
    "Llama-3-8B head, 8,192 rows": (8192, 128_256, 4096),
}
TREES = {  # query heads, key heads, features of a head
    "SmolLM2-135M": (9, 3, 64),
    "Llama-3-8B": (32, 8, 128),
}

GAINS = {  # candidates, points, and what else is given
    "first pass of 1M": (1_000_000, 1_000_000, {}),
    "first pass of 1M, exp_distance": (1_000_000, 1_000_000, {"similarity": "exp_distance"}),
    "10,000 of 1M points moved": (1_000_000, 10_000, {"raised": True}),
    "1,000 of 1M points moved": (1_000_000, 1000, {"raised": True}),
    "100 of 1M points moved": (1_000_000, 100, {"raised": True}),
    "16 contenders, 1M points": (16, 1_000_000, {}),
}
GAINS_D = 1024
CENTRES = (16, 64, 256, 1024)  # of a pass over NEAREST_ROWS
NEAREST_ROWS, NEAREST_D = 1_000_000, 1024
NEIGHBOURS = {  # queries, points, features; cosines of unit rows, 10 neighbours without the row itself, and the minimum
    "density of 1M, d = 1,024": (1_000_000, 1_000_000, 1024),
    "50,000 among 1M, d = 384": (50_000, 1_000_000, 384),
}
GREEDY_ROWS, GREEDY_PICKS = 1_000_000, 10_000
NOVEL_ROWS, NOVEL_D, CONTENDERS = 1_000_000, 1024, 256  # rows of the pool, rows scored exactly at a time

LORA = (16, 300, 4096, 128)  # examples, tokens of each, features in and out, rank: LESS with Llama-2-7B
LORA_MODULES, LESS_ROWS, LESS_CHECKPOINTS = 128, 270_679, 4
GATED = (4096, 11_008)  # tokens, features of the MLP of a Llama of 7B
PASS_FLOPS = 4 * 6.6e9 * 300  # forward and input gradients of an example
PROJECTED, ADAPTERS, PROJECTION_K = 64, 2**27, 8192  # gradients of Llama-2-7B's adapters (r = 128), LESS's k


def pairs_of_passes(number: int = 60) -> Segments:
    """Two roots a row, as in IFD: prompt with answer, and the answer alone."""
    generator = np.random.default_rng(0)
    lengths = []
    for prompt, answer in zip(generator.integers(40, 200, number), generator.integers(30, 300, number), strict=True):
        lengths += [int(prompt + answer), int(answer)]
    return Segments([0, *np.cumsum(lengths).tolist()], [-1] * len(lengths))


def one_prompt_many_answers() -> Segments:
    """A prompt of 2,048 tokens with eight answers of 512."""
    return Segments([0, *range(2048, 2048 + 9 * 512, 512)], [-1] + [0] * 8)


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def gains_launch(
    architecture: str, dtype: torch.dtype, n: int, m: int, raised: bool = False, similarity: str = "dot"
) -> tuple[Launch, Work]:
    """One call of facility_location's kernel."""
    best = meta(m, dtype=torch.float32)
    matrices = meta(n, GAINS_D, dtype=dtype), meta(m, GAINS_D, dtype=dtype)
    options = (best, best if raised else None, None, similarity, 1.0)
    launch = gains.plan(*matrices, *options, architecture=architecture)[1][-1]
    return launch, gains.work(launch, n, m, GAINS_D)


def nearest_launch(architecture: str, dtype: torch.dtype, b: int) -> tuple[Launch, Work]:
    """One call of k_center's kernel."""
    n, floats = NEAREST_ROWS, torch.float32
    matrices = meta(n, NEAREST_D, dtype=dtype), meta(b, NEAREST_D, dtype=dtype)
    vectors = meta(n, dtype=floats), None, meta(n, dtype=floats), meta(b, dtype=floats)
    launch = nearest.plan(*matrices, *vectors, architecture=architecture)[1][0]
    return launch, nearest.work(launch, n, b, NEAREST_D)


def novelty_launches(architecture: str, dtype: torch.dtype, n: int, t: int, rank_by: str) -> list[Launch]:
    """One call of novelty's kernels, both densities given."""
    density, weights = meta(n, dtype=torch.float64), meta(t, 1, dtype=torch.float64)
    matrices = meta(n, NOVEL_D, dtype=dtype), meta(t, NOVEL_D, dtype=dtype)
    options = (weights, density, meta(t, dtype=torch.float64), rank_by)
    return novel.plan(*matrices, *options, architecture=architecture)[1]


def append_bound(chip: Chip, dtype: torch.dtype) -> str:
    """A row of the table: the append bound of all rows, which reads each of them once."""
    (launch,) = novelty_launches(chip.architecture, dtype, NOVEL_ROWS, 1, "order")
    code = machine_code(compile_launch(launch, chip.architecture), chip.architecture)
    needed = NOVEL_ROWS * (NOVEL_D * dtype.itemsize + 8 + 4)
    p = predict_streaming(code, launch.grid[0], NOVEL_D // launch.constants["BLOCK_D"], needed, chip)
    return (
        f"{p.seconds * 1e6:,.0f} us | {p.floor_seconds * 1e6:,.0f} us | {p.ratio:.2f} "
        f"| {p.programs_resident} | {p.inner_limit} | {p.outer_limit} |"
    )


def lora_launches(architecture: str, mode: str) -> list[Launch]:
    """One call for a module of Llama-2-7B under LESS: 16 targets ("direct") or SJLT to 8,192 ("sketch"), bfloat16."""
    n, tokens, d, r = LORA
    p, kind = 2 * r * d, torch.bfloat16
    state = AdamStep(meta(p, dtype=torch.float32), meta(p, dtype=torch.float32))
    x, delta = (meta(n * tokens, d, dtype=kind) for _ in range(2))
    lora_a, lora_b, offsets = meta(r, d, dtype=kind), meta(d, r, dtype=kind), meta(n + 1, dtype=torch.int64)
    is_direct = mode == "direct"
    targets, spec = (meta(16, p, dtype=kind), None) if is_direct else (None, SketchSpec(8192))
    options = (2.0, state, False, targets, spec, None)
    return lora.plan(x, delta, lora_a, lora_b, offsets, *options, architecture=architecture)[1]


def lora_module(chip: Chip, mode: str) -> tuple[dict[str, float], float]:
    """Predicted seconds of one module's launches by kernel, and the floor of the whole: flops or bytes."""
    n, tokens, d, r = LORA
    seconds, flops = Counter[str](), 0
    for launch in lora_launches(chip.architecture, mode):
        code = machine_code(compile_launch(launch, chip.architecture), chip.architecture)
        work = lora_work.work(launch, tokens)
        seconds[launch.kernel.__name__] += predict_streaming(code, chip=chip, **work).seconds
        if work["matrix_units"] == "16-bit":
            flops += work["needed_flops"]
    entries = 2 * r * d
    # Tokens, state, targets (or sketches) once; gammas need never leave the chip.
    n_bytes = 2 * n * tokens * d * 2 + 8 * entries + (16 * entries * 2 if mode == "direct" else n * 8192 * 8)
    rate = chip.matrix_flops["16-bit"] * chip.multiprocessors * chip.clock_hz
    return dict(seconds), max(flops / rate, n_bytes / chip.memory_bytes_s)


def less_hours(chip: Chip, share_of_peak: float) -> dict[str, float]:
    """Predicted hours of each step of LESS's gradient features with Llama-2-7B, r = 128: all rows and checkpoints."""
    rows, peak = LESS_ROWS * LESS_CHECKPOINTS, chip.matrix_flops["16-bit"] * chip.multiprocessors * chip.clock_hz
    an_example = LORA_MODULES / LORA[0]
    hours = {f"forward and backward at {100 * share_of_peak:.0f} % of peak": PASS_FLOPS / (share_of_peak * peak)}
    for mode, what in (("direct", "gradients, Adam's step, 16 targets"), ("sketch", "gradients, Adam's step, SJLT")):
        parts, floor = lora_module(chip, mode)
        hours[what] = sum(parts.values()) * an_example
        hours[f"{what}: floor"] = floor * an_example
    for dtype in (torch.bfloat16, torch.float32):
        launch = projection_launch(chip.architecture, dtype, "rademacher")
        code = machine_code(compile_launch(launch, chip.architecture), chip.architecture)
        seconds = predict(code, projection.work(launch, PROJECTED, ADAPTERS, PROJECTION_K), chip).seconds
        hours[f"dense signs in place of SJLT, {str(dtype).removeprefix('torch.')}"] = seconds / PROJECTED
    return {what: rows * seconds / 3600 for what, seconds in hours.items()}


def projection_launch(architecture: str, dtype: torch.dtype, kind: str) -> Launch:
    """One call of random_projection's kernel that reads x."""
    out = meta(PROJECTED, PROJECTION_K, dtype=torch.float32)
    x = meta(PROJECTED, ADAPTERS, dtype=dtype)
    return projection.plan(x, PROJECTION_K, kind, 1, 5, 0, out, architecture=architecture)[0]


def sjlt(chip: Chip, dtype: torch.dtype) -> str:
    """A row of the table: SJLT of PROJECTED gradients of Llama-2-7B's adapters, the segments' sums written and read."""
    launch = projection_launch(chip.architecture, dtype, "sjlt")
    code = machine_code(compile_launch(launch, chip.architecture), chip.architecture)
    programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
    blocks = 1 << (launch.constants["SEGMENT_BITS"] - launch.constants["BITS"])
    needed = PROJECTED * (ADAPTERS * dtype.itemsize + 8 * PROJECTION_K * launch.grid[0])
    numbers = launch.constants["ROWS"] * launch.constants["BLOCK_K"] * dtype.itemsize // 4  # 16-bit rows go in pairs
    p = predict_streaming(code, programs, blocks, needed, chip, gathered=numbers)
    return (
        f"{p.seconds * 1e6:,.0f} us | {p.floor_seconds * 1e6:,.0f} us | {p.ratio:.2f} "
        f"| {p.programs_resident} | {p.inner_limit} | {p.outer_limit} |"
    )


def gated_launch(architecture: str, dtype: torch.dtype, gradient: bool) -> tuple[Launch, int]:
    """One call of swiglu's kernel or its gradient's, and the bytes that it must move."""
    inputs = [meta(*GATED, dtype=dtype) for _ in range(3 if gradient else 2)]
    (launch,) = gated.plan(inputs[0], inputs[1], inputs[2] if gradient else None, None, architecture=architecture)[1]
    return launch, (5 if gradient else 3) * GATED[0] * GATED[1] * dtype.itemsize


def swiglu(chip: Chip, dtype: torch.dtype, gradient: bool) -> str:
    """A row of the table: GATED, forward or gradient."""
    launch, needed = gated_launch(chip.architecture, dtype, gradient)
    code = machine_code(compile_launch(launch, chip.architecture), chip.architecture)
    p = predict_straight(code, launch.grid[0], needed, chip)
    return (
        f"{p.seconds * 1e6:,.0f} us | {p.floor_seconds * 1e6:,.0f} us | {p.ratio:.2f} "
        f"| {p.programs_resident} | {p.inner_limit} | {p.outer_limit} |"
    )


def greedy(chip: Chip, dtype: torch.dtype) -> tuple[float, float, float]:
    """Predicted seconds of all updates of GREEDY_PICKS greedy picks on random vectors, their floor, and contenders.

    Before pick t n / t points are passed: 1 + ln k passes in all, with the first. Each pick scores 16 contenders.
    """
    n = GREEDY_ROWS
    updates, _ = gains_launch(chip.architecture, dtype, n, n, raised=True)
    code = machine_code(compile_launch(updates, chip.architecture), chip.architecture)
    tile = updates.constants["BLOCK_P"]
    tiles = Counter(-(-n // (t * tile)) for t in range(1, GREEDY_PICKS + 1))
    seconds = sum(
        number * predict(code, gains_launch(chip.architecture, dtype, n, count * tile, raised=True)[1], chip).seconds
        for count, number in tiles.items()
    )
    floor = sum(
        floor_seconds(gains_launch(chip.architecture, dtype, n, -(-n // t), raised=True)[1], chip)
        for t in range(1, GREEDY_PICKS + 1)
    )
    contenders, work = gains_launch(chip.architecture, dtype, 16, n)
    code = machine_code(compile_launch(contenders, chip.architecture), chip.architecture)
    return seconds, floor, GREEDY_PICKS * predict(code, work, chip).seconds


def launches(architecture: str) -> Iterator[tuple[str, Launch, Work]]:
    """Every case of the table for an architecture."""
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for name, sizes in STATS.items():
            for outputs in (("nll",), ALL_OUTPUTS):
                n_tokens, n_words, n_features = sizes
                hidden, weight = meta(n_tokens, n_features, dtype=dtype), meta(n_words, n_features, dtype=dtype)
                targets = meta(n_tokens, dtype=torch.int64)
                options = (hidden, weight, targets, None, None, 1.0, outputs)
                launch = stats.plan(*options, architecture=architecture)[1][0]
                what = "nll" if len(outputs) == 1 else "all outputs"
                yield f"linear_token_stats, {name}, {what}, {kind}", launch, stats.work(launch, *sizes)
        for name, (heads, key_heads, head) in TREES.items():
            for shape, segments in (("IFD pairs", pairs_of_passes()), ("prompt + 8", one_prompt_many_answers())):
                query, key = (meta(segments.n_tokens, n, head, dtype=dtype) for n in (heads, key_heads))
                options = (query, key, key, segments, None, None, head**-0.5)
                launch = tree.plan(*options, architecture=architecture)[1][0]
                label = f"tree_attention, {name}, {shape} ({segments.n_tokens:,} tokens), {kind}"
                yield label, launch, tree.work(launch, segments, head)
        for name, (n, m, given) in GAINS.items():
            yield f"facility_location, {name}, {kind}", *gains_launch(architecture, dtype, n, m, **given)
        for b in CENTRES:
            yield f"k_center, 1M points, {b:,} centres, {kind}", *nearest_launch(architecture, dtype, b)
        for name, (b, n, d) in NEIGHBOURS.items():
            itself = meta(b, dtype=torch.int64)
            options = (meta(b, d, dtype=dtype), meta(n, d, dtype=dtype), 10, "dot", itself, True)
            launch = topk.plan(*options, architecture=architecture)[1][0]
            yield f"topk_similarity, {name}, {kind}", launch, topk.work(launch, b, n, d)
        for t in (1000, 4000):
            launch = novelty_launches(architecture, dtype, CONTENDERS, t, "weighted")[0]
            label = f"novelty, distances of {CONTENDERS} contenders to {t:,} picks, {kind}"
            yield label, launch, novel.work(launch, CONTENDERS, t, NOVEL_D)
        launch = projection_launch(architecture, dtype, "rademacher")
        label = f"random_projection, dense signs, {PROJECTED} x {ADAPTERS:,} to {PROJECTION_K:,}, {kind}"
        yield label, launch, projection.work(launch, PROJECTED, ADAPTERS, PROJECTION_K)


def main() -> None:
    """Print the tables."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    print("| case | chip | predicted | floor | ratio | programs resident | busiest in the loop | between |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, chip in CHIPS.items():
        for label, launch, work in launches(chip.architecture):
            if not label.startswith(wanted):
                continue
            code = machine_code(compile_launch(launch, chip.architecture), chip.architecture)
            p = predict(code, work, chip)
            print(
                f"| {label} | {name} | {p.seconds * 1e6:,.0f} us | {p.floor_seconds * 1e6:,.0f} us | {p.ratio:.2f} "
                f"| {p.programs_resident} | {p.inner_limit} | {p.outer_limit} |",
                flush=True,
            )
    if "novelty".startswith(wanted):
        for name, chip in CHIPS.items():
            for dtype in (torch.bfloat16, torch.float32):
                kind = str(dtype).removeprefix("torch.")
                print(f"| novelty, append bound of 1M rows, {kind} | {name} | {append_bound(chip, dtype)}", flush=True)
    if "lora_gradient_sketch".startswith(wanted):
        print("\n| lora_gradient_sketch, Llama-2-7B, r = 128, an example | chip | predicted | floor | of it "
              "| share of forward and backward at 40 % of peak | all of LESS's rows and checkpoints |")  # fmt: skip
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name, chip in CHIPS.items():
            for mode in ("direct", "sketch"):
                parts, floor = lora_module(chip, mode)
                seconds, floor = (LORA_MODULES / LORA[0] * part for part in (sum(parts.values()), floor))
                of_it = ", ".join(f"{kernel.removesuffix('_kernel')} {1e3 * LORA_MODULES / LORA[0] * part:.2f}"
                                  for kernel, part in parts.items())  # fmt: skip
                both = PASS_FLOPS / (0.4 * chip.matrix_flops["16-bit"] * chip.multiprocessors * chip.clock_hz)
                hours = LESS_ROWS * LESS_CHECKPOINTS * (seconds + both) / 3600
                print(f"| {mode} | {name} | {1e3 * seconds:.2f} ms | {1e3 * floor:.2f} ms | {of_it} "
                      f"| {100 * seconds / both:.1f} % | {hours:.1f} h |", flush=True)  # fmt: skip
        print(f"\n| hours for {LESS_ROWS:,} rows of {LORA[1]} tokens at {LESS_CHECKPOINTS} checkpoints | A100 | H100 |")
        print("| --- | --- | --- |")
        by_chip = [less_hours(CHIPS[name], 0.4) for name in ("A100", "H100")]
        for what in by_chip[0]:
            print(f"| {what} | {' | '.join(f'{hours[what]:.2f}' for hours in by_chip)} |", flush=True)
    if "random_projection".startswith(wanted):
        for name, chip in CHIPS.items():
            for dtype in (torch.bfloat16, torch.float32):
                kind = str(dtype).removeprefix("torch.")
                label = f"random_projection, sjlt, {PROJECTED} x {ADAPTERS:,} to {PROJECTION_K:,}, {kind}"
                print(f"| {label} | {name} | {sjlt(chip, dtype)}", flush=True)
    if "swiglu".startswith(wanted):
        for name, chip in CHIPS.items():
            for dtype in (torch.bfloat16, torch.float32):
                for gradient in (False, True):
                    kind, what = str(dtype).removeprefix("torch."), "gradient" if gradient else "forward"
                    label = f"swiglu, {what}, {GATED[0]:,} x {GATED[1]:,}, {kind}"
                    print(f"| {label} | {name} | {swiglu(chip, dtype, gradient)}", flush=True)
    if "facility_location".startswith(wanted):
        print(f"\n| greedy, n = {GREEDY_ROWS:,}, d = {GAINS_D:,}, k = {GREEDY_PICKS:,} | updates | floor | 16 a pick |")
        print("| --- | --- | --- | --- |")
        for name, chip in CHIPS.items():
            for dtype in (torch.bfloat16, torch.float32):
                updates, floor, contenders = greedy(chip, dtype)
                kind = str(dtype).removeprefix("torch.")
                print(f"| {name}, {kind} | {updates:,.1f} s | {floor:,.1f} s | {contenders:,.1f} s |", flush=True)


if __name__ == "__main__":
    main()
