"""Memory goes back to the system when the process has grown, and not before."""

import sys

import pytest
import torch

from fastsel.kernels._runtime.freed_memory import LEAST_GROWTH, FreedMemory, resident_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
PIECE, COUNT = 96 << 10, 4096  # smaller than what the C library ever maps on its own


def holes():
    """384 MiB of which every other piece is kept."""
    pieces = [torch.ones(PIECE, dtype=torch.uint8) for _ in range(COUNT)]
    return pieces[::2]


def test_gives_back_what_lies_between_tensors_that_stay():
    freed = FreedMemory(LEAST_GROWTH)
    kept = holes()
    full = resident_bytes()
    freed.look()
    assert resident_bytes() < full - 0.4 * COUNT * PIECE
    assert all(bool((piece == 1).all()) for piece in kept)
    before = resident_bytes()
    more = [torch.ones(PIECE, dtype=torch.uint8) for _ in range(COUNT // 8)]
    del more[::2]
    freed.look()  # above the limit, and grown by less than is worth it
    assert resident_bytes() > before + COUNT // 32 * PIECE


def test_keeps_it_below_the_limit():
    freed = FreedMemory(1 << 30)
    kept = holes()
    full = resident_bytes()
    freed.look()
    assert len(kept) == COUNT // 2 and resident_bytes() > full - 0.1 * COUNT * PIECE
