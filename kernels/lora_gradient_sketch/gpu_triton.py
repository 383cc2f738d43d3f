# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Per-example LoRA gradients on a GPU, stepped in registers and reduced while they are in the second-level cache.

A and B have one shape, as torch_blocked.py says: gradient[j, c] = sum_t left[t, j] right[t, c].

Who owns what: a program of products_kernel owns BLOCK_T tokens x BLOCK_R ranks of scale delta B or scale x A^T. A
    program of gradients_kernel owns BLOCK_J x BLOCK_C entries of one example's gradient, walks that example's tokens,
    takes the step in registers, and writes gamma and its squared norm. GAMMAS numbers of gamma are in flight: some rows
    of the module for some examples. A program of dots_kernel owns some examples x targets and a stretch of coordinates;
    one of sjlt_kernel owns BLOCK_K rows of the sketch for BLOCK_N examples, and reads SJLT backwards, from row to
    coordinate. No atomics: bits repeat.
Reads and writes: x and delta once for products; the token tiles of an example once for each tile of its gradient across
    them, from the cache; the state once an example, from the cache; gamma is written once and read once, in the cache;
    targets once for a block of examples.
Accumulator: float32; partial dots and norms are added in float64. bfloat16: the products with A and B, the two
    [t, r] results, and gamma before bfloat16 targets are pairs of bfloat16 numbers (16 bits of mantissa), multiplied
    as such. float16, whose exponents are too few for gradients, and float32: three TF32 products ("tf32x3") on NVIDIA,
    true float32 on AMD.
Limits: float32, bfloat16, float16; SJLT; rows that are no multiple of 16 elements are read narrowly.

Ladder: docs/measured.md has the predicted times (no GPU has run this file yet).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fastsel.kernels._runtime.devices import triton_architecture
from fastsel.kernels._runtime.rng import SJLT, SJLT_SIGN, hash_key
from fastsel.kernels._runtime.triton_blocks import tile_product
from fastsel.kernels._runtime.triton_hash import counter_word, inner_key, outer_key, sjlt_block, sjlt_coordinate
from fastsel.kernels._runtime.triton_launch import Launch, no_device
from fastsel.kernels.lora_gradient_sketch.options import AdamStep, GradientSketch, SketchSpec

GAMMAS = 2**23  # numbers of gamma in flight: 32 MB, within the second-level cache of an A100 or H100
DOTS_STRETCH = 4096  # coordinates of one program of dots_kernel
# (architecture, bytes of an element): for products BLOCK_T, BLOCK_K, num_warps; for gradients BLOCK_J, BLOCK_C,
# BLOCK_T, num_warps, num_stages; float32 products. BLOCK_R is 16 to 128, by the rank.
LAUNCH_TABLE = {
    ("sm_80", 2): (64, 64, 4, 64, 64, 64, 4, 3, "ieee"),
    ("sm_80", 4): (64, 32, 4, 64, 64, 32, 4, 1, "tf32x3"),
    ("sm_90", 2): (64, 64, 4, 64, 64, 64, 4, 3, "ieee"),
    ("sm_90", 4): (64, 32, 4, 64, 64, 32, 4, 1, "tf32x3"),
    ("sm_100", 2): (128, 64, 4, 64, 128, 64, 4, 3, "ieee"),
    ("sm_100", 4): (128, 32, 4, 64, 64, 32, 4, 2, "tf32x3"),
    ("gfx942", 2): (64, 64, 4, 64, 64, 64, 4, 2, "ieee"),
    ("gfx942", 4): (64, 32, 4, 64, 64, 32, 4, 2, "ieee"),
}
DOTS_BLOCK = {2: (16, 16, 128, 4), 4: (16, 16, 64, 4)}  # bytes of a target: BLOCK_N, BLOCK_S, BLOCK_P, num_warps
SJLT_BLOCK = (128, 8, 4)  # BLOCK_K, BLOCK_N, num_warps
STEPS = {"none": 0, "adam": 1, "sign": 2}


