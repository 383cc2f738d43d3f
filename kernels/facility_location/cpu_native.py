"""facility_location by the compiled library."""

import torch

from fastsel.kernels.facility_location.packed import PackedCandidates


def unsupported(*inputs: object) -> str | None:
    """Not compiled yet."""
    return "is not compiled yet"


def pack(candidates: torch.Tensor) -> torch.Tensor | PackedCandidates:
    """See api.pack_candidates."""
    return candidates


def compute(*inputs: object) -> torch.Tensor:
    """See api.facility_location."""
    raise AssertionError
