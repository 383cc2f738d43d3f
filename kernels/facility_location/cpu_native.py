"""facility_location by the compiled library: checks what it takes, allocates, hands over pointers."""

from ctypes import POINTER, byref, c_double, c_float, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch

from fastsel.kernels._runtime import native
from fastsel.kernels.facility_location.packed import PackedCandidates

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SIMILARITIES = {"dot": 0, "rbf": 1, "exp_distance": 2}
SCREENED = 32  # rows that one call of similarities_above takes
GROUP = 96  # points that the compiled code counts together
NOTED = 24  # candidates of a group that are noted for a point
SLAB_BYTES = 256 << 20  # candidates that come unpacked are packed and scored so many bytes at a time


class Noted(NamedTuple):
    """Candidates noted for each point of a call, group by group; opaque, see shortlists.h."""

    counts: torch.Tensor
    rows: torch.Tensor
    overflows: torch.Tensor
    similarities: torch.Tensor


def unsupported(
    candidates: torch.Tensor | PackedCandidates,
    points: torch.Tensor,
    best: torch.Tensor,
    raised: torch.Tensor | None,
    weights: torch.Tensor | None,
    similarity: str,
    gamma: float,
) -> str | None:
    """Why the compiled library cannot take these inputs, or None."""
    if isinstance(candidates, PackedCandidates):
        if candidates.in_bytes and similarity != "dot":
            return f"takes candidates packed in bytes with similarity 'dot' only, got {similarity!r}"
        return _refusal(candidates.matrix)
    return _refusal(candidates)


def pack(candidates: torch.Tensor, in_bytes: bool = False) -> torch.Tensor | PackedCandidates:
    """See api.pack_candidates."""
    if _refusal(candidates) is not None:
        return candidates
    in_bytes = in_bytes and native.instruction_set() == "avx512vnni"
    (n, d), rows, threads = candidates.shape, _unit_stride(candidates), native.num_threads()
    needed = c_int64()
    native.function("facility_location_packed", c_int64, c_int64, c_int32, POINTER(c_int64))(
        n, d, in_bytes, byref(needed)
    )
    # dtype and device are spelt out: torch's defaults are the user's to change.
    panels = torch.empty(needed.value, dtype=torch.float32, device="cpu")
    workspace = torch.empty(threads * d, dtype=torch.float32, device="cpu")
    native.function(
        "facility_location_pack",
        *(c_void_p, c_int64, c_int32, c_int64, c_int64, c_int32, c_int32, c_void_p, c_void_p),
    )(
        *(rows.data_ptr(), rows.stride(0), ELEMENT_TYPES[rows.dtype], n, d, in_bytes, threads),
        *(workspace.data_ptr(), panels.data_ptr()),
    )
    return PackedCandidates(candidates, panels, in_bytes)


