"""How diverse a set of rows is: arrays or texts in, one number out.

    fastsel.metrics.vendi(embeddings[selection.indices])
    fastsel.metrics.facility_location(embeddings[selection.indices], reference=embeddings)

Names resolve when they are first used, so that lexical metrics need no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsel.metrics.clusters import cluster_inertia, partition_entropy
    from fastsel.metrics.coverage import facility_location
    from fastsel.metrics.distances import dist_sum, knn, radius
    from fastsel.metrics.lexical import ttr, vocd_d
    from fastsel.metrics.novelsum import novelsum, novelsum_grid
    from fastsel.metrics.spectrum import log_determinant, vendi

_HOMES = {
    "cluster_inertia": "fastsel.metrics.clusters",
    "dist_sum": "fastsel.metrics.distances",
    "facility_location": "fastsel.metrics.coverage",
    "knn": "fastsel.metrics.distances",
    "log_determinant": "fastsel.metrics.spectrum",
    "novelsum": "fastsel.metrics.novelsum",
    "novelsum_grid": "fastsel.metrics.novelsum",
    "partition_entropy": "fastsel.metrics.clusters",
    "radius": "fastsel.metrics.distances",
    "ttr": "fastsel.metrics.lexical",
    "vendi": "fastsel.metrics.spectrum",
    "vocd_d": "fastsel.metrics.lexical",
}
__all__ = [
    "cluster_inertia",
    "dist_sum",
    "facility_location",
    "knn",
    "log_determinant",
    "novelsum",
    "novelsum_grid",
    "partition_entropy",
    "radius",
    "ttr",
    "vendi",
    "vocd_d",
]


class _Metrics(ModuleType):
    """The import system binds each submodule to its package by name; here that name is the function in it."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if name in _HOMES and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Metrics


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastsel.metrics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
