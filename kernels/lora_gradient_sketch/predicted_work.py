"""What lora_gradient_sketch's Triton launches execute and must move: what their predicted times are made of."""

import math
from typing import Any

from fastsel.kernels._runtime.triton_launch import Launch
from fastsel.kernels._runtime.triton_sjlt import sjlt_kernel, sum_kernel
from fastsel.kernels.lora_gradient_sketch.gpu_triton import dots_kernel, pairs_kernel, products_kernel


def work(launch: Launch, tokens: int) -> dict[str, Any]:
    """What the launch executes and needs, for examples of so many tokens: the arguments of predict_streaming."""
    a, c = launch.arguments, launch.constants
    programs = math.prod(launch.grid)
    if launch.kernel is sjlt_kernel:
        # A block of gammas comes from the cache in order; the segments' sums go there.
        blocks, numbers = 1 << (c["SEGMENT_BITS"] - c["BITS"]), c["ROWS"] * c["BLOCK_K"]
        gathered = c["REPEAT"] * numbers if c["IN_SHARED"] else 0
        return _work(
            programs, blocks, 0, 4 * (c["REPEAT"] * c["ROWS"] << c["BITS"]), 4 * numbers, 0, 0, "tf32", gathered
        )
    if launch.kernel is sum_kernel:
        numbers = c["BLOCK"]
        return _work(programs, a["SEGMENTS"], 0, 4 * numbers, 8 * numbers, 8 * a["B"] * a["K"], 0, "tf32")
    if launch.kernel is dots_kernel:
        item = a["targets_ptr"].element_size()
        n_products = 2 if item == 2 else 3 if c["PRECISION"] == "tf32x3" else 1
        entries, tile = c["BLOCK_N"] * c["BLOCK_S"], (4 * c["BLOCK_N"] + item * c["BLOCK_S"]) * c["BLOCK_P"]
        flops = n_products * 2 * entries * c["BLOCK_P"]
        needed = n_products * 2 * a["N"] * a["S"] * a["P"]
        passes = -(-a["STRETCH"] // c["BLOCK_P"])
        units = "16-bit" if item == 2 else "tf32"
        return _work(programs, passes, flops, tile, 4 * entries, a["S"] * a["P"] * item, needed, units)
    if launch.kernel is pairs_kernel:
        item = 2 * a["out_ptr"].element_size() if a["out_low_ptr"] is not None else a["out_ptr"].element_size()
        # Partial results come from and go to the cache.
        return _work(programs, (a["OF_DELTA"] + a["OF_X"]) // 2, 0, 4 * c["BLOCK"], item * c["BLOCK"], 0, 0, "tf32")
    if launch.kernel is products_kernel:
        item, is_pair = a["x_ptr"].element_size(), a["a_low_ptr"] is not None
        n_products = (2 if is_pair else 1) if item == 2 else 3 if c["PRECISION"] == "tf32x3" else 1
        tile, columns = c["BLOCK_T"] + (2 if is_pair else 1) * c["BLOCK_R"], a["D_IN"] + a["D_OUT"]
        needed_bytes = item * columns * (a["T"] + (2 if is_pair else 1) * a["R"]) + 8 * a["R"] * a["T"]
        sizes = c["BLOCK_T"] * c["BLOCK_R"] * c["BLOCK_K"], a["T"] * a["R"] * columns
        passes, depth, written = -(-c["STRETCH"] // c["BLOCK_K"]), c["BLOCK_K"], 4 * c["BLOCK_T"] * c["BLOCK_R"]
    else:
        item, entries = a["left_ptr"].element_size(), (a["STOP"] - a["ROW"]) * a["N_COLUMNS"]
        is_pair = a["left_low_ptr"] is not None or a["right_low_ptr"] is not None
        n_products = (2 if is_pair else 1) if item == 2 else 3 if c["PRECISION"] == "tf32x3" else 1
        of_left, of_right = (1 if a[f"{name}_low_ptr"] is None else 2 for name in ("left", "right"))
        tile = of_left * c["BLOCK_J"] + of_right * c["BLOCK_C"]
        n = launch.grid[1]
        # The state comes from memory once for all examples, from the cache for each; gamma goes there.
        columns = of_left * (a["STOP"] - a["ROW"]) + of_right * a["N_COLUMNS"]
        needed_bytes = n * tokens * item * columns + 8 * entries
        sizes = c["BLOCK_J"] * c["BLOCK_C"] * c["BLOCK_T"], n * tokens * entries
        passes, depth, written = -(-tokens // c["BLOCK_T"]), c["BLOCK_T"], 12 * c["BLOCK_J"] * c["BLOCK_C"]
    flops, needed = (2 * n_products * size for size in sizes)
    units = "16-bit" if item == 2 else "tf32"
    return _work(programs, passes, flops, tile * depth * item, written, needed_bytes, needed, units)


def _work(
    programs: int, passes: int, flops: int, cache_bytes: int, outer_cache_bytes: int, needed_bytes: int,
    needed_flops: int, matrix_units: str, gathered: int = 0,
) -> dict[str, Any]:  # fmt: skip
    return {
        "programs": programs, "passes": passes, "flops": flops, "cache_bytes": cache_bytes,
        "outer_cache_bytes": outer_cache_bytes, "needed_bytes": needed_bytes, "needed_flops": needed_flops,
        "matrix_units": matrix_units, "gathered": gathered,
    }  # fmt: skip
