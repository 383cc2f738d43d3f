# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Per-example LoRA gradients on a GPU, stepped in registers and reduced while they are in the second-level cache.

A and B have one shape, as torch_blocked.py says: gradient[j, c] = sum_t left[t, j] right[t, c].

Who owns what: a program of products_kernel owns BLOCK_T tokens x BLOCK_R ranks of delta B or x A^T and a stretch of
    the columns; pairs_kernel adds the stretches. A program of gradients_kernel owns BLOCK_J x BLOCK_C entries of one
    example's gradient, walks that example's tokens, takes the step in registers, and writes gamma and its squared norm.
    GAMMAS numbers of gamma are in flight: some rows of the module for some examples. A program of dots_kernel owns some
    examples x targets and a stretch of coordinates; sketches are kernels/_runtime/triton_sjlt.py. No atomics: bits
    repeat.
Reads and writes: x and delta once for products; the token tiles of an example once for each tile of its gradient across
    them, from the cache; the state once an example, from the cache; gamma is written once and read once, in the cache;
    targets once for a block of examples.
Accumulator: float32; partial dots and norms are added in float64. bfloat16: the products with A and B, the two
    [t, r] results, and gamma before bfloat16 targets are pairs of bfloat16 numbers (16 bits of mantissa), multiplied
    as such; gamma is written as the pair where nothing else reads it. float16, whose exponents are too few for
    gradients, and float32: three TF32 products ("tf32x3") on NVIDIA, true float32 on AMD. The root and the quotient of
    Adam's step are the device's approximations, each within 2 units in the last place; v' + eps below 1e-38 is 0.
Limits: float32, bfloat16, float16; SJLT; rows that are no multiple of 16 elements are read narrowly.

Ladder: docs/measured.md has the predicted times and those measured on an H200.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fastsel.kernels._runtime.devices import triton_architecture
from fastsel.kernels._runtime.triton_blocks import tile_product
from fastsel.kernels._runtime.triton_launch import Launch, no_device
from fastsel.kernels._runtime.triton_sjlt import sjlt_launch, sum_launch
from fastsel.kernels.lora_gradient_sketch.options import AdamStep, GradientSketch, SketchSpec

GAMMAS = 2**23  # numbers of gamma in flight: 32 MB, within the second-level cache of an A100 or H100
DOTS_STRETCH = 1024  # coordinates of one program of dots_kernel
PAIRS_BLOCK = 1024  # numbers of one program of pairs_kernel
# (architecture, bytes of an element): BLOCK_T, most of BLOCK_R, BLOCK_K, num_warps, num_stages, columns of a program.
PRODUCTS_TABLE = {
    ("sm_80", 2): (128, 128, 32, 4, 3, 1024),
    ("sm_80", 4): (64, 64, 32, 4, 3, 1024),
    ("sm_90", 2): (64, 128, 64, 4, 3, 2048),
    ("sm_90", 4): (64, 64, 32, 4, 3, 1024),
    ("sm_100", 2): (128, 128, 64, 4, 3, 1024),
    ("sm_100", 4): (128, 64, 32, 4, 3, 1024),
    ("gfx942", 2): (64, 64, 64, 4, 3, 1024),
    ("gfx942", 4): (64, 64, 32, 4, 3, 1024),
}
# (architecture, bytes of an element, variant): BLOCK of the side of pairs, of the other, BLOCK_T, num_warps, stages.
# "whole": ranks and features are multiples of 128, so that no tile needs a mask; "any": what is not.
GRADIENTS_TABLE = {
    ("sm_80", 2, "whole"): (64, 128, 32, 4, 2),
    ("sm_80", 2, "any"): (64, 64, 64, 4, 3),
    ("sm_80", 4, "whole"): (64, 64, 32, 4, 1),
    ("sm_80", 4, "any"): (64, 64, 32, 4, 1),
    ("sm_90", 2, "whole"): (64, 64, 32, 4, 3),
    ("sm_90", 2, "any"): (64, 64, 64, 4, 3),
    ("sm_90", 4, "whole"): (64, 64, 32, 4, 1),
    ("sm_90", 4, "any"): (64, 64, 32, 4, 1),
    ("sm_100", 2, "whole"): (64, 64, 64, 4, 3),
    ("sm_100", 2, "any"): (64, 64, 64, 4, 3),
    ("sm_100", 4, "whole"): (64, 64, 32, 4, 2),
    ("sm_100", 4, "any"): (64, 64, 32, 4, 2),
    ("gfx942", 2, "whole"): (64, 64, 64, 4, 2),
    ("gfx942", 2, "any"): (64, 64, 64, 4, 2),
    ("gfx942", 4, "whole"): (64, 64, 32, 4, 2),
    ("gfx942", 4, "any"): (64, 64, 32, 4, 2),
}
PRECISION = {"sm_80": "tf32x3", "sm_90": "tf32x3", "sm_100": "tf32x3", "gfx942": "ieee"}  # of float32 products
WHOLE = 128
# bytes of a target: BLOCK_N, BLOCK_S, BLOCK_P, num_warps, num_stages
DOTS_BLOCK = {2: (16, 16, 128, 2, 3), 4: (16, 16, 64, 4, 3)}
SEGMENT_BITS = 15  # a program of the sketch goes through 2^15 coordinates at least
STEPS = {"none": 0, "adam": 1, "sign": 2}


