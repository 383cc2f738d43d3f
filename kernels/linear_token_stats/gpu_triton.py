# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Statistics of softmax(hidden @ weight.T) per token on a GPU; the logits live one tile at a time in registers.

Who owns what: a program of the first kernel owns BLOCK_T tokens x SLICE words; it walks the slice tile by tile and
    keeps up to six numbers a token. A program of the second folds all slices of a few tokens, in a fixed tree. No
    atomics, and SLICE does not depend on t: a token's bits depend neither on the run nor on the rest of the batch.
Reads: weight once from memory and t / BLOCK_T times from the second-level cache (programs that run together share
    their slice); hidden v / BLOCK_V times from the cache. Writes: 4 bytes x v / SLICE x t for each partial array
    (best and total, one more for each of nll, entropy, top2_logprob, argmax); an output that is not asked for has no
    array and no instruction. Largest extra memory, all outputs: 24 bytes x v / SLICE x t.
Accumulator: float32, in units of log2 (one multiply-add makes scale, bias and units; exp2 is the device's own).
    float32 products: three TF32 products ("tf32x3") on NVIDIA, true float32 on AMD.
Limits: float32, bfloat16, float16; any strides, but rows that are no multiple of 16 elements are read narrowly.

Ladder, predicted for one H100 from the compiled kernel, bfloat16, nll (measured: docs/measured.md):
    t = 2,048, v = 49,152, d = 576 (floor 0.117 ms) and t = 8,192, v = 128,256, d = 4,096 (floor 8.70 ms)
    2026-11-22  tile 128 x 128, 8 warps, one program a multiprocessor     0.238 ms    15.0 ms   cache-bound
    2026-11-22  4 warps, two programs overlap                             0.199 ms    14.7 ms   cache-bound
    2026-11-22  tile 128 x 256, 8 warps: a third fewer bytes a flop       0.187 ms    11.4 ms   cache-bound
    With all outputs that tile spills (136 bytes a thread), with a bias too (8), so "all" keeps 128 x 128. At 128
    registers a thread two programs of 128 x 128 with 8 warps would overlap: 0.199 ms, but 8 bytes spill (all: 232).
"""

import torch
import triton
import triton.language as tl

from fastsel.kernels._runtime.devices import triton_architecture
from fastsel.kernels._runtime.triton_blocks import LN_2, LOG2_E, MASKED, soft_capped, tile_product
from fastsel.kernels._runtime.triton_launch import Launch, Programs, Work, no_device

SLICE = 1024  # vocabulary columns of one program: a multiple of every BLOCK_V below
MERGE_TILE = 2048  # partial results of one array that one program of the second kernel holds
# (architecture, bytes of an element, variant): BLOCK_T, BLOCK_V, BLOCK_D, num_warps, num_stages, float32 products
# "few": nll, lse, top1_logprob, no bias, no softcap; "unaligned": rows are no multiple of 16 elements; "all": the rest.
LAUNCH_TABLE = {
    ("sm_80", 2, "few"): (128, 128, 64, 8, 3, "ieee"),
    ("sm_80", 2, "all"): (128, 128, 64, 8, 3, "ieee"),
    ("sm_80", 2, "unaligned"): (64, 64, 32, 4, 2, "ieee"),
    ("sm_80", 4, "few"): (64, 64, 32, 4, 3, "tf32x3"),
    ("sm_80", 4, "all"): (64, 64, 32, 4, 3, "tf32x3"),
    ("sm_80", 4, "unaligned"): (64, 32, 32, 4, 2, "tf32x3"),
    ("sm_90", 2, "few"): (128, 256, 64, 8, 3, "ieee"),
    ("sm_90", 2, "all"): (128, 128, 64, 8, 3, "ieee"),
    ("sm_90", 2, "unaligned"): (64, 64, 32, 4, 2, "ieee"),
    ("sm_90", 4, "few"): (128, 64, 32, 4, 3, "tf32x3"),
    ("sm_90", 4, "all"): (128, 128, 32, 8, 3, "tf32x3"),
    ("sm_90", 4, "unaligned"): (64, 64, 32, 4, 2, "tf32x3"),
    ("sm_100", 2, "few"): (128, 256, 64, 8, 3, "ieee"),
    ("sm_100", 2, "all"): (128, 128, 64, 8, 3, "ieee"),
    ("sm_100", 2, "unaligned"): (64, 64, 32, 4, 2, "ieee"),
    ("sm_100", 4, "few"): (128, 128, 32, 8, 3, "tf32x3"),
    ("sm_100", 4, "all"): (128, 64, 32, 8, 3, "tf32x3"),
    ("sm_100", 4, "unaligned"): (64, 64, 32, 4, 1, "tf32x3"),  # two stages spill under Triton 3.7.1
    ("gfx942", 2, "few"): (128, 128, 64, 8, 2, "ieee"),
    ("gfx942", 2, "all"): (128, 128, 64, 8, 2, "ieee"),
    ("gfx942", 2, "unaligned"): (64, 64, 32, 4, 2, "ieee"),
    ("gfx942", 4, "few"): (128, 128, 32, 8, 2, "ieee"),
    ("gfx942", 4, "all"): (128, 128, 32, 8, 2, "ieee"),
    ("gfx942", 4, "unaligned"): (64, 64, 32, 4, 2, "ieee"),
}


@triton.jit
def slice_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr,
    best_ptr, total_ptr, picked_ptr, moment_ptr, second_ptr, argmax_ptr,
    T, V, D, stride_hidden_t, stride_hidden_d, stride_weight_v, stride_weight_d, stride_bias_v, scale, softcap,
    SLICE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """This program summarises BLOCK_T tokens over SLICE columns of the vocabulary, in units of log2."""
    slice_index = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    # Rows and columns past the end read the last one again: the inner loop then needs no mask for them.
    safe_rows = tl.minimum(rows, T - 1)
    in_d = tl.arange(0, BLOCK_D)
    hidden_at = (
        hidden_ptr + safe_rows[:, None] * stride_hidden_t + in_d[None, :] * stride_hidden_d
    )  # [BLOCK_T, BLOCK_D]
    if picked_ptr is not None:
        wanted = tl.load(targets_ptr + safe_rows).to(tl.int32)
        picked = tl.zeros([BLOCK_T], tl.float32)
    best = tl.full([BLOCK_T], MASKED, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)  # sum of 2^(x - best)
    moment = tl.zeros([BLOCK_T], tl.float32)  # sum of 2^(x - best) * (x - best)
    second = tl.full([BLOCK_T], -float("inf"), tl.float32)
    argmax = tl.zeros([BLOCK_T], tl.int32)

    slice_begin = tl.program_id(1) * SLICE
    for v0 in range(slice_begin, tl.minimum(slice_begin + SLICE, V), BLOCK_V):
        cols = v0 + tl.arange(0, BLOCK_V)
        safe_cols = tl.minimum(cols, V - 1).to(tl.int64)
        weight_at = weight_ptr + safe_cols[:, None] * stride_weight_v + in_d[None, :] * stride_weight_d
        product = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            if EVEN_D:
                h = tl.load(hidden_at + d0 * stride_hidden_d)
                w = tl.load(weight_at + d0 * stride_weight_d)
            else:
                h = tl.load(hidden_at + d0 * stride_hidden_d, mask=(in_d + d0 < D)[None, :], other=0.0)
                w = tl.load(weight_at + d0 * stride_weight_d, mask=(in_d + d0 < D)[None, :], other=0.0)
            product = tile_product(h, tl.trans(w), product, PRECISION)

        offset = tl.where(cols < V, 0.0, -float("inf"))
        if softcap is not None:
            if bias_ptr is not None:
                product += tl.load(bias_ptr + safe_cols * stride_bias_v).to(tl.float32)[None, :]
            x = soft_capped(product * scale, softcap) * LOG2_E + offset[None, :]
        else:
            if bias_ptr is not None:
                offset += tl.load(bias_ptr + safe_cols * stride_bias_v).to(tl.float32) * (scale * LOG2_E)
            x = product * (scale * LOG2_E) + offset[None, :]  # one fused multiply-add: mask, bias, scale, units

        if picked_ptr is not None:
            picked += tl.sum(tl.where(cols[None, :] == wanted[:, None], x, 0.0), axis=1)
        tile_best = tl.max(x, axis=1)
        if second_ptr is not None or argmax_ptr is not None:
            in_v = tl.arange(0, BLOCK_V)[None, :]
            tile_argmax = tl.min(tl.where(x == tile_best[:, None], in_v, BLOCK_V), axis=1)  # ties: the first
            if second_ptr is not None:
                tile_second = tl.max(tl.where(in_v == tile_argmax[:, None], -float("inf"), x), axis=1)
                second = tl.where(tile_best > best, tl.maximum(best, tile_second), tl.maximum(second, tile_best))
            if argmax_ptr is not None:
                argmax = tl.where(tile_best > best, tile_argmax + v0, argmax)  # strict: ties keep the earlier column
        new_best = tl.maximum(best, tile_best)
        shrink = tl.exp2(best - new_best)
        shifted = x - new_best[:, None]
        powers = tl.exp2(shifted)
        if moment_ptr is not None:
            # A word of probability 0 adds 0, not 0 * -inf; a NaN is still seen in the total.
            terms = tl.where(powers > 0.0, powers * shifted, 0.0)
            moment = shrink * (moment + total * (best - new_best)) + tl.sum(terms, axis=1)
        total = shrink * total + tl.sum(powers, axis=1)
        best = new_best

    at = slice_index * T + rows
    live = rows < T
    tl.store(best_ptr + at, best, mask=live)
    tl.store(total_ptr + at, total, mask=live)
    if picked_ptr is not None:
        tl.store(picked_ptr + at, picked, mask=live)
    if moment_ptr is not None:
        tl.store(moment_ptr + at, moment, mask=live)
    if second_ptr is not None:
        tl.store(second_ptr + at, second, mask=live)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + at, argmax, mask=live)


@triton.jit
def merge_kernel(
    best_ptr, total_ptr, picked_ptr, moment_ptr, second_ptr, argmax_ptr, targets_ptr,
    nll_ptr, lse_ptr, entropy_ptr, top1_ptr, top2_ptr, out_argmax_ptr,
    T, SLICES, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """This program folds the slices of BLOCK_T tokens together and writes the statistics in natural units."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = rows < T
    slices = tl.arange(0, BLOCK_S)
    at = slices.to(tl.int64)[:, None] * T + rows[None, :]  # [BLOCK_S, BLOCK_T]
    there = (slices < SLICES)[:, None] & live[None, :]
    best_s = tl.load(best_ptr + at, mask=there, other=MASKED)
    total_s = tl.load(total_ptr + at, mask=there, other=0.0)
    best = tl.max(best_s, axis=0)
    shrink = tl.exp2(best_s - best[None, :])
    total = tl.sum(total_s * shrink, axis=0)
    # Nothing but -inf leaves a total of 0, NaN or +inf among the logits make it NaN: both give NaN, and argmax -1.
    is_distribution = total > 0.0
    log_total = tl.where(is_distribution, tl.log2(total), float("nan"))
    if nll_ptr is not None:
        picked = tl.sum(tl.load(picked_ptr + at, mask=there, other=0.0), axis=0)  # all slices but one hold 0
        wanted = tl.load(targets_ptr + rows, mask=live, other=-1)
        # best - picked comes first: best + log_total would round log_total away when best is large
        nll = ((best - picked) + log_total) * LN_2
        tl.store(nll_ptr + rows, tl.where(wanted >= 0, nll, 0.0), mask=live)
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, (best + log_total) * LN_2, mask=live)
    if entropy_ptr is not None:
        moment_s = tl.load(moment_ptr + at, mask=there, other=0.0)
        moment = tl.sum(shrink * (moment_s + total_s * (best_s - best[None, :])), axis=0)
        tl.store(entropy_ptr + rows, (log_total - moment / total) * LN_2, mask=live)
    if top1_ptr is not None:
        tl.store(top1_ptr + rows, -log_total * LN_2, mask=live)
    if top2_ptr is not None or out_argmax_ptr is not None:
        winner = tl.min(tl.where(best_s == best[None, :], slices[:, None], BLOCK_S), axis=0)  # ties: the first slice
        is_winner = slices[:, None] == winner[None, :]
        if top2_ptr is not None:
            second_s = tl.load(second_ptr + at, mask=there, other=MASKED)
            second = tl.max(tl.where(is_winner, second_s, best_s), axis=0)
            second = tl.where(second > MASKED, second, -float("inf"))  # no second word has a probability
            tl.store(top2_ptr + rows, ((second - best) - log_total) * LN_2, mask=live)
        if out_argmax_ptr is not None:
            argmax_s = tl.load(argmax_ptr + at, mask=there, other=0)
            argmax = tl.sum(tl.where(is_winner, argmax_s, 0), axis=0)
            tl.store(out_argmax_ptr + rows, tl.where(is_distribution, argmax, -1).to(tl.int64), mask=live)


