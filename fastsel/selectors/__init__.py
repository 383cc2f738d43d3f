"""Arrays in, row numbers out: what methods and other tools build on."""

from fastsel.selectors.top_k import top_k

__all__ = ["top_k"]
