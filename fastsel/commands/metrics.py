"""How diverse a subset is, beside random draws of the same size: what `fastsel metrics` calls."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsel.commands.console import table
from fastsel.commands.subset import Rows, Side, sides
from fastsel.errors import InputError, MissingExtraError, UsageError


class Metric(NamedTuple):
    """One metric of fastsel.metrics as the command computes it: what it reads, and what a number of it says."""

    reads: str  # "texts" or "vectors"
    says: str
    reference: str = "no"  # "no", "needed", or "used" where there is one


METRICS = {
    "ttr": Metric("texts", "distinct words over words, mean over rows"),
    "vocd_d": Metric("texts", "vocabulary that does not fall with length, mean over rows of more than 50 words"),
    "dist_sum": Metric("vectors", "cosine distance of two rows, mean over pairs"),
    "dist_sum_l2": Metric("vectors", "Euclidean distance of two rows, mean over pairs"),
    "knn": Metric("vectors", "Euclidean distance to the 5 nearest rows, mean"),
    "cluster_inertia": Metric("vectors", "squared distances to the centroids of 200 clusters, sum"),
    "radius": Metric("vectors", "geometric mean of the features' standard deviations"),
    "vendi": Metric("vectors", "effective number of different rows"),
    "log_determinant": Metric("vectors", "log volume of the cosines, ridge 1e-6"),
    "facility_location": Metric("vectors", "similarity of a reference row to its nearest row, mean", "needed"),
    "novelsum": Metric("vectors", "distance to the other rows, near ones weighing most, by density", "used"),
    "partition_entropy": Metric("vectors", "spread over 100 clusters of the reference, bits", "needed"),
}


@dataclass(frozen=True)
class Measured:
    """One line of the table.

    Attributes:
        name: of the metric.
        value: of the subset; None where it could not be computed.
        random_mean, random_std: of random draws of the same size from the reference; None without a reference.
        seconds: what the subset's value took.
        note: why there is no value, or None.
    """

    name: str
    value: float | None
    random_mean: float | None = None
    random_std: float | None = None
    seconds: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Measurements:
    """All lines, and of what.

    Attributes:
        subset, reference: names of what was compared; reference is None without one.
        rows, draws: rows of the subset that were measured, and random draws beside them.
        lines: one a metric, in the order asked.
        notes: what a reader must know, such as rows left out.
        encoder, text: what the vectors and words are of.
    """

    subset: str
    reference: str | None
    rows: int
    draws: int
    lines: list[Measured]
    notes: list[str]
    encoder: str | None
    text: str

    def as_dict(self) -> dict[str, Any]:
        """The measurements as JSON values: what is no number is null."""
        return {"status": "done", "exit_code": 0, **_finite(asdict(self))}

    def as_text(self, width: int = 120) -> str:
        """The table for people."""
        beside = f", beside {self.draws} random draws of as many from {self.reference}" if self.reference else ""
        vectors = f"; vectors: {self.encoder}" if self.encoder else ""
        lines = [f"{self.rows:,} rows of {self.subset}{beside} (text: {self.text}{vectors})", ""]
        cells = [
            [
                line.name,
                _number(line.value),
                _spread(line),
                _seconds(line.seconds),
                line.note or METRICS[line.name].says,
            ]
            for line in self.lines
        ]
        lines.append(table(cells, ["metric", "value", "random", "cost", "what it says"], width))
        lines += ["", *self.notes] if self.notes else []
        return "\n".join(lines)


def measure(
    subset: str | Path,
    *,
    reference: str | Path | None = None,
    metrics: Sequence[str] | None = None,
    encoder: Any = "bundled",
    text: str = "instruction",
    device: str = "auto",
    draws: int = 5,
    seed: int = 0,
    progress: str = "auto",
) -> Measurements:
    """Measure a subset by several metrics.

    Args:
        subset: a file of rows (selected.jsonl), a run's folder, or a .npy of row numbers of the reference.
        reference: the pool that it was chosen from, or another one.
        metrics: names of METRICS; None takes all, and says of each that cannot be computed why.
        encoder, device: see fastsel.features.embeddings.embed_pool. A .npy matrix has a row for each row of the
            reference (of the subset when there is no reference).
        text: what is embedded, and whose words are counted: "instruction", "answer" or "conversation".
        draws: how many random draws are measured beside.
        seed: of the draws.
        progress: see fastsel.progress.

    Raises:
        UsageError: an unknown metric; one asked for by name that lacks a reference or a package.
        InputError: the subset or the reference cannot be read, or their rows do not fit together.
    """
    wanted = _names(metrics)
    if isinstance(draws, bool) or draws < 1:
        raise UsageError(f"draws={draws} must be at least 1")
    if metrics is not None and reference is None:
        for name in wanted:
            if METRICS[name].reference == "needed":
                raise UsageError(f"{name} compares with a pool: name one with --reference POOL")
    notes: list[str] = []
    reads_vectors = any(METRICS[name].reads == "vectors" for name in wanted)
    ours, pool, encoder_name = sides(
        subset, reference, encoder if reads_vectors else None, text, device, progress, notes
    )
    if len(ours.rows) == 0:
        raise InputError(f"{subset}: no row of it can be measured")
    drawn: list[Rows] = []
    if pool is not None:
        size = min(len(ours.rows), len(pool.rows))
        if size < len(ours.rows):
            notes.append(f"the reference has {len(pool.rows):,} rows only: so many are drawn")
        drawn = [np.sort(np.random.default_rng([seed, i]).choice(pool.rows, size, replace=False)) for i in range(draws)]
    lines = []
    for name in wanted:
        try:
            lines.append(_measured(name, ours, pool, drawn))
        except MissingExtraError as error:
            if metrics is not None:
                raise
            lines.append(Measured(name, None, note=str(error)))
    return Measurements(
        subset=str(subset), reference=None if reference is None else str(reference), rows=len(ours.rows), draws=draws,
        lines=lines, notes=notes, encoder=encoder_name, text=text,
    )  # fmt: skip


def write(measurements: Measurements, path: str | Path) -> None:
    """Write the measurements as JSON."""
    Path(path).write_text(json.dumps(measurements.as_dict(), indent=1) + "\n")


def _names(metrics: Sequence[str] | None) -> list[str]:
    if metrics is None:
        return list(METRICS)
    for name in metrics:
        if name not in METRICS:
            raise UsageError(f"there is no metric {name!r}; the metrics are: {', '.join(METRICS)}")
    if not metrics:
        raise UsageError(f"which metrics? They are: {', '.join(METRICS)}")
    return list(dict.fromkeys(metrics))


def _measured(name: str, ours: Side, pool: Side | None, drawn: list[Rows]) -> Measured:
    if METRICS[name].reference == "needed" and pool is None:
        return Measured(name, None, note="compares with a pool: --reference POOL")
    started = time.perf_counter()
    compute = _computation(name, pool)
    value = compute(ours, ours.rows)
    seconds = time.perf_counter() - started
    if pool is None:
        return Measured(name, value, seconds=seconds)
    others = np.array([compute(pool, rows) for rows in drawn])
    return Measured(name, value, float(others.mean()), float(others.std()), seconds)


def _computation(name: str, pool: Side | None) -> Callable[[Side, Rows], float]:
    """The metric as a function of a side and its rows; what it needs of the reference is computed once."""
    from fastsel import metrics
    from fastsel.metrics.clusters import reference_centroids

    if METRICS[name].reads == "texts":
        of_texts = getattr(metrics, name)
        return lambda side, rows: float(of_texts(side.texts(rows)))
    of_vectors: Callable[..., float]
    if name == "dist_sum_l2":
        of_vectors = partial(metrics.dist_sum, metric="euclidean", average="pairs")
    elif name == "dist_sum":
        of_vectors = partial(metrics.dist_sum, average="pairs")
    elif name == "facility_location":
        of_vectors = partial(metrics.facility_location, reference=_all_vectors(pool), average=True)
    elif name == "novelsum":
        of_vectors = partial(metrics.novelsum, reference=None if pool is None else _all_vectors(pool))
    elif name == "partition_entropy":
        of_vectors = partial(metrics.partition_entropy, centroids=reference_centroids(_all_vectors(pool)))
    else:
        of_vectors = getattr(metrics, name)
    return lambda side, rows: float(of_vectors(_vectors(side, rows)))


def _vectors(side: Side, rows: Rows) -> NDArray[np.float32]:
    assert side.vectors is not None
    return side.vectors(rows)


def _all_vectors(pool: Side | None) -> NDArray[np.float32]:
    assert pool is not None
    return _vectors(pool, pool.rows)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _spread(line: Measured) -> str:
    if line.random_mean is None or line.random_std is None:
        return "-"
    return f"{line.random_mean:.5g} ± {line.random_std:.2g}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s"
