"""What a run would take: a trial on 100 rows spread over the pool, scaled up. Nothing is kept."""

import logging
import resource
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastsel.budget import Budget, spread
from fastsel.commands.config import Config
from fastsel.commands.run import announce_model, compute, open_configured_pool
from fastsel.errors import InputError
from fastsel.progress import format_seconds

if TYPE_CHECKING:
    from fastsel.io import Pool
    from fastsel.selection import Selection

TRIAL_ROWS = 100
_WARM_UP_ROWS = 8
_BYTES_A_ROW = 200  # what a run may hold for each pool row, whatever its length
_REPORT_BYTES = 1_000_000
logger = logging.getLogger("fastsel")


@dataclass(frozen=True)
class Estimate:
    """What the whole run would take.

    Attributes:
        rows: of the pool.
        usable_rows: rows that can be scored.
        trial_rows: rows the figures come from.
        tokens: prompt and answer tokens of the usable rows; None for a method that counts none.
        seconds: wall time on this machine, loading the model included.
        memory_bytes: largest resident memory of the process.
        device_memory_bytes: largest allocation on the GPU; None without one.
        disk_bytes: of the output folder.
        model: the model's name, or None.
        device: where it ran, or None.
    """

    rows: int
    usable_rows: int
    trial_rows: int
    tokens: int | None
    seconds: float
    memory_bytes: int
    device_memory_bytes: int | None
    disk_bytes: int
    model: str | None
    device: str | None

    def as_dict(self) -> dict[str, Any]:
        """The estimate as JSON values."""
        return asdict(self)

    def text(self) -> str:
        """A line for each figure."""
        where = f" on {self.device}" if self.device else ""
        lines = [f"pool     {self.rows:,} rows, {self.usable_rows:,} of them usable"]
        if self.model:
            lines.append(f"model    {self.model}")
        if self.tokens is not None:
            lines.append(f"tokens   {self.tokens:,} ({self.tokens / max(1, self.usable_rows):,.0f} a row)")
        lines.append(f"time     {format_seconds(self.seconds)}{where}")
        lines.append(f"memory   {_size(self.memory_bytes)}")
        if self.device_memory_bytes is not None:
            lines.append(f"GPU      {_size(self.device_memory_bytes)}")
        lines.append(f"disk     {_size(self.disk_bytes)}")
        lines.append(f"estimated from a trial of {self.trial_rows} rows; nothing was written")
        return "\n".join(lines)


def estimate(config: Config, *, progress: str = "auto") -> Estimate:
    """Run the method on 100 rows spread evenly over the pool and scale up what it took.

    Args:
        config: the configuration of the run.
        progress: see fastsel.progress.

    Raises:
        InputError: no row of the pool is usable.
        UsageError: the run would refuse its options.
    """
    from fastsel.io import STATUS, open_pool

    pool = open_configured_pool(config, progress)
    usable = np.flatnonzero(pool.status <= STATUS.index("truncated"))
    if not len(usable):
        raise InputError(f"{pool.name}: no row is usable, so there is nothing to try; the reasons are above")
    trial_rows = usable[np.unique(np.linspace(0, len(usable) - 1, min(TRIAL_ROWS, len(usable))).astype(np.int64))]
    announce_model(config)
    logger.info("trying %d rows", len(trial_rows))
    started = time.perf_counter()
    loaded = _load(config)
    load_seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        if loaded is not None:  # the first forward pass pays for compiling and for fresh memory
            few = open_pool(
                pool.write_rows(trial_rows[:_WARM_UP_ROWS], Path(folder) / "few"), **pool.options, progress="none"
            )
            _try(config, few, loaded, {}, None, "none")
        trial = open_pool(pool.write_rows(trial_rows, Path(folder) / "trial"), **pool.options, progress="none")
        started = time.perf_counter()
        given = {name: _rows_of_matrix(config, name, trial_rows) for name in ("encoder", "gradients")}
        selection = _try(config, trial, loaded, given, Path(folder) / "features", progress)
        trial_seconds = time.perf_counter() - started
        feature_bytes = _bytes_under(Path(folder) / "features")
        trial_bytes = sum(path.stat().st_size for path in Path(folder).glob("trial*") if path.is_file())
        selection_bytes = _table_bytes(selection, Path(folder))
    if config.command == "select":  # what the run would refuse after scoring
        counted = None if selection.n_tokens is None else np.zeros(len(pool), np.int32)
        spread(config.values["budget"], pool, counted, config.values["per"])
    scale = len(usable) / len(trial_rows)
    share = _share_kept(config, pool)
    tokens = None
    if selection.n_tokens is not None:
        tokens = round(float(np.maximum(selection.n_tokens, 0).sum()) * scale)
    disk = scale * (feature_bytes + trial_bytes * share) + selection_bytes / len(trial_rows) * len(pool)
    disk += _REPORT_BYTES if config.values.get("report") else 0
    return Estimate(
        rows=len(pool),
        usable_rows=len(usable),
        trial_rows=len(trial_rows),
        tokens=tokens,
        seconds=load_seconds + trial_seconds * scale,
        # Linux counts in KiB. The pool's own bytes a row are in it already; the run's arrays are not.
        memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + _BYTES_A_ROW * len(pool),
        device_memory_bytes=_device_memory(loaded),
        disk_bytes=round(disk),
        model=None if loaded is None else loaded.name,
        device=None if loaded is None else str(loaded.device),
    )


