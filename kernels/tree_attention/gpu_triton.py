# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Attention over a forest of packed segments on a GPU; only blocks in which something is attended are visited.

Who owns what: a program owns BLOCK_Q rows, a row being one token under one of the GROUP query heads that share a key
    head: packing the heads of a group fills the blocks of short segments and reads their keys once. The host cuts the
    blocks, which never cross a segment, and lists the ranges of keys of each segment (its ancestors and itself,
    neighbours merged); a program visits those ranges only, up to its newest token. Longest blocks start first.
Reads: each block's keys and values once a block, from the second-level cache; queries once. Writes: the output once;
    6 + 3 integers a block and range. No atomics; the order of keys is fixed by the packing: same inputs, same bits.
Accumulator: float32 running maximum, sum and output, in units of log2; weights are rounded to the dtype of value for
    the second product. float32 products: three TF32 products ("tf32x3") on NVIDIA, true float32 on AMD.
Masks: tiles that all queries of the block see in full are not masked; with a window that some sequence exceeds every
    tile is. Keys past the end of a range repeat its last key, so that NaN stays with a segment's descendants.
Limits: float32 heads up to 128, 16-bit heads up to 256 (wider ones spill); sizes are padded to powers of two. Heads of
    one feature get a second one: where tokens and features are both 1 apart, 16-bit products of Triton 3.6 for H100
    read outside shared memory.

Ladder, predicted for one H100 from the compiled kernel, bfloat16 (an H200 took three times as long: docs/measured.md):
    A: 9 query heads on 3 key heads of 64, 120 sequences, 26,110 tokens (floor 23.9 us: the bytes);
    B: the same heads, one prompt of 2,048 tokens, 8 answers of 512 (floor 26.9 us: the exponentials)
    2026-11-22  128 rows x 64 keys, 8 warps, one program a multiprocessor     23.9 us    41.5 us   issue-bound
    2026-11-22  64 rows x 64 keys, 4 warps, three programs                    23.9 us    45.6 us   cache-bound
    2026-11-22  128 rows x 64 keys, 4 warps, two programs                     23.9 us    36.6 us   issue-bound
