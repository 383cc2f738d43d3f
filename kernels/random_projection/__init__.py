"""Rows of any length -> k numbers that keep inner products, by signs and rows of a counter hash: nothing is stored."""

from fastsel.kernels.random_projection.api import random_projection
from fastsel.kernels.random_projection.fast_jl import fast_jl_projection, fast_jl_rows
from fastsel.kernels.random_projection.trak_basic import trak_basic_blocks, trak_basic_projection

__all__ = ["fast_jl_projection", "fast_jl_rows", "random_projection", "trak_basic_blocks", "trak_basic_projection"]