@triton.jit
def products_kernel(
    delta_ptr, b_high_ptr, b_low_ptr, x_ptr, a_high_ptr, a_low_ptr, partial_ptr, T, D_OUT, D_IN, R, OF_DELTA,
    stride_delta_t, stride_b_r, stride_x_t, stride_a_r,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STRETCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[i, t, r] = matrix[t] . (high + low)[r] over stretch i of the columns: OF_DELTA of delta, then x's."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    stretch = tl.program_id(2)
    if stretch < OF_DELTA:
        matrix_ptr, stride_t, high_ptr, stride_r, D = delta_ptr, stride_delta_t, b_high_ptr, stride_b_r, D_OUT
        begin = stretch * STRETCH
    else:
        matrix_ptr, stride_t, high_ptr, stride_r, D = x_ptr, stride_x_t, a_high_ptr, stride_a_r, D_IN
        begin = (stretch - OF_DELTA) * STRETCH
    # Tokens past the end read the last one again: the loop needs no mask for them. Ranks are padded with zeros.
    safe_tokens = tl.minimum(tokens, T - 1)
    in_d = tl.arange(0, BLOCK_K)
    matrix_at = matrix_ptr + safe_tokens[:, None] * stride_t + in_d[None, :]
    weight_at = ranks[:, None] * stride_r + in_d[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for d0 in range(begin, tl.minimum(begin + STRETCH, D), BLOCK_K):
        inside = (in_d + d0 < D)[None, :]
        matrix = tl.load(matrix_at + d0, mask=inside, other=0.0)
        total = tile_product(matrix, tl.trans(tl.load(high_ptr + weight_at + d0)), total, PRECISION)
        if a_low_ptr is not None:
            low_ptr = b_low_ptr
            if stretch >= OF_DELTA:
                low_ptr = a_low_ptr
            total = tile_product(matrix, tl.trans(tl.load(low_ptr + weight_at + d0)), total, PRECISION)
    at = (stretch.to(tl.int64) * T + tokens)[:, None] * R + ranks[None, :]
    tl.store(partial_ptr + at, total, mask=(tokens < T)[:, None] & (ranks < R)[None, :])


@triton.jit
def pairs_kernel(
    partial_ptr, out_ptr, out_low_ptr, scale, NUMBERS, OF_DELTA, OF_X, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[0] = scale times the sum of delta's stretches, out[1] of x's; split into out and out_low where given."""
    side = tl.program_id(1)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < NUMBERS
    stretch_at = partial_ptr + side.to(tl.int64) * OF_DELTA * NUMBERS + at
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, tl.where(side == 0, OF_DELTA, OF_X)):
        total += tl.load(stretch_at, mask=live, other=0.0)
        stretch_at += NUMBERS
    total *= scale
    high = total.to(out_ptr.dtype.element_ty)
    at += side.to(tl.int64) * NUMBERS
    tl.store(out_ptr + at, high, mask=live)
    if out_low_ptr is not None:
        tl.store(out_low_ptr + at, (total - high.to(tl.float32)).to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def gradients_kernel(
    left_ptr, left_low_ptr, right_ptr, right_low_ptr, offsets_ptr, exp_avg_ptr, exp_avg_sq_ptr, gammas_ptr,
    gammas_low_ptr, norms_ptr, of_m, of_g, of_v, of_gg, eps_inside, eps_outside, EXAMPLE, ROW, STOP, N_COLUMNS,
    stride_left_t, stride_right_t, stride_gammas_n, STEP: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gamma of rows ROW to STOP of one example, BLOCK_J x BLOCK_C of them in this program, and its squared norm.

    The state begins at the part's first coordinate, gammas at row ROW.
    """
    example = tl.program_id(1).to(tl.int64)
    blocks_across = tl.cdiv(N_COLUMNS, BLOCK_C)
    first_row = ROW + (tl.program_id(0) // blocks_across).to(tl.int64) * BLOCK_J
    first_col = (tl.program_id(0) % blocks_across).to(tl.int64) * BLOCK_C
    rows, cols = first_row + tl.arange(0, BLOCK_J), first_col + tl.arange(0, BLOCK_C)
    first = tl.load(offsets_ptr + EXAMPLE + example)
    length = (tl.load(offsets_ptr + EXAMPLE + example + 1) - first).to(tl.int32)
    in_t = tl.arange(0, BLOCK_T)
    if EVEN:
        live_rows, live_cols = tl.full([1, BLOCK_J], True, tl.int1), tl.full([1, BLOCK_C], True, tl.int1)
    else:
        live_rows, live_cols = (rows < STOP)[None, :], (cols < N_COLUMNS)[None, :]
    left_at = (first + in_t)[:, None] * stride_left_t + rows[None, :]
    right_at = (first + in_t)[:, None] * stride_right_t + cols[None, :]
    g = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)
    for t0 in range(0, length, BLOCK_T):
        live_t = (in_t < length - t0)[:, None]
        from_left, from_right = left_at + t0 * stride_left_t, right_at + t0 * stride_right_t
        x = tl.load(left_ptr + from_left, mask=live_t & live_rows, other=0.0)
        y = tl.load(right_ptr + from_right, mask=live_t & live_cols, other=0.0)
        g = tile_product(tl.trans(x), y, g, PRECISION)
        if left_low_ptr is not None:
            low = tl.load(left_low_ptr + from_left, mask=live_t & live_rows, other=0.0)
            g = tile_product(tl.trans(low), y, g, PRECISION)
        if right_low_ptr is not None:
            low = tl.load(right_low_ptr + from_right, mask=live_t & live_cols, other=0.0)
            g = tile_product(tl.trans(x), low, g, PRECISION)
    # As one row of entries: Triton then turns one tile, g, into the layout of the state, not the state into g's.
    g = tl.reshape(g, [BLOCK_J * BLOCK_C])
    entry = tl.arange(0, BLOCK_J * BLOCK_C)
    if EVEN:  # no tile reaches beyond the end: no masks, which cost registers
        live = tl.full([BLOCK_J * BLOCK_C], True, tl.int1)
    else:
        live = (entry // BLOCK_C < STOP - first_row) & (entry % BLOCK_C < N_COLUMNS - first_col)
    # One offset for all arrays, in 32 bits: fewer registers.
    in_tile = (entry // BLOCK_C) * N_COLUMNS + entry % BLOCK_C
    if STEP == 1:
        at = first_row * N_COLUMNS + first_col
        root = of_v * tl.load(exp_avg_sq_ptr + at + in_tile, mask=live, other=0.0) + of_gg * g * g
        root = tl.sqrt(root + eps_inside) + eps_outside
        g = of_g * g
        if exp_avg_ptr is not None:
            g += of_m * tl.load(exp_avg_ptr + at + in_tile, mask=live, other=0.0)
        g = g / tl.where(root == 0.0, float("inf"), root)
    elif STEP == 2:
        g = g / tl.where(g == 0.0, float("inf"), tl.abs(g))
    # What lies outside is not zero where an infinity met a masked zero.
    g = tl.where(live, g, 0.0)
    to = example * stride_gammas_n + (first_row - ROW) * N_COLUMNS + first_col
    high = g.to(gammas_ptr.dtype.element_ty)
    tl.store(gammas_ptr + to + in_tile, high, mask=live)
    if gammas_low_ptr is not None:
        low = (g - high.to(tl.float32)).to(gammas_ptr.dtype.element_ty)
        tl.store(gammas_low_ptr + to + in_tile, low, mask=live)
    tl.store(norms_ptr + example * tl.num_programs(0) + tl.program_id(0), tl.sum(g * g, axis=0))


@triton.jit
def dots_kernel(
    gammas_ptr, gammas_low_ptr, targets_ptr, out_ptr, N, S, P, stride_gammas_n, stride_targets_s, STRETCH,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[stretch, n, s] = gammas[n] . targets[s] over STRETCH coordinates."""
    stretch = tl.program_id(0).to(tl.int64)
    examples = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ones = tl.program_id(2).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    in_p = tl.arange(0, BLOCK_P)
    gammas_at = tl.minimum(examples, N - 1)[:, None] * stride_gammas_n + in_p[None, :]
    targets_at = targets_ptr + tl.minimum(ones, S - 1)[:, None] * stride_targets_s + in_p[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
    for p0 in range(stretch * STRETCH, tl.minimum((stretch + 1) * STRETCH, P), BLOCK_P):
        inside = (in_p + p0 < P)[None, :]
        g = tl.load(gammas_ptr + gammas_at + p0, mask=inside, other=0.0)
        y = tl.load(targets_at + p0, mask=inside, other=0.0)
        if gammas_low_ptr is not None:
            total = tile_product(g, tl.trans(y), total, PRECISION)
            low = tl.load(gammas_low_ptr + gammas_at + p0, mask=inside, other=0.0)
            total = tile_product(low, tl.trans(y), total, PRECISION)
        elif y.dtype == tl.bfloat16:
            high = g.to(tl.bfloat16)
            total = tile_product(high, tl.trans(y), total, PRECISION)
            total = tile_product((g - high.to(tl.float32)).to(tl.bfloat16), tl.trans(y), total, PRECISION)
        else:
            total = tile_product(g, tl.trans(y.to(tl.float32)), total, PRECISION)
    to = out_ptr + (stretch * N + examples)[:, None] * S + ones[None, :]
    tl.store(to, total, mask=(examples < N)[:, None] & (ones < S)[None, :])


def unsupported(
    x: torch.Tensor, delta: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, offsets: torch.Tensor,
    scale: float, adam: AdamStep | None, sign: bool, targets: torch.Tensor | None, sketch: SketchSpec | None,
    out: torch.Tensor | None,
) -> str | None:  # fmt: skip
    """Why these inputs cannot run here, or None."""
    for name, tensor in (("x", x), ("targets", targets)):
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"takes float32, bfloat16 and float16; {name} is {str(tensor.dtype).removeprefix('torch.')}"
    if sketch is not None and sketch.kind != "sjlt":
        return f"sketches by SJLT, got {sketch.kind}: torch does that"
    return no_device(x)


def plan(
    x: torch.Tensor, delta: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, offsets: torch.Tensor,
    scale: float, adam: AdamStep | None, sign: bool, targets: torch.Tensor | None, sketch: SketchSpec | None,
    out: torch.Tensor | None, *, architecture: str,
) -> tuple[Any, list[Launch]]:  # fmt: skip
    """The (still unwritten) partial results and the launches that write them, for an architecture of the tables.

    Partial results: a list of dots [stretches, n, s] and a list of norms [n, tiles], each with its first example, and
    the sketch. Launches share their room for gammas, so that their order matters.
    """
    if x.dtype == torch.float16:
        x, delta = x.float(), delta.float()
    x, delta = (y if y.stride(1) == 1 else y.contiguous() for y in (x, delta))
    if targets is not None and targets.stride(1) != 1:
        targets = targets.contiguous()
    n, (r, d_in), d_out = len(offsets) - 1, lora_a.shape, delta.shape[1]
    floats = torch.float32
    projected = out
    if sketch is not None and (out is None or out.stride(1) != 1):
        projected = x.new_zeros(n, sketch.k, dtype=floats)
    dots: list[tuple[int, torch.Tensor]] = []
    norms: list[tuple[int, torch.Tensor]] = []
    launches: list[Launch] = []
    if n == 0:
        return (dots, norms, projected), launches
    (left_a, right_b), (left_a_low, right_b_low), of_products = _products(x, delta, lora_a, lora_b, scale, architecture)
    launches += of_products if len(x) else []
    # What is multiplied with bfloat16 targets is a pair; a sketch adds one number.
    is_pair = targets is not None and targets.dtype == torch.bfloat16 and sketch is None
    offsets = offsets.to(x.device)
    for part in (
        (left_a, left_a_low, x, None, 0, r, d_in),
        (delta, None, right_b, right_b_low, r * d_in, d_out, r),
    ):
        left, left_low, right, right_low, start, n_rows, n_columns = part
        variant = "whole" if n_rows % WHOLE == 0 and n_columns % WHOLE == 0 else "any"
        block_j, block_c, block_t, num_warps, num_stages = GRADIENTS_TABLE[architecture, x.element_size(), variant]
        if right_low is not None:  # the side of pairs is the narrow one
            block_j, block_c = block_c, block_j
        n_block = max(1, min(n, GAMMAS // (block_j * n_columns)))
        rows_at_once = max(1, GAMMAS // (n_block * n_columns * block_j)) * block_j
        rows_at_once = min(rows_at_once, triton.cdiv(n_rows, block_j) * block_j)
        shape, kind = (n_block, min(rows_at_once, n_rows) * n_columns), torch.bfloat16 if is_pair else floats
        gammas, gammas_low = x.new_empty(shape, dtype=kind), x.new_empty(shape, dtype=kind) if is_pair else None
        state: dict[str, Any] = {
            "exp_avg_ptr": None,
            "exp_avg_sq_ptr": None,
            "of_m": 0.0,
            "of_g": 1.0,
            "of_v": 0.0,
            "of_gg": 0.0,
        }
        state |= {"eps_inside": 0.0, "eps_outside": 0.0}
        if adam is not None:
            state |= dict(zip(("of_m", "of_g", "of_v", "of_gg"), adam.factors(), strict=True))
            state |= {"eps_inside" if adam.eps_inside else "eps_outside": adam.eps}
            state["exp_avg_sq_ptr"] = adam.exp_avg_sq[start:].to(floats).contiguous()
            if adam.momentum and adam.exp_avg is not None:
                state["exp_avg_ptr"] = adam.exp_avg[start:].to(floats).contiguous()
        for example in range(0, n, n_block):
            here = min(n_block, n - example)
            for row in range(0, n_rows, rows_at_once):
                stop = min(row + rows_at_once, n_rows)
                tiles = triton.cdiv(stop - row, block_j) * triton.cdiv(n_columns, block_c)
                norms.append((example, x.new_empty(here, tiles, dtype=floats)))
                launches.append(
                    Launch(
                        gradients_kernel,
                        (tiles, here),
                        {"left_ptr": left, "left_low_ptr": left_low, "right_ptr": right, "right_low_ptr": right_low}
                        | {"offsets_ptr": offsets, **state, "gammas_ptr": gammas, "gammas_low_ptr": gammas_low}
                        | {"norms_ptr": norms[-1][1]}
                        | {"EXAMPLE": example, "ROW": row, "STOP": stop, "N_COLUMNS": n_columns}
                        | {"stride_left_t": left.stride(0), "stride_right_t": right.stride(0)}
                        | {"stride_gammas_n": gammas.stride(0)},
                        {"STEP": STEPS["sign" if sign else "none" if adam is None else "adam"], "BLOCK_J": block_j}
                        | {"BLOCK_C": block_c, "BLOCK_T": block_t}
                        | {"PRECISION": _precision(architecture, x)}
                        | {"EVEN": variant == "whole"},
                        {"num_warps": num_warps, "num_stages": num_stages},
                    )
                )
                begin, end = start + row * n_columns, start + stop * n_columns
                if targets is not None:
                    partial, launch = _dots(gammas, gammas_low, here, targets[:, begin:end], architecture)
                    dots.append((example, partial))
                    launches.append(launch)
                if sketch is not None and projected is not None:
                    options = sketch.k, sketch.sparsity, sketch.seed, sketch.first + begin, SEGMENT_BITS, architecture
                    partial, launch = sjlt_launch(gammas[:here, : end - begin], *options)
                    to = projected[example : example + here]
                    launches += [launch, sum_launch(partial, to, sketch.sparsity**-0.5)]
    return (dots, norms, projected), launches


def _precision(architecture: str, x: torch.Tensor) -> str:
    return "ieee" if x.element_size() == 2 else PRECISION[architecture]


def _split(weight: torch.Tensor, dtype: torch.dtype, r_padded: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[r_padded, d rounded up to 128] with zeros: the weight; float32 beside bfloat16 as a sum of two."""
    r, d = weight.shape
    padded = weight.new_zeros(r_padded, triton.cdiv(d, 128) * 128, dtype=torch.float32)
    padded[:r, :d] = weight
    if dtype == weight.dtype:  # one number is enough for what has 16 bits
        return padded.to(dtype), None
    if dtype == torch.float32:
        return padded, None
    high = padded.to(dtype)
    return high, (padded - high.float()).to(dtype)


def _products(
    x: torch.Tensor, delta: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float, architecture: str
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None], list[Launch]]:
    """scale delta B and scale x A^T [2, t, r_padded], as one tensor or a sum of two, and the launches that write it."""
    t, r = len(x), len(lora_a)
    block_t, most_r, block_k, num_warps, num_stages, stretch = PRODUCTS_TABLE[architecture, x.element_size()]
    block_r = min(most_r, max(16, triton.next_power_of_2(r)))
    r_padded = triton.cdiv(r, block_r) * block_r
    (b_high, b_low), (a_high, a_low) = (_split(weight, x.dtype, r_padded) for weight in (lora_b.T, lora_a))
    of_delta, of_x = (triton.cdiv(matrix.shape[1], stretch) for matrix in (delta, x))
    partial = x.new_empty(of_delta + of_x, t, r_padded, dtype=torch.float32)
    products = x.new_empty(2, t, r_padded)
    low = torch.empty_like(products) if x.element_size() == 2 else None
    multiply = Launch(
        products_kernel,
        (triton.cdiv(t, block_t), r_padded // block_r, of_delta + of_x),
        {"delta_ptr": delta, "b_high_ptr": b_high, "b_low_ptr": b_low, "x_ptr": x, "a_high_ptr": a_high}
        | {"a_low_ptr": a_low, "partial_ptr": partial, "T": t, "D_OUT": delta.shape[1], "D_IN": x.shape[1]}
        | {"R": r_padded, "OF_DELTA": of_delta, "stride_delta_t": delta.stride(0), "stride_b_r": b_high.stride(0)}
        | {"stride_x_t": x.stride(0), "stride_a_r": a_high.stride(0)},
        {"BLOCK_T": block_t, "BLOCK_R": block_r, "BLOCK_K": block_k, "STRETCH": stretch}
        | {"PRECISION": _precision(architecture, x)},
        {"num_warps": num_warps, "num_stages": num_stages},
    )
    add = Launch(
        pairs_kernel,
        (triton.cdiv(t * r_padded, PAIRS_BLOCK), 2),
        {"partial_ptr": partial, "out_ptr": products, "out_low_ptr": low, "scale": scale, "NUMBERS": t * r_padded}
        | {"OF_DELTA": of_delta, "OF_X": of_x},
        {"BLOCK": PAIRS_BLOCK},
        {"num_warps": 4},
    )
    return products, (None, None) if low is None else (low[0], low[1]), [multiply, add]


def _dots(
    gammas: torch.Tensor, gammas_low: torch.Tensor | None, n: int, targets: torch.Tensor, architecture: str
) -> tuple[torch.Tensor, Launch]:
    block_n, block_s, block_p, num_warps, num_stages = DOTS_BLOCK[targets.element_size()]
    s, p = targets.shape
    stretches = triton.cdiv(p, DOTS_STRETCH)
    partial = gammas.new_empty(stretches, n, s, dtype=torch.float32)
    launch = Launch(
        dots_kernel,
        (stretches, triton.cdiv(n, block_n), triton.cdiv(s, block_s)),
        {"gammas_ptr": gammas, "gammas_low_ptr": gammas_low, "targets_ptr": targets, "out_ptr": partial}
        | {"N": n, "S": s, "P": p, "stride_gammas_n": gammas.stride(0), "stride_targets_s": targets.stride(0)}
        | {"STRETCH": DOTS_STRETCH},
        {"BLOCK_N": block_n, "BLOCK_S": block_s, "BLOCK_P": block_p}
        | {"PRECISION": "ieee" if targets.dtype == torch.bfloat16 else PRECISION[architecture]},
        {"num_warps": num_warps, "num_stages": num_stages},
    )
    return partial, launch


def compute(
    x: torch.Tensor, delta: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, offsets: torch.Tensor,
    scale: float, adam: AdamStep | None, sign: bool, targets: torch.Tensor | None, sketch: SketchSpec | None,
    out: torch.Tensor | None,
) -> GradientSketch:  # fmt: skip
    """See api.lora_gradient_sketch."""
    inputs = (x, delta, lora_a, lora_b, offsets, scale, adam, sign, targets, sketch, out)
    (dots, norms, projected), launches = plan(*inputs, architecture=triton_architecture(x))
    for launch in launches:
        launch.run()
    if out is not None and projected is not out:
        projected = out.add_(projected)
    n, double = len(offsets) - 1, torch.float64
    sqnorms = torch.zeros(n, dtype=double, device=x.device)
    for first, partial in norms:
        sqnorms[first : first + len(partial)] += partial.sum(1, dtype=double)
    if targets is None:
        return GradientSketch(None, sqnorms, projected)
    total = torch.zeros(n, len(targets), dtype=double, device=x.device)
    for first, partial in dots:
        total[first : first + partial.shape[1]] += partial.sum(0, dtype=double)
    return GradientSketch(total, sqnorms, projected)