def compute(
    candidates: torch.Tensor | PackedCandidates,
    points: torch.Tensor,
    best: torch.Tensor,
    raised: torch.Tensor | None,
    weights: torch.Tensor | None,
    similarity: str,
    gamma: float,
) -> torch.Tensor:
    """See api.facility_location."""
    if not isinstance(candidates, PackedCandidates):
        n, d = candidates.shape
        slab = max(1, SLAB_BYTES // (4 * d))
        if n > slab:
            inputs = (points, best, raised, weights, similarity, gamma)
            return torch.cat([compute(candidates[i : i + slab], *inputs) for i in range(0, n, slab)])
        packed = pack(candidates)
        assert isinstance(packed, PackedCandidates)  # unsupported() has taken the matrix
        candidates = packed
    return _gains(candidates, points, best, raised, weights, similarity, gamma, None)


def _gains(
    candidates: PackedCandidates,
    points: torch.Tensor,
    best: torch.Tensor,
    raised: torch.Tensor | None,
    weights: torch.Tensor | None,
    similarity: str,
    gamma: float,
    noted: Noted | None,
) -> torch.Tensor:
    (n, d), m, threads = candidates.matrix.shape, len(points), native.num_threads()
    itself = raised is None and _is_same(candidates.matrix, points)
    points = _unit_stride(points)
    values = [None if x is None else x.float().contiguous() for x in (best, raised, weights)]
    needed = c_int64()
    native.function("facility_location_workspace", c_int64, c_int64, c_int64, c_int32, c_int32, POINTER(c_int64))(
        n, m, d, itself, threads, byref(needed)
    )
    workspace = torch.empty(needed.value, dtype=torch.float32, device="cpu")
    gains = torch.empty(n, dtype=torch.float64, device="cpu")
    native.function(
        "facility_location",
        *(c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int64, c_int32, c_int64),
        *(c_void_p, c_void_p, c_void_p, c_int32, c_float, c_int32, c_int32, c_void_p, c_void_p),
        *(c_void_p, c_void_p, c_void_p, c_void_p),
    )(
        *(candidates.panels.data_ptr(), candidates.in_bytes, n, d),
        *(points.data_ptr(), points.stride(0), ELEMENT_TYPES[points.dtype], m),
        *(None if x is None else x.data_ptr() for x in values),
        *(SIMILARITIES[similarity], gamma, itself, threads, workspace.data_ptr(), gains.data_ptr()),
        *((None,) * 4 if noted is None else (x.data_ptr() for x in noted)),
    )
    return gains


def losses_noting(
    candidates: PackedCandidates,
    points: torch.Tensor,
    best: torch.Tensor,
    raised: torch.Tensor,
    weights: torch.Tensor | None,
    similarity: str,
    gamma: float,
    room: Noted | None = None,
) -> tuple[torch.Tensor, Noted]:
    """compute() with raised, and who exceeds it; `room` is what an earlier call returned, written over."""
    m = -(-len(points) // 32) * 32  # whole panels
    groups = -(-len(candidates.matrix) // GROUP)
    if room is None or len(room.overflows) < m:
        room = Noted(
            torch.empty(groups * m, dtype=torch.uint8, device="cpu"),
            torch.empty(groups * m * NOTED, dtype=torch.uint8, device="cpu"),
            torch.empty(m, dtype=torch.uint8, device="cpu"),
            torch.empty(groups * m * NOTED, dtype=torch.float32, device="cpu"),
        )
    return _gains(candidates, points, best, raised, weights, similarity, gamma, room), room


def noted_sizes(noted: Noted, n: int, m: int) -> torch.Tensor:
    """Int64 [m]: how many of n candidates were noted for each point, -1 where there were too many."""
    sizes = torch.empty(m, dtype=torch.int64, device="cpu")
    native.function("facility_location_list_sizes", c_void_p, c_void_p, c_int64, c_int64, c_void_p)(
        noted.counts.data_ptr(), noted.overflows.data_ptr(), n, m, sizes.data_ptr()
    )
    return sizes


def copy_noted(
    noted: Noted,
    n: int,
    m: int,
    numbers: torch.Tensor,
    starts: torch.Tensor,
    candidates: torch.Tensor,
    similarities: torch.Tensor,
) -> None:
    """Write what was noted for these points (int64) to candidates (int32) and similarities, each from its start."""
    native.function(
        "facility_location_list_copy",
        *(c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int32, c_void_p, c_void_p),
    )(
        *(noted.counts.data_ptr(), noted.rows.data_ptr(), noted.similarities.data_ptr()),
        *(n, m, numbers.data_ptr(), len(numbers), starts.data_ptr(), native.num_threads()),
        *(candidates.data_ptr(), similarities.data_ptr()),
    )


def take_losses(
    numbers: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    weights: torch.Tensor | None,
    starts: torch.Tensor,
    sizes: torch.Tensor,
    candidates: torch.Tensor,
    similarities: torch.Tensor,
    gains: torch.Tensor,
) -> None:
    """Subtract from gains what candidates lose by the shortlists of these points, and shorten these: see Shortlists."""
    native.function(
        "facility_location_list_losses",
        *(c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    )(
        *(numbers.data_ptr(), len(numbers), before.data_ptr(), after.data_ptr()),
        None if weights is None else weights.data_ptr(),
        *(x.data_ptr() for x in (starts, sizes, candidates, similarities, gains)),
    )


def close_gaps(
    numbers: torch.Tensor,
    starts: torch.Tensor,
    sizes: torch.Tensor,
    candidates: torch.Tensor,
    similarities: torch.Tensor,
) -> None:
    """Move the lists of points (numbers, in the order in which they lie) to the front; starts follow."""
    native.function("facility_location_list_close", c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p)(
        numbers.data_ptr(), len(numbers), *(x.data_ptr() for x in (starts, sizes, candidates, similarities))
    )


def similarity_rows(
    rows: torch.Tensor, points: torch.Tensor, lengths: torch.Tensor | None, similarity: str, gamma: float
) -> torch.Tensor:
    """See exact.similarity_rows; on a CPU, with the compiled library."""
    (b, d), m, threads = rows.shape, len(points), native.num_threads()
    points = _unit_stride(points)
    padded = torch.zeros(-(-b // 4) * 4, -(-d // 16) * 16, dtype=torch.float64, device="cpu")
    padded[:b, :d] = rows
    workspace = torch.empty(threads * 4 * padded.shape[1], dtype=torch.float64, device="cpu")
    out = torch.empty(b, m, dtype=torch.float64, device="cpu")
    native.function(
        "facility_location_rows",
        *(c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int32, c_int64),
        *(c_int64, c_void_p, c_int32, c_double, c_int32, c_void_p, c_void_p),
    )(
        *(padded.data_ptr(), b, padded.shape[1]),
        *(points.data_ptr(), points.stride(0), (ELEMENT_TYPES | {torch.float64: 3})[points.dtype], m),
        *(d, None if lengths is None else lengths.data_ptr(), SIMILARITIES[similarity], gamma),
        *(threads, workspace.data_ptr(), out.data_ptr()),
    )
    return out


def similarities_above(
    rows: torch.Tensor, points: torch.Tensor, packed: PackedCandidates, best: torch.Tensor, lengths: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See exact.similarities_above, for packed points and at most SCREENED rows."""
    (b, d), m, threads = rows.shape, len(points), native.num_threads()
    assert b <= SCREENED and packed.matrix.shape == (m, d)
    points = _unit_stride(points)
    screened = rows.float()
    masks = torch.empty(m, dtype=torch.int32, device="cpu")
    counts = torch.empty(-(-m // GROUP), SCREENED, dtype=torch.int32, device="cpu")
    workspace = torch.empty(33 * d + 96, dtype=torch.float32, device="cpu")
    native.function(
        "facility_location_screen",
        *(c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int32, c_void_p, c_void_p, c_void_p),
    )(
        *(packed.panels.data_ptr(), packed.in_bytes, m, d, screened.data_ptr(), b, best.data_ptr(), threads),
        *(workspace.data_ptr(), masks.data_ptr(), counts.data_ptr()),
    )
    starts = torch.zeros(SCREENED + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(counts.sum(0), 0, out=starts[1:])
    places = torch.cumsum(counts, 0, dtype=torch.int64).sub_(counts).add_(starts[:-1])
    padded = torch.zeros(b, -(-d // 32) * 32, dtype=torch.float64, device="cpu")
    padded[:, :d] = rows
    doubles = torch.empty(threads * padded.shape[1], dtype=torch.float64, device="cpu")
    total = int(starts[b])
    numbers = torch.empty(total, dtype=torch.int32, device="cpu")
    similarities = torch.empty(total, dtype=torch.float64, device="cpu")
    native.function(
        "facility_location_pairs",
        *(c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int32, c_int64, c_int64, c_void_p, c_int32),
        *(c_void_p, c_void_p, c_void_p),
    )(
        *(masks.data_ptr(), places.data_ptr(), padded.data_ptr(), padded.shape[1]),
        *(points.data_ptr(), points.stride(0), (ELEMENT_TYPES | {torch.float64: 3})[points.dtype], m, d),
        *(None if lengths is None else lengths.data_ptr(), threads),
        *(doubles.data_ptr(), numbers.data_ptr(), similarities.data_ptr()),
    )
    return starts[: b + 1], numbers, similarities


def _refusal(matrix: torch.Tensor) -> str | None:
    if matrix.device.type != "cpu":
        return f"runs on the CPU, the tensors are on {matrix.device}"
    if matrix.dtype not in ELEMENT_TYPES:
        return f"takes float32, bfloat16 and float16, got {str(matrix.dtype).removeprefix('torch.')}"
    return native.unavailable()


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _unit_stride(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix itself when its rows are contiguous, else a copy."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
