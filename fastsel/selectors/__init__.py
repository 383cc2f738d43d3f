"""Arrays in, row numbers out: what methods and other tools build on.

    indices, gains = fastsel.selectors.facility_location(embeddings, k=10_000)

Names resolve when they are first used, so that choosing by ready scores needs no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsel.selectors.bandit import bandit
    from fastsel.selectors.data_influence import data_influence
    from fastsel.selectors.facility_location import facility_location
    from fastsel.selectors.graph_walk import graph_walk
    from fastsel.selectors.k_center import k_center
    from fastsel.selectors.kmeans_sample import kmeans_sample
    from fastsel.selectors.max_sum_dispersion import max_sum_dispersion
    from fastsel.selectors.mig import mig
    from fastsel.selectors.novelselect import novelselect
    from fastsel.selectors.repr_filter import repr_filter
    from fastsel.selectors.score_turns import score_turns
    from fastsel.selectors.top_k import top_k
    from fastsel.selectors.vendi_sample import vendi_sample

_HOMES = {
    "bandit": "fastsel.selectors.bandit",
    "data_influence": "fastsel.selectors.data_influence",
    "facility_location": "fastsel.selectors.facility_location",
    "graph_walk": "fastsel.selectors.graph_walk",
    "k_center": "fastsel.selectors.k_center",
    "kmeans_sample": "fastsel.selectors.kmeans_sample",
    "max_sum_dispersion": "fastsel.selectors.max_sum_dispersion",
    "mig": "fastsel.selectors.mig",
    "repr_filter": "fastsel.selectors.repr_filter",
    "novelselect": "fastsel.selectors.novelselect",
    "score_turns": "fastsel.selectors.score_turns",
    "top_k": "fastsel.selectors.top_k",
    "vendi_sample": "fastsel.selectors.vendi_sample",
}
__all__ = [
    "bandit",
    "data_influence",
    "facility_location",
    "graph_walk",
    "k_center",
    "kmeans_sample",
    "max_sum_dispersion",
    "mig",
    "repr_filter",
    "novelselect",
    "score_turns",
    "top_k",
    "vendi_sample",
]


class _Selectors(ModuleType):
    """The import system binds each submodule to its package by name; here that name is the function in it."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if name in _HOMES and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Selectors


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastsel.selectors' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
