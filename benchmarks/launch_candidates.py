"""Candidates for entries of the Triton kernels' launch tables on H100 and H200, for tune_triton.py.

A candidate is the beginning of an entry (the rest is today's) and, last, values of the module's constants. What bounds
them: a multiprocessor has 227 KB of shared memory (stages x tiles), 64K registers (accumulators, thread by thread) and
matrix instructions of four warps and 64 rows. Short programs hide latency by two or three of them beside each other;
what is bound by memory wants many bytes in flight.
"""

from typing import Any

from fastsel.kernels._runtime import triton_sjlt
from fastsel.kernels.facility_location import gpu_triton as gains
from fastsel.kernels.k_center import gpu_triton as nearest
from fastsel.kernels.linear_token_stats import gpu_triton as stats
from fastsel.kernels.lora_gradient_sketch import gpu_triton as lora
from fastsel.kernels.random_projection import gpu_triton as projection
from fastsel.kernels.topk_similarity import gpu_triton as topk
from fastsel.kernels.tree_attention import gpu_triton as tree

Candidate = tuple[Any, ...]
CANDIDATES: dict[str, list[Candidate]] = {
    # BLOCK_C, MORE_C, BLOCK_P, BLOCK_D, warps, stages: two programs of 128 x 128 or one of 128 x 256 a multiprocessor
    "large gains": [
        (128, 0, 256, 64, 8, 3), (128, 0, 256, 64, 8, 4), (128, 0, 256, 128, 8, 2), (128, 0, 256, 32, 8, 6),
        (256, 0, 128, 64, 8, 3), (256, 0, 128, 64, 8, 4), (128, 128, 128, 64, 8, 3), (128, 128, 128, 64, 8, 4),
        (128, 128, 128, 32, 8, 6), (128, 64, 256, 64, 8, 3), (128, 64, 256, 32, 8, 6), (128, 0, 128, 64, 4, 3),
        (128, 0, 128, 64, 8, 3), (128, 0, 128, 64, 8, 5), (128, 0, 128, 32, 4, 5), (128, 0, 128, 128, 8, 3),
        (64, 0, 256, 64, 4, 2), (64, 0, 256, 32, 4, 5), (128, 0, 256, 64, 8, 4, {"GROUP": 16}),
        (128, 0, 256, 64, 8, 4, {"GROUP": 4}), (128, 64, 256, 32, 8, 4, {"GROUP": 16}),
    ],
    "few gains": [  # points of one tile: candidates are read once, so many bytes must be in flight
        (128, 0, 128, 64, 4, 3), (128, 0, 128, 64, 4, 4), (128, 0, 128, 64, 8, 2), (128, 0, 128, 64, 8, 3),
        (128, 0, 128, 64, 8, 4), (128, 0, 128, 32, 8, 4), (128, 0, 128, 32, 4, 4), (128, 0, 128, 128, 8, 2),
        (128, 0, 128, 128, 8, 3), (64, 0, 128, 64, 4, 2), (64, 0, 128, 64, 4, 3), (64, 0, 128, 64, 4, 4),
        (64, 0, 128, 128, 4, 2), (64, 0, 128, 32, 4, 4), (256, 0, 128, 64, 8, 3), (256, 0, 128, 64, 8, 4),
        (128, 0, 64, 64, 4, 3), (128, 0, 64, 64, 4, 4), (128, 128, 128, 32, 8, 4), (128, 0, 256, 64, 8, 3),
        (128, 0, 32, 64, 4, 4),
    ],
    "contenders": [
        (16, 0, 64, 64, 4, 4), (16, 0, 128, 64, 4, 3), (16, 0, 128, 64, 4, 4), (16, 0, 128, 128, 4, 3),
        (16, 0, 256, 64, 4, 3), (16, 0, 256, 64, 8, 3), (16, 0, 64, 128, 4, 4), (32, 0, 128, 64, 4, 4),
        (64, 0, 64, 64, 4, 4), (64, 0, 128, 64, 4, 3), (64, 0, 128, 64, 4, 4), (64, 0, 256, 64, 8, 3),
        (16, 0, 128, 64, 4, 4, {"ENOUGH_PROGRAMS": 4096}), (64, 0, 128, 64, 4, 3, {"ENOUGH_PROGRAMS": 4096}),
    ],
    "gains float32": [
        (128, 0, 128, 32, 8, 3), (128, 0, 128, 32, 8, 2), (128, 0, 128, 32, 4, 2), (128, 0, 64, 32, 8, 3),
        (128, 0, 64, 32, 8, 4), (128, 0, 64, 64, 8, 2), (128, 0, 64, 32, 4, 4), (64, 0, 64, 32, 4, 3),
        (64, 0, 128, 32, 4, 3), (256, 0, 64, 32, 8, 3), (128, 0, 64, 32, 4, 3, "tf32x3"),
        (128, 0, 128, 32, 8, 3, "tf32x3"), (128, 64, 128, 32, 8, 2), (128, 0, 256, 32, 8, 2),
    ],
    # BLOCK_N, MORE_N, BLOCK_B, BLOCK_D, warps, stages
    "sixteen centres": [
        (128, 0, 16, 64, 4, 3), (128, 0, 16, 64, 4, 4), (128, 0, 16, 64, 4, 6), (128, 0, 16, 128, 4, 2),
        (128, 0, 16, 128, 4, 3), (128, 0, 16, 64, 8, 4), (128, 0, 16, 32, 4, 6), (128, 0, 32, 64, 4, 4),
        (128, 0, 32, 128, 4, 3), (128, 128, 16, 64, 8, 3), (128, 0, 64, 128, 4, 3),
        (64, 0, 16, 64, 4, 4, {"FARTHEST_BLOCK": 64}),
    ],
    "one tile": [
        (128, 0, 64, 64, 4, 3), (128, 0, 64, 64, 8, 4), (128, 0, 64, 128, 4, 3), (128, 0, 64, 32, 4, 6),
        (128, 128, 64, 64, 8, 3), (64, 0, 64, 64, 4, 4, {"FARTHEST_BLOCK": 64}),
    ],
    "many centres": [
        (128, 0, 256, 64, 8, 3), (128, 0, 256, 64, 8, 4), (128, 0, 256, 128, 8, 2), (128, 0, 256, 32, 8, 6),
        (128, 128, 128, 64, 8, 3), (128, 128, 128, 64, 8, 4), (128, 128, 128, 32, 8, 6), (128, 0, 128, 64, 4, 3),
        (128, 0, 128, 64, 4, 4), (128, 0, 128, 64, 8, 3), (128, 0, 128, 64, 8, 5), (128, 0, 128, 128, 8, 3),
        (128, 0, 128, 32, 4, 5), (128, 0, 64, 64, 4, 4), (64, 0, 256, 64, 4, 2, {"FARTHEST_BLOCK": 64}),
    ],
    "sixteen float32": [
        (128, 0, 16, 32, 4, 3), (128, 0, 16, 32, 4, 4), (128, 0, 16, 64, 4, 3), (128, 0, 16, 32, 8, 4),
        (128, 0, 32, 32, 4, 3), (128, 0, 32, 32, 8, 3), (128, 0, 64, 32, 4, 3), (128, 0, 16, 32, 4, 3, "ieee"),
    ],
    "many float32": [
        (128, 0, 128, 32, 8, 3), (128, 0, 128, 32, 8, 2), (128, 0, 64, 32, 4, 3), (128, 0, 64, 32, 4, 4),
        (128, 0, 64, 64, 8, 2), (128, 128, 64, 32, 8, 3), (128, 0, 64, 32, 8, 4),
    ],
    # BLOCK_Q or BLOCK_T, BLOCK_P or BLOCK_V, BLOCK_D, warps, stages
    "neighbours": [
        (128, 256, 64, 8, 4), (128, 256, 32, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4), (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 32, 4, 4), (128, 64, 64, 4, 4), (64, 256, 64, 8, 3),
        (64, 256, 64, 4, 2), (64, 128, 64, 4, 4), (256, 64, 64, 8, 3), (128, 256, 128, 8, 2), (128, 128, 128, 8, 3),
        (128, 256, 64, 8, 3, {"PROGRAMS_WANTED": 512}), (128, 128, 64, 4, 3, {"PROGRAMS_WANTED": 512}),
    ],
    "tokens": [
        (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 32, 8, 5), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4),
        (128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 32, 4, 4), (64, 256, 64, 4, 2),
        (64, 256, 64, 8, 3), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4), (128, 256, 64, 8, 3, {"SLICE": 2048}),
        (128, 128, 64, 4, 3, {"SLICE": 2048}),
    ],
    # BLOCK_Q, BLOCK_K, warps, stages
    "narrow heads": [
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 3), (64, 32, 4, 5), (64, 128, 4, 2),
        (64, 128, 4, 3), (128, 32, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2),
        (128, 128, 4, 2), (32, 64, 4, 3), (32, 32, 4, 3), (32, 64, 2, 3),
    ],
    "wide heads": [
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 3), (64, 32, 4, 4), (64, 128, 4, 2),
        (128, 32, 8, 3), (128, 32, 8, 4), (128, 64, 8, 2), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3),
        (128, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2),
    ],
    # BLOCK_T, BLOCK_R, BLOCK_K, warps, stages, columns of a program
    "products": [
        (128, 128, 64, 8, 3), (128, 128, 64, 8, 3, 512), (128, 128, 64, 8, 3, 2048), (128, 128, 64, 8, 4, 2048),
        (128, 128, 64, 4, 3, 2048), (64, 128, 64, 4, 3), (64, 128, 64, 4, 2), (64, 128, 64, 4, 3, 2048),
        (64, 128, 64, 4, 3, 512), (64, 128, 32, 4, 4), (128, 64, 64, 4, 3), (64, 64, 64, 4, 3), (128, 128, 32, 4, 4),
        (128, 128, 32, 8, 4),
    ],
    # side of pairs, other side, BLOCK_T, warps, stages
    "gradients": [
        (64, 128, 32, 4, 2), (64, 128, 32, 4, 3), (64, 128, 32, 4, 4), (64, 128, 64, 4, 2), (128, 128, 64, 8, 2),
        (128, 128, 32, 8, 2), (128, 128, 32, 8, 4), (128, 128, 64, 8, 3), (64, 64, 64, 4, 3), (64, 64, 32, 4, 3),
        (128, 64, 32, 8, 3), (64, 128, 32, 8, 3), (128, 128, 16, 8, 4),
    ],
    # BLOCK_N, BLOCK_S, BLOCK_P, warps, stages
    "dots": [
        (16, 16, 128, 2, 3), (16, 16, 128, 4, 3), (16, 16, 128, 1, 5), (16, 16, 256, 1, 3), (16, 16, 256, 2, 3),
        (16, 16, 256, 4, 3), (16, 16, 64, 1, 5), (16, 16, 128, 1, 3, {"DOTS_STRETCH": 512}),
        (16, 16, 256, 2, 3, {"DOTS_STRETCH": 2048}), (16, 16, 256, 4, 4, {"DOTS_STRETCH": 4096}),
        (16, 16, 128, 1, 4, {"DOTS_STRETCH": 2048}),
    ],
    "sjlt": [  # most of BLOCK_K, rows, numbers of a thread, STAGES
        (8192, 1, 32, 2), (8192, 1, 16, 2), (8192, 1, 16, 1), (8192, 2, 16, 2), (8192, 2, 16, 1), (8192, 2, 32, 1),
        (4096, 2, 16, 2), (4096, 1, 16, 2),
    ],
    "rademacher": [  # BLOCK_K, BLOCK_B, warps, stages
        (256, 64, 8, 3), (256, 64, 8, 2), (256, 64, 4, 2), (256, 64, 4, 4), (128, 64, 4, 2), (128, 64, 4, 3),
        (128, 64, 4, 5), (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 5), (512, 64, 8, 3), (256, 32, 4, 3),
    ],
}  # fmt: skip
LORA = "lora_gradient_sketch, a module of Llama-2-7B, 16 rows, "
# What is most likely to gain comes first: how the row's label begins, its dtype, the module and its table, which
# candidates, and the kernels that are timed.
TUNED: list[tuple[str, str, Any, str, str, str]] = [
    ("facility_location, 100 of", "bfloat16", gains, "LAUNCH_TABLE", "few gains", "gains_kernel"),
    ("facility_location, 1,000 of", "bfloat16", gains, "LAUNCH_TABLE", "large gains", "gains_kernel"),
    ("facility_location, first pass of 100,000", "bfloat16", gains, "LAUNCH_TABLE", "large gains", "gains_kernel"),
    ("facility_location, 16 cont", "bfloat16", gains, "LAUNCH_TABLE", "contenders", "gains_kernel"),
    ("k_center, 1M points, 16 ", "bfloat16", nearest, "LAUNCH_TABLE", "sixteen centres", "nearest_kernel"),
    ("k_center, 1M points, 256 ", "bfloat16", nearest, "LAUNCH_TABLE", "many centres", "nearest_kernel"),
    ("k_center, 1M points, 1,024 ", "bfloat16", nearest, "LAUNCH_TABLE", "many centres", "nearest_kernel"),
    ("k_center, 1M points, 64 ", "bfloat16", nearest, "LAUNCH_TABLE", "one tile", "nearest_kernel"),
    ("k_center, 1M points, 16 ", "float32", nearest, "LAUNCH_TABLE", "sixteen float32", "nearest_kernel"),
    ("k_center, 1M points, 256 ", "float32", nearest, "LAUNCH_TABLE", "many float32", "nearest_kernel"),
    ("topk_similarity, 100,000", "bfloat16", topk, "LAUNCH_TABLE", "neighbours", "scan_kernel decide_kernel"),
    ("topk_similarity, 20,000", "bfloat16", topk, "LAUNCH_TABLE", "neighbours", "scan_kernel decide_kernel"),
    ("tree_attention, Smol", "bfloat16", tree, "LAUNCH_TABLE", "narrow heads", "tree_attention_kernel"),
    ("tree_attention, Llama", "bfloat16", tree, "LAUNCH_TABLE", "wide heads", "tree_attention_kernel"),
    ("linear_token_stats, ", "bfloat16", stats, "LAUNCH_TABLE", "tokens", "slice_kernel merge_kernel"),
    (LORA + "direct", "bfloat16", lora, "PRODUCTS_TABLE", "products", "products_kernel pairs_kernel"),
    ("lora_gradient_sketch, ", "bfloat16", lora, "GRADIENTS_TABLE", "gradients", "gradients_kernel"),
    (LORA + "direct", "bfloat16", lora, "DOTS_BLOCK", "dots", "dots_kernel"),
    (LORA + "sketch", "bfloat16", triton_sjlt, "SJLT_TABLE", "sjlt", "sjlt_kernel"),
    ("random_projection, sjlt", "bfloat16", triton_sjlt, "SJLT_TABLE", "sjlt", "sjlt_kernel"),
    ("random_projection, rademacher, a", "bfloat16", projection, "RADEMACHER_TABLE", "rademacher", "rademacher_kernel"),
    ("facility_location, first pass of 25,000", "float32", gains, "LAUNCH_TABLE", "gains float32", "gains_kernel"),
]  # fmt: skip