def unsupported(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    outputs: tuple[str, ...],
) -> str | None:
    """Why these inputs cannot run here, or None."""
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16; hidden is {str(hidden.dtype).removeprefix('torch.')}"
    if weight.shape[0] >= 2**31:
        return f"takes vocabularies below 2^31; weight has {weight.shape[0]} rows"
    for name, x in (("hidden", hidden), ("weight", weight)):
        if x.stride(1) != 1 and x.shape[1] * x.stride(1) >= 2**31:
            return f"counts elements along a row in 32 bits; {name} spreads {x.shape[1]} over {x.stride(1)} each"
    return no_device(hidden)


def _variant(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    outputs: tuple[str, ...],
) -> str:
    # Triton knows of an alignment only when a stride is a multiple of 16 elements.
    if any(x.shape[1] % 16 or x.stride(0) % 16 or x.stride(1) != 1 for x in (hidden, weight)):
        return "unaligned"
    is_plain = bias is None and softcap is None
    return "few" if is_plain and set(outputs) <= {"nll", "lse", "top1_logprob"} else "all"


def plan(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    outputs: tuple[str, ...],
    *,
    architecture: str,
) -> tuple[dict[str, torch.Tensor], list[Launch]]:
    """The (still unwritten) results and the launches that write them, for a key of LAUNCH_TABLE."""
    (n_tokens, n_features), n_words = hidden.shape, weight.shape[0]
    variant = _variant(hidden, weight, bias, softcap, outputs)
    key = (architecture, hidden.element_size(), variant)
    block_t, block_v, block_d, num_warps, num_stages, precision = LAUNCH_TABLE[key]
    n_slices = triton.cdiv(n_words, SLICE)
    block_s = triton.next_power_of_2(n_slices)
    results = {
        name: hidden.new_empty(n_tokens, dtype=torch.int64 if name == "argmax" else torch.float32) for name in outputs
    }

    def partial(needed: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        return hidden.new_empty(n_slices, n_tokens, dtype=dtype) if needed else None

    partials = {
        "best_ptr": partial(True),
        "total_ptr": partial(True),
        "picked_ptr": partial("nll" in outputs),
        "moment_ptr": partial("entropy" in outputs),
        "second_ptr": partial("top2_logprob" in outputs),
        "argmax_ptr": partial("argmax" in outputs, torch.int32),
    }
    summarise = Launch(
        slice_kernel,
        (triton.cdiv(n_tokens, block_t), n_slices),
        {"hidden_ptr": hidden, "weight_ptr": weight, "bias_ptr": bias, "targets_ptr": targets.contiguous(), **partials}
        | {"T": n_tokens, "V": n_words, "D": n_features, "scale": scale, "softcap": softcap}
        | {"stride_hidden_t": hidden.stride(0), "stride_hidden_d": hidden.stride(1)}
        | {"stride_weight_v": weight.stride(0), "stride_weight_d": weight.stride(1)}
        | {"stride_bias_v": 1 if bias is None else bias.stride(0)},
        {"SLICE": SLICE, "BLOCK_T": block_t, "BLOCK_V": block_v, "BLOCK_D": block_d}
        | {"EVEN_D": n_features % block_d == 0, "PRECISION": precision},
        {"num_warps": num_warps, "num_stages": num_stages},
    )
    merge_rows = max(1, MERGE_TILE // block_s)
    merge = Launch(
        merge_kernel,
        (triton.cdiv(n_tokens, merge_rows),),
        partials
        | {"targets_ptr": targets.contiguous(), "T": n_tokens, "SLICES": n_slices}
        | {"nll_ptr": results.get("nll"), "lse_ptr": results.get("lse"), "entropy_ptr": results.get("entropy")}
        | {"top1_ptr": results.get("top1_logprob"), "top2_ptr": results.get("top2_logprob")}
        | {"out_argmax_ptr": results.get("argmax")},
        {"BLOCK_T": merge_rows, "BLOCK_S": block_s},
        {"num_warps": 4},
    )
    return results, [summarise, merge]


def work(launch: Launch, n_tokens: int, n_words: int, n_features: int) -> Work:
    """What the first of the launches executes and what the task needs, for a predicted time."""
    c, itemsize = launch.constants, launch.arguments["hidden_ptr"].element_size()
    products = 3 if c["PRECISION"] == "tf32x3" else 1
    inner, outer = triton.cdiv(n_features, c["BLOCK_D"]), SLICE // c["BLOCK_V"]
    return Work(
        programs=[Programs(launch.grid[0] * launch.grid[1], (inner * outer,), outer)],
        flops=products * 2 * c["BLOCK_T"] * c["BLOCK_V"] * c["BLOCK_D"],
        cache_bytes=(c["BLOCK_T"] + c["BLOCK_V"]) * c["BLOCK_D"] * itemsize,
        matrix_units="16-bit" if itemsize == 2 else "tf32",
        needed_flops=products * 2 * n_tokens * n_words * n_features,
        needed_exponentials=n_tokens * n_words,
        needed_bytes=(n_tokens + n_words) * n_features * itemsize,
    )


def compute(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    outputs: tuple[str, ...],
) -> dict[str, torch.Tensor]:
    """See api.linear_token_stats."""
    results, launches = plan(
        hidden, weight, targets, bias, softcap, scale, outputs, architecture=triton_architecture(hidden)
    )
    for launch in launches:
        launch.run()
    return results