"""

from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from fastsel.kernels._runtime.devices import triton_architecture
from fastsel.kernels._runtime.triton_blocks import LOG2_E, MASKED, soft_capped, tile_product
from fastsel.kernels._runtime.triton_launch import Launch, Programs, Work, no_device
from fastsel.kernels.tree_attention.segments import Segments

# (architecture, bytes of an element, largest head size): BLOCK_Q, BLOCK_K, num_warps, num_stages, float32 products
LAUNCH_TABLE = {
    ("sm_80", 2, 64): (128, 32, 4, 3, "ieee"),
    ("sm_80", 2, 128): (128, 32, 8, 3, "ieee"),
    ("sm_80", 2, 256): (64, 32, 8, 2, "ieee"),
    ("sm_80", 4, 64): (32, 32, 4, 2, "tf32x3"),
    ("sm_80", 4, 128): (32, 16, 8, 2, "tf32x3"),
    ("sm_90", 2, 64): (64, 64, 4, 3, "ieee"),
    ("sm_90", 2, 128): (64, 32, 4, 3, "ieee"),
    ("sm_90", 2, 256): (128, 32, 8, 2, "ieee"),
    ("sm_90", 4, 64): (64, 32, 4, 2, "tf32x3"),
    ("sm_90", 4, 128): (32, 32, 8, 2, "tf32x3"),
    ("sm_100", 2, 64): (128, 64, 8, 2, "ieee"),
    ("sm_100", 2, 128): (64, 64, 8, 2, "ieee"),
    ("sm_100", 2, 256): (64, 32, 8, 1, "ieee"),  # two stages spill under Triton 3.7.1
    ("sm_100", 4, 64): (64, 32, 8, 2, "tf32x3"),
    ("sm_100", 4, 128): (32, 16, 8, 2, "tf32x3"),
    ("gfx942", 2, 64): (128, 64, 4, 2, "ieee"),
    ("gfx942", 2, 128): (128, 32, 8, 2, "ieee"),
    ("gfx942", 2, 256): (64, 32, 8, 2, "ieee"),
    ("gfx942", 4, 64): (64, 32, 4, 2, "ieee"),
    ("gfx942", 4, 128): (64, 32, 8, 2, "ieee"),
}
WIDEST_HEAD = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}  # wider ones spill registers
# Every layer of a model attends over the same segments: their lists are made, and sent to the device, once.
_KEPT: WeakKeyDictionary[Segments, dict[tuple[int, int, torch.device], tuple[torch.Tensor, torch.Tensor, int]]] = (
    WeakKeyDictionary()
)


@triton.jit
def attend(
    q, best, total, accumulator, key_ptr, value_ptr, begin, stop, newest, oldest,
    stride_key_t, stride_value_t, scale, softcap,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED_TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Folds the keys begin:stop into the running softmax (units of log2); each row sees oldest to newest."""
    in_d = tl.arange(0, BLOCK_D)
    in_dv = tl.arange(0, BLOCK_DV)
    for k0 in range(begin, stop, BLOCK_K):
        index = k0 + tl.arange(0, BLOCK_K)
        safe = index
        if MASKED_TILES:
            safe = tl.minimum(index, stop - 1)  # never a key of another segment, whose NaN would spread as 0 * NaN
        key_at = key_ptr + safe.to(tl.int64)[:, None] * stride_key_t + in_d[None, :]
        value_at = value_ptr + safe.to(tl.int64)[:, None] * stride_value_t + in_dv[None, :]
        if HEAD == BLOCK_D:
            k = tl.load(key_at)
        else:
            k = tl.load(key_at, mask=(in_d < HEAD)[None, :], other=0.0)
        if HEAD_V == BLOCK_DV:
            v = tl.load(value_at)
        else:
            v = tl.load(value_at, mask=(in_dv < HEAD_V)[None, :], other=0.0)
        scores = tile_product(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_K], tl.float32), PRECISION)
        if softcap is not None:
            x = soft_capped(scores * scale, softcap) * LOG2_E
        else:
            x = scores * (scale * LOG2_E)
        if MASKED_TILES:
            seen = index[None, :] <= newest[:, None]
            if oldest is not None:
                seen = seen & (index[None, :] >= oldest[:, None])
            x = tl.where(seen, x, MASKED)
        new_best = tl.maximum(best, tl.max(x, axis=1))
        powers = tl.exp2(x - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(powers, axis=1)
        accumulator = tile_product(powers.to(v.dtype), v, accumulator * shrink[:, None], PRECISION)
        best = new_best
    return best, total, accumulator


@triton.jit
def tree_attention_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, blocks_ptr, ranges_ptr,
    stride_query_t, stride_query_h, stride_key_t, stride_key_h, stride_value_t, stride_value_h,
    stride_out_t, stride_out_h, scale, softcap, window,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """This program attends BLOCK_Q (token, head) rows: the GROUP query heads of one key head over a few tokens."""
    block_at = blocks_ptr + tl.program_id(0).to(tl.int64) * 6
    segment_begin = tl.load(block_at)
    segment_end = tl.load(block_at + 1)
    first_row = tl.load(block_at + 2)
    first_position = tl.load(block_at + 3)
    range_begin = tl.load(block_at + 4)
    range_end = tl.load(block_at + 5)
    key_head = tl.program_id(1).to(tl.int64)

    rows = first_row + tl.arange(0, BLOCK_Q)
    live = rows < (segment_end - segment_begin) * GROUP
    tokens = tl.minimum(segment_begin + rows // GROUP, segment_end - 1)  # rows past the end repeat the last token
    heads = key_head * GROUP + rows % GROUP
    positions = tokens - segment_begin + first_position
    oldest_token = segment_begin + first_row // GROUP
    newest_token = tl.minimum(segment_begin + (first_row + BLOCK_Q - 1) // GROUP, segment_end - 1)

    in_d = tl.arange(0, BLOCK_D)
    in_dv = tl.arange(0, BLOCK_DV)
    query_at = query_ptr + tokens.to(tl.int64)[:, None] * stride_query_t + heads[:, None] * stride_query_h
    q = tl.load(query_at + in_d[None, :], mask=(in_d < HEAD)[None, :], other=0.0)
    key_ptr += key_head * stride_key_h
    value_ptr += key_head * stride_value_h

    best = tl.full([BLOCK_Q], MASKED, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    accumulator = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    for r in range(range_begin, range_end):
        begin = tl.load(ranges_ptr + 3 * r)
        end = tl.minimum(tl.load(ranges_ptr + 3 * r + 1), newest_token + 1)
        # Along a path, rows of the packed array come in the order of positions: comparing row numbers is the causal
        # mask within the segment and admits every row of an ancestor.
        newest = tl.minimum(tokens, end - 1)
        oldest = None
        if window is not None:
            begin_position = tl.load(ranges_ptr + 3 * r + 2)
            oldest = positions - begin_position + begin - window + 1
            skipped = oldest_token - segment_begin + first_position - begin_position - window + 1
            begin += tl.maximum(skipped, 0)
            masked_from = begin
        else:
            seen_by_all = tl.maximum(tl.minimum(end, oldest_token + 1) - begin, 0)
            masked_from = begin + seen_by_all // BLOCK_K * BLOCK_K
            best, total, accumulator = attend(
                q, best, total, accumulator, key_ptr, value_ptr, begin, masked_from, newest, oldest,
                stride_key_t, stride_value_t, scale, softcap,
                HEAD, HEAD_V, BLOCK_D, BLOCK_DV, BLOCK_K, False, PRECISION,
            )  # fmt: skip
        best, total, accumulator = attend(
            q, best, total, accumulator, key_ptr, value_ptr, masked_from, end, newest, oldest,
            stride_key_t, stride_value_t, scale, softcap,
            HEAD, HEAD_V, BLOCK_D, BLOCK_DV, BLOCK_K, True, PRECISION,
        )  # fmt: skip

    result = accumulator / total[:, None]
    out_at = out_ptr + tokens.to(tl.int64)[:, None] * stride_out_t + heads[:, None] * stride_out_h
    tl.store(
        out_at + in_dv[None, :], result.to(out_ptr.dtype.element_ty), mask=live[:, None] & (in_dv < HEAD_V)[None, :]
    )


def _query_blocks(segments: Segments, block_q: int, group: int) -> tuple[list[list[int]], list[list[int]]]:
    """What each program attends, longest first, and the ranges of keys that each segment sees.

    Returns:
        One row a block of block_q (token, head of the group) pairs: first token and end of its segment, first pair
        within the segment, position of the segment's first token, first and end index of its ranges; and one row
        a range: first token, end, position of the first token.
    """
    blocks: list[list[int]] = []
    ranges: list[list[int]] = []
    keys_seen: list[int] = []
    for s, ancestors in enumerate(segments.ancestor_ranges):
        begin, end, position = segments.start_list[s], segments.start_list[s + 1], segments.first_positions[s]
        range_begin = len(ranges)
        ranges += [list(item) for item in ancestors]
        if ancestors and ancestors[-1][1] == begin:
            ranges[-1][1] = end  # the segment follows its parent directly: one range
        else:
            ranges.append([begin, end, position])
        for first_row in range(0, (end - begin) * group, block_q):
            blocks.append([begin, end, first_row, position, range_begin, len(ranges)])
            keys_seen.append(position + min(end - begin, (first_row + block_q - 1) // group + 1))
    longest_first = sorted(range(len(blocks)), key=lambda b: -keys_seen[b])
    return [blocks[b] for b in longest_first], ranges


def _block_tensors(
    segments: Segments, block_q: int, group: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The two lists of _query_blocks on the device, and the length of the longest sequence."""
    kept = _KEPT.setdefault(segments, {})
    key = (block_q, group, device)
    if key not in kept:
        blocks, ranges = _query_blocks(segments, block_q, group)
        longest = max((end - begin + position for begin, end, position in ranges), default=0)
        kept[key] = (
            torch.tensor(blocks, dtype=torch.int32, device=device),
            torch.tensor(ranges, dtype=torch.int32, device=device),
            longest,
        )
    return kept[key]


def unsupported(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> str | None:
    """Why these inputs cannot run here, or None."""
    dtype = str(query.dtype).removeprefix("torch.")
    if query.dtype not in WIDEST_HEAD:
        return f"takes float32, bfloat16 and float16; query is {dtype}"
    widest = max(query.shape[2], value.shape[2])
    if widest > WIDEST_HEAD[query.dtype]:
        return f"takes {dtype} heads of at most {WIDEST_HEAD[query.dtype]} features; these have {widest}"
    return no_device(query)


def plan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    window: int | None,
    softcap: float | None,
    scale: float,
    *,
    architecture: str,
) -> tuple[torch.Tensor, list[Launch]]:
    """The (still unwritten) result and the launches that write it, for an architecture of LAUNCH_TABLE."""
    n_features = value.shape[2]
    if query.shape[2] == 1:
        query, key = pad(query, (0, 1)), pad(key, (0, 1))
    if n_features == 1:
        value = pad(value, (0, 1))
    n_tokens, n_heads, head = query.shape
    n_key_heads, head_v = value.shape[1:]
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    size = next(size for size in (64, 128, 256) if size >= max(head, head_v))
    block_q, block_k, num_warps, num_stages, precision = LAUNCH_TABLE[architecture, query.element_size(), size]
    group = n_heads // n_key_heads
    blocks, ranges, longest = _block_tensors(segments, block_q, group, query.device)
    if window is not None and window >= longest:
        window = None  # the code without a window is faster
    out = query.new_empty(n_tokens, n_heads, head_v)
    return out[..., :n_features], [
        Launch(
            tree_attention_kernel,
            (len(blocks), n_key_heads),
            {"query_ptr": query, "key_ptr": key, "value_ptr": value, "out_ptr": out}
            | {"blocks_ptr": blocks, "ranges_ptr": ranges}
            | {"stride_query_t": query.stride(0), "stride_query_h": query.stride(1)}
            | {"stride_key_t": key.stride(0), "stride_key_h": key.stride(1)}
            | {"stride_value_t": value.stride(0), "stride_value_h": value.stride(1)}
            | {"stride_out_t": out.stride(0), "stride_out_h": out.stride(1)}
            | {"scale": scale, "softcap": softcap, "window": window},
            {"HEAD": head, "HEAD_V": head_v, "GROUP": group, "BLOCK_Q": block_q, "BLOCK_K": block_k}
            | {"BLOCK_D": max(16, triton.next_power_of_2(head)), "BLOCK_DV": max(16, triton.next_power_of_2(head_v))}
            | {"PRECISION": precision},
            {"num_warps": num_warps, "num_stages": num_stages},
        )
    ]


def work(launch: Launch, segments: Segments, head_dim: int) -> Work:
    """What the launch executes (heads of equal size, no window) and what the task needs, for a predicted time."""
    c, itemsize = launch.constants, launch.arguments["query_ptr"].element_size()
    products = 3 if c["PRECISION"] == "tf32x3" else 1
    programs = []
    blocks, ranges = _query_blocks(segments, c["BLOCK_Q"], c["GROUP"])
    for begin, segment_end, first_row, _, range_begin, range_end in blocks:
        oldest = begin + first_row // c["GROUP"]
        newest = min(begin + (first_row + c["BLOCK_Q"] - 1) // c["GROUP"], segment_end - 1)
        full = masked = 0
        for range_first, range_stop, _ in ranges[range_begin:range_end]:
            seen_by_all = max(0, min(range_stop, oldest + 1) - range_first) // c["BLOCK_K"]
            full += seen_by_all
            masked += triton.cdiv(min(range_stop, newest + 1) - range_first, c["BLOCK_K"]) - seen_by_all
        programs.append(Programs(launch.grid[1], (full, masked), range_end - range_begin))
    n_heads = launch.grid[1] * c["GROUP"]
    pairs = n_heads * int((segments.positions + 1).sum())
    return Work(
        programs=programs,
        flops=products * 2 * c["BLOCK_Q"] * c["BLOCK_K"] * (c["BLOCK_D"] + c["BLOCK_DV"]),
        cache_bytes=c["BLOCK_K"] * 2 * head_dim * itemsize,
        matrix_units="16-bit" if itemsize == 2 else "tf32",
        needed_flops=products * 4 * pairs * head_dim,
        needed_exponentials=pairs,
        needed_bytes=2 * segments.n_tokens * (n_heads + launch.grid[1]) * head_dim * itemsize,
    )


def compute(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> torch.Tensor:
    """See api.tree_attention."""
    out, launches = plan(query, key, value, segments, window, softcap, scale, architecture=triton_architecture(query))
    for launch in launches:
        launch.run()
    return out
