"""Operations: one folder = one operation, one file = one way to compute it.

Open the operation's folder and read api.py: the contract, and the table of implementations in the order in which
"auto" asks them. reference.py says what is computed in the fewest lines. Each of the other files holds one
implementation with exactly two functions: unsupported(*inputs) returns why it cannot take these inputs, or None, and
compute(*inputs) computes. cases.py names the shapes that tests and benchmarks share.

Operations import _runtime and their own folder, never each other.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """An operation, imported when it is first named: `fastsel.kernels.<op>.<op>` needs no import of its own."""
    if not name.startswith("_"):
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":  # torch is missing, say
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
