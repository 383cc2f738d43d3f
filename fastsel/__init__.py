"""fastsel picks the examples worth training on.

    selection = fastsel.ifd("pool.jsonl", budget="10%")

Nothing is computed here: names resolve when they are first used (PEP 562), so importing needs neither torch nor time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; tests/test_public_api.py holds it to the table below
    from fastsel import io, kernels, metrics, selectors
    from fastsel.errors import FastselError, FastselWarning, InputError, MissingExtraError, RunFailedError, UsageError
    from fastsel.features.warmup import warmup
    from fastsel.io import open_pool
    from fastsel.methods.bm25 import bm25
    from fastsel.methods.cluster_ucb import cluster_ucb
    from fastsel.methods.diverse_evol import diverse_evol
    from fastsel.methods.facility_location import facility_location
    from fastsel.methods.g2is import g2is
    from fastsel.methods.ifd import ifd
    from fastsel.methods.in2core import in2core
    from fastsel.methods.k_center import k_center
    from fastsel.methods.kmeans import kmeans
    from fastsel.methods.length import length
    from fastsel.methods.less import less
    from fastsel.methods.mig import mig
    from fastsel.methods.novelselect import novelselect
    from fastsel.methods.perplexity import perplexity
    from fastsel.methods.qdit import qdit
    from fastsel.methods.random import random
    from fastsel.methods.rds import rds
    from fastsel.methods.repr_filter import repr_filter
    from fastsel.methods.scores import scores
    from fastsel.methods.superfiltering import superfiltering
    from fastsel.models.checkpoints import open_checkpoints
    from fastsel.models.loading import load_model
    from fastsel.selection import Selection

__version__ = "0.1.0"

_MODULES = ("io", "kernels", "metrics", "selectors")
_HOMES = {
    "FastselError": "fastsel.errors",
    "FastselWarning": "fastsel.errors",
    "InputError": "fastsel.errors",
    "MissingExtraError": "fastsel.errors",
    "RunFailedError": "fastsel.errors",
    "Selection": "fastsel.selection",
    "UsageError": "fastsel.errors",
    "bm25": "fastsel.methods.bm25",
    "cluster_ucb": "fastsel.methods.cluster_ucb",
    "diverse_evol": "fastsel.methods.diverse_evol",
    "facility_location": "fastsel.methods.facility_location",
    "g2is": "fastsel.methods.g2is",
    "ifd": "fastsel.methods.ifd",
    "in2core": "fastsel.methods.in2core",
    "k_center": "fastsel.methods.k_center",
    "kmeans": "fastsel.methods.kmeans",
    "length": "fastsel.methods.length",
    "less": "fastsel.methods.less",
    "load_model": "fastsel.models.loading",
    "mig": "fastsel.methods.mig",
    "novelselect": "fastsel.methods.novelselect",
    "open_checkpoints": "fastsel.models.checkpoints",
    "open_pool": "fastsel.io",
    "perplexity": "fastsel.methods.perplexity",
    "qdit": "fastsel.methods.qdit",
    "random": "fastsel.methods.random",
    "rds": "fastsel.methods.rds",
    "repr_filter": "fastsel.methods.repr_filter",
    "scores": "fastsel.methods.scores",
    "superfiltering": "fastsel.methods.superfiltering",
    "warmup": "fastsel.features.warmup",
}
__all__ = [
    "FastselError",
    "FastselWarning",
    "InputError",
    "MissingExtraError",
    "RunFailedError",
    "Selection",
    "UsageError",
    "bm25",
    "cluster_ucb",
    "diverse_evol",
    "facility_location",
    "g2is",
    "ifd",
    "in2core",
    "io",
    "k_center",
    "kernels",
    "kmeans",
    "length",
    "less",
    "load_model",
    "metrics",
    "mig",
    "novelselect",
    "open_checkpoints",
    "open_pool",
    "perplexity",
    "qdit",
    "random",
    "rds",
    "repr_filter",
    "scores",
    "selectors",
    "superfiltering",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"fastsel.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastsel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
