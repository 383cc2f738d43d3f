"""Predicted times of the Triton kernels on GPUs that are not here, from their machine code: python predict_triton.py

Prints one row a case and chip. Nothing is measured; see docs/decisions/0004-triton-proofs-without-a-gpu.md.
"""

from collections.abc import Iterator

import numpy as np
import torch

from fastsel.kernels._runtime.triton_launch import Launch, Work
from fastsel.kernels._runtime.triton_predict import CHIPS, predict
from fastsel.kernels._runtime.triton_proof import compile_launch, machine_code
from fastsel.kernels.linear_token_stats import gpu_triton as stats
from fastsel.kernels.linear_token_stats.cases import ALL_OUTPUTS
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


def main() -> None:
    """Print the table."""
    print("| case | chip | predicted | floor | ratio | programs resident | busiest in the loop | between |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, chip in CHIPS.items():
        for label, launch, work in launches(chip.architecture):
            code = machine_code(compile_launch(launch, chip.architecture), chip.architecture)
            p = predict(code, work, chip)
            print(
                f"| {label} | {name} | {p.seconds * 1e6:,.0f} us | {p.floor_seconds * 1e6:,.0f} us | {p.ratio:.2f} "
                f"| {p.programs_resident} | {p.inner_limit} | {p.outer_limit} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
