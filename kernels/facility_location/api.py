"""The contract of facility_location and the table of its implementations."""

import torch

from fastsel.kernels._runtime.checks import check_tensor
from fastsel.kernels._runtime.dispatch import run
from fastsel.kernels.facility_location import cpu_native
from fastsel.kernels.facility_location.packed import PackedCandidates

IMPLEMENTATIONS = {  # tried in this order
    "triton": "fastsel.kernels.facility_location.gpu_triton",
    "native": "fastsel.kernels.facility_location.cpu_native",
    "torch": "fastsel.kernels.facility_location.torch_blocked",
    "reference": "fastsel.kernels.facility_location.reference",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIMILARITIES = ("dot", "rbf", "exp_distance")


def facility_location(
    candidates: torch.Tensor | PackedCandidates,
    points: torch.Tensor,
    best: torch.Tensor,
    *,
    raised: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    similarity: str = "dot",
    gamma: float = 1.0,
    implementation: str = "auto",
) -> torch.Tensor:
    """How much each candidate would raise the points' best similarities, or by how much a pick has lowered that.

        s[i, v] = candidates[i] . points[v]                            "dot"; the cosine where rows have length 1
                  exp(-gamma |candidates[i] - points[v]|^2)            "rbf"
                  exp(-gamma |candidates[i] - points[v]|)              "exp_distance"
        a[i, v] = max(s[i, v] - best[v], 0)                            s[i, v] where best[v] is -inf
        gains[i] = sum_v weights[v] a[i, v]                            raised is None
        gains[i] = sum_v weights[v] (a[i, v] - max(s[i, v] - raised[v], 0))       raised given

    The second form is what candidate i loses when another pick lifts best to raised: gains stay current by subtracting
    it, and only points with raised > best need to be passed. Where raised equals best the difference is exactly 0.

    Args:
        candidates: [n, d] float32 | bfloat16 | float16 | float64, finite; any stride; n may be 0, d >= 1. Or what
            pack_candidates made of them, which saves laying them out again: runs "native" only.
        points: [m, d] same dtype and device; any stride; m may be 0. The very tensor given as candidates lets half of
            the products be left out ("native", without raised).
        best: [m] float32 | float64, below +inf; -inf = nothing chosen yet, no floor; the maximum over nothing is 0.
        raised: [m] same dtype, finite, >= best (not checked), or None.
        weights: [m] same dtype, finite; None = 1.
        similarity: "dot", "rbf" or "exp_distance".
        gamma: > 0, finite; not used by "dot".
        implementation: "auto", "triton", "native", "torch" or "reference".

    Returns:
        [n] float64. NaN or infinity in a candidate makes its own gain unspecified, in a point everyone's.

    Raises:
        ValueError: shapes, dtypes, devices, similarity or gamma do not match the above.
        NoImplementationError: the implementation asked for cannot take these inputs; the message says why.

    Determinism: the same bits from run to run; native: for any number of threads too.
    Precision: s in float32 (float64 for float64 inputs); its deviation from exact arithmetic is that of a float32 dot
        product. |a - b|^2 is |a|^2 + |b|^2 - 2 a.b, at least 0: centre rows that lie far from the origin first. Each
        difference is rounded once in float32, sums over points are float64 from a tile of at most 32 points on.
    Cost: 2 n m d flops, half of that where points are the candidates; both matrices are read. Extra memory, native:
        4 d (m + n) bytes at most, 4 d m for packed candidates; torch: a tile of about 8 MB; never an array [n, m].
    Source: facility location as in Cornuejols, Fisher & Nemhauser, "Location of bank accounts to optimize float",
        1977; the differences are the exact change of a maximum's marginal gains, each point's term being a function of
        its own best similarity only.
    """
    matrix = candidates.matrix if isinstance(candidates, PackedCandidates) else candidates
    check_tensor("candidates", matrix, ("n", "d"), dtypes=DTYPES)
    d = matrix.shape[1]
    if d < 1:
        raise ValueError(f"candidates must have at least one column, got {list(matrix.shape)}")
    check_tensor("points", points, ("m", d), dtypes=(matrix.dtype,), device=matrix.device)
    m = points.shape[0]
    check_tensor("best", best, (m,), dtypes=(torch.float32, torch.float64), device=matrix.device)
    for name, values in (("raised", raised), ("weights", weights)):
        if values is not None:
            check_tensor(name, values, (m,), dtypes=(best.dtype,), device=matrix.device)
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}; got {similarity!r}")
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    table = IMPLEMENTATIONS
    if isinstance(candidates, PackedCandidates):
        table = {"native": IMPLEMENTATIONS["native"]}
    with torch.no_grad():
        gains: torch.Tensor = run(
            table, implementation, candidates, points, best, raised, weights, similarity, float(gamma)
        )
    return gains


def pack_candidates(candidates: torch.Tensor, *, in_bytes: bool = False) -> torch.Tensor | PackedCandidates:
    """Lay candidates out for many calls with different points; what comes back is passed as candidates.

    Args:
        candidates: as in facility_location; must not change while the result is in use.
        in_bytes: round candidates, and in each call points, to 8 bits at a scale for each row, where the processor
            multiplies bytes faster (AVX-512 VNNI; elsewhere nothing is rounded). Takes "dot" only. A dot product then
            errs by about 6e-4 of the rows' lengths when d = 384, more where single features are large; by the same in
            every call and both ways, so that maintained gains do not drift.

    Returns:
        PackedCandidates of 4 n d further bytes (n d in bytes) where the compiled code takes them; else the matrix.
    """
    check_tensor("candidates", candidates, ("n", "d"), dtypes=DTYPES)
    return cpu_native.pack(candidates, in_bytes)
