"""Memory goes back to the system when the process has grown, and not before."""

import sys

import pytest
import torch

from fastsel.kernels._runtime.freed_memory import LEAST_GROWTH, FreedMemory, resident_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
PIECE = 16 << 20  # smaller than what the C library maps on its own, after the first was freed


def holes():
    """Half a GiB of which every other piece is kept."""
    torch.empty(30 << 20, dtype=torch.uint8)
    pieces = [torch.ones(PIECE, dtype=torch.uint8) for _ in range(32)]
    return pieces[::2]


def test_gives_back_what_lies_between_tensors_that_stay():
    freed = FreedMemory(LEAST_GROWTH)
    kept = holes()
    full = resident_bytes()
    freed.look()
    assert resident_bytes() < full - 12 * PIECE
    assert all(bool((piece == 1).all()) for piece in kept)
    before = resident_bytes()
    more = [torch.ones(PIECE, dtype=torch.uint8) for _ in range(4)]
    del more[::2]
    freed.look()  # above the limit, and grown by less than is worth it
    assert resident_bytes() > before + PIECE


def test_keeps_it_below_the_limit():
    freed = FreedMemory(1 << 30)
    kept = holes()
    full = resident_bytes()
    freed.look()
    assert len(kept) == 16 and resident_bytes() > full - PIECE
