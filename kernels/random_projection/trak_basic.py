"""The matrices of TRAK 0.3.2's BasicProjector, for numbers that must equal those of its users (LESS on a CPU).

Block i of block_size columns comes from a torch generator of its own, seeded seed + 1000 i + 100000 model_id: the same
bits in float32, bfloat16 and float16 on one machine, other bits on another device, and, for bernoulli_ on a CPU, in a
build of torch without MKL. Blocks of different models meet (block 100 of model 0 is block 0 of model 1); that is kept.
"""

from collections.abc import Iterator

import torch


def trak_basic_blocks(
    p: int,
    k: int,
    *,
    seed: int = 0,
    model_id: int = 0,
    block_size: int = 100,
    kind: str = "rademacher",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first column, matrix [p, at most block_size]) for the column blocks of R [p, k], one in memory at a time.

    Args:
        p, k: coordinates and numbers of a projection.
        seed, model_id: as BasicProjector takes them.
        block_size: columns of a block; 100 is TRAK's default, LESS sets 128.
        kind: "rademacher" (+-1) or "normal".
        dtype, device: of the matrix.
    """
    width = min(k, block_size)
    generator = torch.Generator(device=device)
    matrix = torch.empty(p, width, dtype=dtype, device=device)
    for number, first in enumerate(range(0, k, width)):
        generator.manual_seed(seed + 1000 * number + 100_000 * model_id)
        if kind == "normal":
            matrix.normal_(generator=generator)
        else:
            matrix.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        yield first, matrix[:, : min(width, k - first)]


def trak_basic_projection(
    x: torch.Tensor,
    k: int,
    *,
    seed: int = 0,
    model_id: int = 0,
    block_size: int = 100,
    kind: str = "rademacher",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """What BasicProjector(...).project(x, model_id) returns: x [b, p] cast to dtype, times R, [b, k] of dtype.

    LESS hands over float16 of its features and takes the model's dtype (bfloat16): both casts are its rule.

    Raises:
        ValueError: kind is neither "rademacher" nor "normal".
    """
    if kind not in ("rademacher", "normal"):
        raise ValueError(f"kind must be rademacher or normal, got {kind!r}")
    x = x.to(dtype)
    out = torch.empty(len(x), k, dtype=dtype, device=x.device)
    options = {"seed": seed, "model_id": model_id, "block_size": block_size}
    for first, matrix in trak_basic_blocks(x.shape[1], k, **options, kind=kind, dtype=dtype, device=x.device):
        out[:, first : first + matrix.shape[1]] = x @ matrix
    return out
