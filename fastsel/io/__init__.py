"""Pools in, selections out: reading rows of any layout as conversations, prompt templates, and the output folder.

Names resolve when they are first used, so that `import fastsel.io` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsel.io.examples import STATUS, Example, Message
    from fastsel.io.pool import Pool, bundled_pool_path, open_pool

_HOMES = {
    "STATUS": "fastsel.io.examples",
    "Example": "fastsel.io.examples",
    "Message": "fastsel.io.examples",
    "Pool": "fastsel.io.pool",
    "bundled_pool_path": "fastsel.io.pool",
    "open_pool": "fastsel.io.pool",
}
__all__ = ["STATUS", "Example", "Message", "Pool", "bundled_pool_path", "open_pool"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