@triton.jit
def products_kernel(
    matrix_ptr, high_ptr, low_ptr, out_ptr, out_low_ptr, scale, T, D, R, stride_matrix_t, stride_weight_r,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, r] = scale matrix[t] . (high + low)[r], where given split into out and out_low too."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    # Tokens past the end read the last one again: the loop needs no mask for them. Ranks are padded with zeros.
    safe_tokens = tl.minimum(tokens, T - 1)
    in_d = tl.arange(0, BLOCK_K)
    matrix_at = matrix_ptr + safe_tokens[:, None] * stride_matrix_t + in_d[None, :]
    weight_at = ranks[:, None] * stride_weight_r + in_d[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for d0 in range(0, D, BLOCK_K):
        inside = (in_d + d0 < D)[None, :]
        x = tl.load(matrix_at + d0, mask=inside, other=0.0)
        total = tile_product(x, tl.trans(tl.load(high_ptr + weight_at + d0)), total, PRECISION)
        if low_ptr is not None:
            total = tile_product(x, tl.trans(tl.load(low_ptr + weight_at + d0)), total, PRECISION)
    total *= scale
    at = tokens[:, None] * R + ranks[None, :]
    live = (tokens < T)[:, None] & (ranks < R)[None, :]
    high = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, high, mask=live)
    if out_low_ptr is not None:
        tl.store(out_low_ptr + at, (total - high.to(tl.float32)).to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def gradients_kernel(
    left_ptr, left_low_ptr, right_ptr, right_low_ptr, offsets_ptr, exp_avg_ptr, exp_avg_sq_ptr, gammas_ptr, norms_ptr,
    of_m, of_g, of_v, of_gg, eps_inside, eps_outside, EXAMPLE, ROW, STOP, N_COLUMNS, stride_left_t, stride_right_t,
    stride_gammas_n, STEP: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """gamma of rows ROW to STOP of one example, BLOCK_J x BLOCK_C of them in this program, and its squared norm.

    The state begins at the part's first coordinate, gammas at row ROW.
    """
    example = tl.program_id(1).to(tl.int64)
    blocks_across = tl.cdiv(N_COLUMNS, BLOCK_C)
    rows = ROW + (tl.program_id(0) // blocks_across).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    cols = (tl.program_id(0) % blocks_across).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.load(offsets_ptr + EXAMPLE + example)
    length = (tl.load(offsets_ptr + EXAMPLE + example + 1) - first).to(tl.int32)
    in_t = tl.arange(0, BLOCK_T)
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
    live = (rows < STOP)[:, None] & (cols < N_COLUMNS)[None, :]
    if STEP == 1:
        at = rows[:, None] * N_COLUMNS + cols[None, :]
        root = of_v * tl.load(exp_avg_sq_ptr + at, mask=live, other=0.0) + of_gg * g * g
        root = tl.sqrt_rn(root + eps_inside) + eps_outside
        g = of_g * g
        if exp_avg_ptr is not None:
            g += of_m * tl.load(exp_avg_ptr + at, mask=live, other=0.0)
        g = tl.div_rn(g, tl.where(root == 0.0, float("inf"), root))
    elif STEP == 2:
        g = g / tl.where(g == 0.0, float("inf"), tl.abs(g))
    # What lies outside is not zero where an infinity met a masked zero.
    g = tl.where(live, g, 0.0)
    to = example * stride_gammas_n + (rows - ROW)[:, None] * N_COLUMNS + cols[None, :]
    tl.store(gammas_ptr + to, g, mask=live)
    tl.store(norms_ptr + example * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(g * g, axis=1), axis=0))


@triton.jit
def dots_kernel(
    gammas_ptr, targets_ptr, out_ptr, N, S, P, stride_gammas_n, stride_targets_s, STRETCH,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[stretch, n, s] = gammas[n] . targets[s] over STRETCH coordinates."""
    stretch = tl.program_id(0).to(tl.int64)
    examples = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ones = tl.program_id(2).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    in_p = tl.arange(0, BLOCK_P)
    gammas_at = gammas_ptr + tl.minimum(examples, N - 1)[:, None] * stride_gammas_n + in_p[None, :]
    targets_at = targets_ptr + tl.minimum(ones, S - 1)[:, None] * stride_targets_s + in_p[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
    for p0 in range(stretch * STRETCH, tl.minimum((stretch + 1) * STRETCH, P), BLOCK_P):
        inside = (in_p + p0 < P)[None, :]
        g = tl.load(gammas_at + p0, mask=inside, other=0.0)
        y = tl.load(targets_at + p0, mask=inside, other=0.0)
        if y.dtype == tl.bfloat16:
            high = g.to(tl.bfloat16)
            total = tile_product(high, tl.trans(y), total, PRECISION)
            total = tile_product((g - high.to(tl.float32)).to(tl.bfloat16), tl.trans(y), total, PRECISION)
        else:
            total = tile_product(g, tl.trans(y.to(tl.float32)), total, PRECISION)
    to = out_ptr + (stretch * N + examples)[:, None] * S + ones[None, :]
    tl.store(to, total, mask=(examples < N)[:, None] & (ones < S)[None, :])


@triton.jit(do_not_specialize=["row_first", "row_second", "sign_first", "sign_second"])
def sjlt_kernel(
    gammas_ptr, out_ptr, row_first, row_second, sign_first, sign_second, weight, N, FIRST_BLOCK, N_BLOCKS, SKIPPED,
    COUNT, LOW, HIGH, J, stride_gammas_n, stride_out_n,
    BITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds nonzero J of COUNT coordinates to BLOCK_K rows LOW to HIGH of N sketches.

    gammas holds them, from coordinate SKIPPED of the first of N_BLOCKS blocks of SJLT on.
    """
    length = HIGH - LOW
    rows = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    examples = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    gammas_at = gammas_ptr + examples[None, :] * stride_gammas_n
    live = (rows < length)[:, None] & (examples < N)[None, :]
    stream = (rows * 0 + J).to(tl.uint32)
    sign_inner, sign_outer = inner_key(stream, sign_first), outer_key(stream, sign_second)
    total = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for block in range(0, N_BLOCKS):
        number = tl.zeros([1], tl.int64) + FIRST_BLOCK + block
        start, x, a, b = sjlt_block(number, J, length, row_first, row_second)
        in_block, met = sjlt_coordinate(rows, length, start, x, a, b, BITS)
        coordinate = (number << BITS) + in_block.to(tl.int64)
        place = (block << BITS) + in_block.to(tl.int32) - SKIPPED
        met = met & (place >= 0) & (place < COUNT)
        word = counter_word(coordinate >> 5, sign_inner, sign_outer) >> (coordinate & 31).to(tl.uint32)
        sign = 1.0 - 2.0 * (word & 1).to(tl.float32)
        value = tl.load(gammas_at + place[:, None], mask=live & met[:, None], other=0.0)
        total += sign[:, None] * value
    at = out_ptr + examples[None, :] * stride_out_n + (LOW + rows)[:, None]
    tl.store(at, tl.load(at, mask=live, other=0.0) + weight * total, mask=live)


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
    """The (still unwritten) partial results and the launches that write them, for an architecture of LAUNCH_TABLE.

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
    left_a, left_a_low, launch_a = _products(delta, lora_b.T, scale, architecture)
    right_b, right_b_low, launch_b = _products(x, lora_a, scale, architecture)
    launches += [launch_a, launch_b] if len(x) else []
    offsets = offsets.to(x.device)
    for part in (
        (left_a, left_a_low, x, None, 0, r, d_in),
        (delta, None, right_b, right_b_low, r * d_in, d_out, r),
    ):
        left, left_low, right, right_low, start, n_rows, n_columns = part
        block_j, block_c, block_t, num_warps, num_stages, precision = LAUNCH_TABLE[architecture, x.element_size()][3:]
        n_block = max(1, min(n, GAMMAS // (block_j * n_columns)))
        rows_at_once = max(1, GAMMAS // (n_block * n_columns * block_j)) * block_j
        rows_at_once = min(rows_at_once, triton.cdiv(n_rows, block_j) * block_j)
        gammas = x.new_empty(n_block, min(rows_at_once, n_rows) * n_columns, dtype=floats)
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
                        | {"offsets_ptr": offsets, **state, "gammas_ptr": gammas, "norms_ptr": norms[-1][1]}
                        | {"EXAMPLE": example, "ROW": row, "STOP": stop, "N_COLUMNS": n_columns}
                        | {"stride_left_t": left.stride(0), "stride_right_t": right.stride(0)}
                        | {"stride_gammas_n": gammas.stride(0)},
                        {"STEP": STEPS["sign" if sign else "none" if adam is None else "adam"], "BLOCK_J": block_j}
                        | {"BLOCK_C": block_c, "BLOCK_T": block_t, "PRECISION": precision},
                        {"num_warps": num_warps, "num_stages": num_stages},
                    )
                )
                begin, end = start + row * n_columns, start + stop * n_columns
                if targets is not None:
                    partial, launch = _dots(gammas, here, targets[:, begin:end], architecture)
                    dots.append((example, partial))
                    launches.append(launch)
                if sketch is not None and projected is not None:
                    launches += _sjlt(gammas, here, sketch, begin, end, projected[example:])
    return (dots, norms, projected), launches


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
    matrix: torch.Tensor, weight: torch.Tensor, scale: float, architecture: str
) -> tuple[torch.Tensor, torch.Tensor | None, Launch]:
    """scale matrix weight^T [t, r_padded], as one tensor or as a sum of two, and the launch that writes it."""
    (t, d), r = matrix.shape, len(weight)
    block_t, block_k, num_warps = LAUNCH_TABLE[architecture, matrix.element_size()][:3]
    precision = LAUNCH_TABLE[architecture, matrix.element_size()][-1]
    block_r = min(64, max(16, triton.next_power_of_2(r)))
    r_padded = triton.cdiv(r, block_r) * block_r
    high, low = _split(weight, matrix.dtype, r_padded)
    product = matrix.new_empty(t, r_padded)
    product_low = torch.empty_like(product) if matrix.element_size() == 2 else None
    launch = Launch(
        products_kernel,
        (triton.cdiv(t, block_t), r_padded // block_r),
        {"matrix_ptr": matrix, "high_ptr": high, "low_ptr": low, "out_ptr": product, "out_low_ptr": product_low}
        | {"scale": scale, "T": t, "D": d, "R": r_padded}
        | {"stride_matrix_t": matrix.stride(0), "stride_weight_r": high.stride(0)},
        {"BLOCK_T": block_t, "BLOCK_R": block_r, "BLOCK_K": block_k, "PRECISION": precision},
        {"num_warps": num_warps, "num_stages": 3},
    )
    return product, product_low, launch


def _dots(gammas: torch.Tensor, n: int, targets: torch.Tensor, architecture: str) -> tuple[torch.Tensor, Launch]:
    block_n, block_s, block_p, num_warps = DOTS_BLOCK[targets.element_size()]
    s, p = targets.shape
    stretches = triton.cdiv(p, DOTS_STRETCH)
    partial = gammas.new_empty(stretches, n, s)
    products = LAUNCH_TABLE[architecture, 2 if targets.dtype == torch.bfloat16 else 4][-1]
    launch = Launch(
        dots_kernel,
        (stretches, triton.cdiv(n, block_n), triton.cdiv(s, block_s)),
        {"gammas_ptr": gammas, "targets_ptr": targets, "out_ptr": partial, "N": n, "S": s, "P": p}
        | {"stride_gammas_n": gammas.stride(0), "stride_targets_s": targets.stride(0), "STRETCH": DOTS_STRETCH},
        {"BLOCK_N": block_n, "BLOCK_S": block_s, "BLOCK_P": block_p, "PRECISION": products},
        {"num_warps": num_warps, "num_stages": 3},
    )
    return partial, launch


def _sjlt(
    gammas: torch.Tensor, n: int, sketch: SketchSpec, begin: int, end: int, projected: torch.Tensor
) -> list[Launch]:
    """One launch for each nonzero of a coordinate: each has rows of its own."""
    block_k, block_n, num_warps = SJLT_BLOCK
    bits = (sketch.k // sketch.sparsity).bit_length() - 1
    (row_first, row_second), (sign_first, sign_second) = (
        hash_key(sketch.seed, purpose).signed() for purpose in (SJLT, SJLT_SIGN)
    )
    first, launches = (sketch.first + begin) >> bits, []
    for j in range(sketch.sparsity):
        low, high = j * sketch.k // sketch.sparsity, (j + 1) * sketch.k // sketch.sparsity
        launches.append(
            Launch(
                sjlt_kernel,
                (triton.cdiv(high - low, block_k), triton.cdiv(n, block_n)),
                {"gammas_ptr": gammas, "out_ptr": projected, "row_first": row_first, "row_second": row_second}
                | {"sign_first": sign_first, "sign_second": sign_second, "weight": sketch.sparsity**-0.5, "N": n}
                | {"FIRST_BLOCK": first, "N_BLOCKS": ((sketch.first + end - 1) >> bits) - first + 1}
                | {"SKIPPED": sketch.first + begin - (first << bits), "COUNT": end - begin}
                | {"LOW": low, "HIGH": high, "J": j}
                | {"stride_gammas_n": gammas.stride(0), "stride_out_n": projected.stride(0)},
                {"BITS": bits, "BLOCK_K": block_k, "BLOCK_N": block_n},
                {"num_warps": num_warps},
            )
        )
    return launches


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
