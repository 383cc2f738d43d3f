"""Modules of a model that run other code for a while."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def forwards_replaced(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Inside, each module runs the function beside it; none of them has had a forward of its own before."""
    replaced = []
    try:
        for module, forward in forwards:
            replaced.append(module)
            vars(module)["forward"] = forward
        yield
    finally:
        for module in replaced:
            vars(module).pop("forward", None)
