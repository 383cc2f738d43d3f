"""The contract of random_projection and the table of its implementations."""

import torch

from fastsel.kernels._runtime.checks import check_tensor
from fastsel.kernels._runtime.dispatch import run
from fastsel.kernels._runtime.rng import coordinate_mask

IMPLEMENTATIONS = {  # tried in this order
    "triton": "fastsel.kernels.random_projection.gpu_triton",
    "native": "fastsel.kernels.random_projection.cpu_native",
    "torch": "fastsel.kernels.random_projection.torch_blocked",
    "reference": "fastsel.kernels.random_projection.reference",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("sjlt", "rademacher")


def random_projection(
    x: torch.Tensor,
    k: int,
    *,
    kind: str = "sjlt",
    sparsity: int = 1,
    seed: int = 0,
    first: int = 0,
    mask: int | None = None,
    total: int | None = None,
    out: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Project rows to k numbers whose inner products are those of the rows, up to about 1 / sqrt(k) of their lengths.

        out[b, r] += scale sum_i x[b, i] R[first + i, r]
        sjlt:       R has `sparsity` entries +-1 in each row, the rest zeros; scale 1 / sqrt(sparsity); E[R R^T] is
                    sparsity times the identity: out keeps inner products as it is
        rademacher: all entries +-1; scale 1, as TRAK has it: divide by sqrt(k), or take cosines, which need no scale

    R is a function of seed and of the coordinate's number alone (fastsel.kernels._runtime.rng): the same bits on every
    device, so that pieces projected anywhere, each with its `first`, add up to the projection of the whole.

    Args:
        x: [b, p] float32 | bfloat16 | float16 | float64; any stride; b and p may be 0, b p may exceed 2^31.
        k: numbers of a projection, 1 <= k < 2^31, any.
        kind: "sjlt", cost p sparsity, or "rademacher", cost p k.
        sparsity: entries of a row of R, 1 <= sparsity <= k; "sjlt" only. More of them bring the error closer to that
            of "rademacher" for rows with few large elements.
        seed: any int; taken modulo 2^64.
        first: number of the coordinate in column 0; first + p < 2^63.
        mask: keep only so many of the `total` coordinates (GraSS): one at random of each of `mask` equal stretches,
            named by the seed; kept coordinate i is row i of R, without rescaling. "sjlt" only.
        total: number of all coordinates, needed with mask; first + p <= total < 2^31 mask.
        out: [b, k] float32 (float64 for float64 x), contiguous rows, is added to and returned; None = zeros.
        implementation: "auto", "triton", "native", "torch" or "reference".

    Returns:
        out [b, k], float32 (float64 for float64 x).

    Raises:
        ValueError: shapes, dtypes, devices or options do not match the above.
        NoImplementationError: the implementation asked for cannot take these inputs; the message says why.

    A NaN or infinity spoils its own row of out, as far as it reaches: "sjlt" the elements that it is added to.
    Determinism: signs and rows are equal everywhere. Sums are float32 (float64) in an order fixed by kind, k, first and
        p: the same bits from run to run, whatever the number of threads; native: and whatever rows lie beside a row,
        in one call or in pieces cut at multiples of max(2^17, 16 k rounded up to a power of two) coordinates for sjlt,
        2^16 for rademacher. The torch implementation on a GPU adds by atomics, in no fixed order.
    Cost: sjlt: b p sparsity additions, x is read once; extra memory, native: 32 k bytes a thread, triton: 4 b k bytes
        for each 64 blocks of coordinates, 1/32 of x at most where p is large. rademacher: 2 b p k flops, native a
        fourth of them; extra memory, native: 100 KB a thread.
    Source: SJLT, Kane & Nelson, "Sparser Johnson-Lindenstrauss transforms", JACM 2014 (arXiv 1012.1577); sparsity 1 is
        Charikar et al.'s count sketch; Rademacher, Achlioptas, "Database-friendly random projections", 2003; the mask,
        Hu et al., "GraSS: scalable data attribution with gradient sparsification and sparse projection", NeurIPS 2025
        (arXiv 2505.18976). Which hash, and what was tested of it: docs/decisions/0015.
    """
    check_tensor("x", x, ("b", "p"), dtypes=DTYPES)
    b, p = x.shape
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 1 <= k < 2**31:
        raise ValueError(f"k must be 1 to 2^31 - 1, got {k}")
    if not 1 <= sparsity <= (k if kind == "sjlt" else 1):
        raise ValueError(f"sparsity must be 1 to k = {k} for sjlt and 1 for rademacher, got {sparsity} for {kind}")
    if first < 0 or first + p >= 2**63:
        raise ValueError(f"first must be 0 or more, and first + p below 2^63, got first={first} and p={p}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if out is None:
        out = torch.zeros(b, k, dtype=dtype, device=x.device)
    check_tensor("out", out, (b, k), dtypes=(dtype,), device=x.device)
    if out.stride(1) != 1 and k > 1:
        raise ValueError(f"out must have contiguous rows, its elements lie {out.stride(1)} apart")
    with torch.no_grad():
        if mask is not None:
            x, first = masked(x, kind, seed, first, mask, total)
        if x.numel():
            run(IMPLEMENTATIONS, implementation, x, k, kind, sparsity, seed % 2**64, first, out)
        return out


def masked(x: torch.Tensor, kind: str, seed: int, first: int, mask: int, total: int | None) -> tuple[torch.Tensor, int]:
    """The columns of x that the mask keeps, ascending, and the number of the first of them among all that it keeps."""
    if kind != "sjlt":
        raise ValueError(f"mask goes with kind='sjlt', got {kind!r}")
    if total is None or not (first + x.shape[1] <= total and 0 <= mask <= total and total < 2**31 * max(1, mask)):
        raise ValueError(
            f"mask={mask} needs total, the number of all coordinates, at least first + p = {first + x.shape[1]}, "
            f"at least mask and below 2^31 mask; got total={total}"
        )
    kept = coordinate_mask(seed, total, mask, x.device)
    inside = torch.tensor([first, first + x.shape[1]], device=x.device)
    low, high = torch.searchsorted(kept, inside).tolist()
    return x.index_select(1, kept[low:high] - first), low
