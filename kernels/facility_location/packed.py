"""Candidates laid out once for many calls."""

from typing import NamedTuple

import torch


class PackedCandidates(NamedTuple):
    """What pack_candidates made.

    Attributes:
        matrix: [n, d] the candidates as they were given; it must not change while this is in use.
        panels: the same numbers in the order in which the compiled code reads them; opaque.
        in_bytes: whether they were rounded to bytes, at a scale for each row.
    """

    matrix: torch.Tensor
    panels: torch.Tensor
    in_bytes: bool = False
