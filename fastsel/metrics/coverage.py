"""How well a set stands for a pool."""

from typing import Any

from fastsel.errors import UsageError
from fastsel.selectors.neighbours import check_columns, nearest_rows
from fastsel.selectors.rows import Rows

FORMS = ("maxsim", "cost", "reciprocal")


def facility_location(
    x: Any, reference: Any, *, form: str = "maxsim", metric: str = "cosine", average: bool = False
) -> float:
    """Facility location: how near the nearest row of the set is to each row of a reference.

    Args:
        x: [n, d] the set; finite numbers; numpy, mapped from a file, or torch on any device.
        reference: [m, d] the pool that it should stand for.
        form: "maxsim" adds up the largest similarities (cos, or minus the distance) over the reference, and is what the
            selector of this name maximises with floor=None; "cost" adds up the least distances, so that lower is
            better, as ODA-DataScorer does; "reciprocal" adds up 1 / (least distance), so that larger is better; rows
            of the reference that stand in the set count nothing there, as they would be infinite.
        metric: "cosine" (1 - cos), or "euclidean".
        average: the mean over the rows of the reference instead of the sum.

    Returns:
        The sum or mean; NaN without rows on either side.

    Cost: 2 n m d flops in float32.
    Source: Farahani & Hekmatfar 2009; as in NovelSum (arXiv 2502.17184).
    """
    if form not in FORMS:
        raise UsageError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
    if metric not in ("cosine", "euclidean"):
        raise UsageError(f"metric must be one of cosine, euclidean; got {metric!r}")
    is_cosine = metric == "cosine"
    chosen, pool = Rows(x, unit=is_cosine), Rows(reference, unit=is_cosine, name="reference")
    check_columns(chosen, pool, "reference")
    if chosen.n == 0 or pool.n == 0:
        return float("nan")
    found = nearest_rows(pool, chosen, 1, metric="dot" if is_cosine else "sqeuclidean")
    best = found.values.double()
    distances = 1.0 - best if is_cosine else best.sqrt()
    if form == "maxsim":
        value = float((best if is_cosine else -distances).sum())
    elif form == "cost":
        value = float(distances.clamp(min=0).sum())
    else:
        # A cosine of copies is 1 to the rounding of float32: such a distance says nothing.
        is_apart = distances > (1e-6 if is_cosine else 0)
        value = float((1.0 / distances[is_apart]).sum())
    return value / pool.n if average else value