def _load(config: Config) -> Any:
    values = config.values
    if values.get("encoder") is not None and not values["encoder"].endswith(".npy"):
        from fastsel.models.encoders import load_encoder

        names = ("encoder", "pooling", "max_length", "device", "dtype", "implementation")
        return load_encoder(**{name: values[name] for name in names})
    if values.get("model") is None and "checkpoints" in values:
        from fastsel.features.gradient_setup import base_model
        from fastsel.features.influence import given_checkpoints

        return base_model(
            None, given_checkpoints(values["checkpoints"]), device=values["device"], dtype=values["dtype"]
        )
    if values.get("encoder") is not None or values.get("model") is None:
        return None
    from fastsel.models.loading import load_model

    return load_model(values["model"], device=values["device"], dtype=values["dtype"])


def _try(
    config: Config, trial: "Pool", loaded: Any, given: Mapping[str, Any], store: Path | None, progress: str
) -> "Selection":
    values = config.values | {"budget": "1.0", "per": None, "engine": "local", "workers": None, "ray_address": None}
    if loaded is not None:
        values["model" if values.get("encoder") is None else "encoder"] = loaded
    values |= {name: matrix for name, matrix in given.items() if matrix is not None}
    whole = Config(config.command, config.method, values, config.given)
    return compute(whole, trial, store=store, progress=progress)


def _rows_of_matrix(config: Config, name: str, rows: NDArray[np.int64]) -> NDArray[Any] | None:
    """The trial's rows of a matrix of the user's, if there is one; its own checks see the rest in the run."""
    path = config.values.get(name)
    if path is None or (name == "encoder" and not path.endswith(".npy")):
        return None
    try:
        if path.endswith(".npy"):
            matrix: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            from fastsel.features.gradient_files import read_gradient_file

            matrix = read_gradient_file(path).matrix
        return np.array(matrix[rows])
    except InputError:
        raise
    except (OSError, ValueError, IndexError) as error:
        what = "embeddings" if name == "encoder" else name
        raise InputError(f"{what} {path} cannot be read: {error}") from error


def _share_kept(config: Config, pool: "Pool") -> float:
    if config.command != "select":
        return 0.0
    budget = Budget.parse(config.values["budget"])
    return budget.limit(len(pool)) / len(pool) if budget.unit != "tokens" else 1.0


def _table_bytes(selection: "Selection", folder: Path) -> int:
    import pyarrow.parquet as pq

    path = folder / "selection.parquet"
    pq.write_table(selection.table, path)
    return path.stat().st_size


def _bytes_under(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _device_memory(loaded: Any) -> int | None:
    if loaded is None or not str(loaded.device).startswith("cuda"):
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(loaded.device))


def _size(n_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes} bytes"
