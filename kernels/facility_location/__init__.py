"""Candidates x points -> what each candidate would add to the best similarities; never the similarity matrix."""

from fastsel.kernels.facility_location.api import facility_location, pack_candidates
from fastsel.kernels.facility_location.exact import Pairs, similarities_above, similarity_rows
from fastsel.kernels.facility_location.packed import PackedCandidates
from fastsel.kernels.facility_location.shortlists import Shortlists

__all__ = [
    "PackedCandidates",
    "Pairs",
    "Shortlists",
    "facility_location",
    "pack_candidates",
    "similarities_above",
    "similarity_rows",
]
