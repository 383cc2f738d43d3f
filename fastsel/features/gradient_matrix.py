"""A pool's gradients and a target's in one space, as matrices: projected here, or the user's own."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.errors import InputError, UsageError
from fastsel.features.gradient_files import GradientFile, checked, read_gradient_file
from fastsel.features.gradients import LoraGradients, lora_gradients
from fastsel.features.targets import Target
from fastsel.io.examples import OK, SKIPPED
from fastsel.io.row_reasons import RowReasons
from fastsel.kernels.lora_gradient_sketch import SketchSpec

if TYPE_CHECKING:
    from fastsel.features.gradient_setup import GradientSetup
    from fastsel.features.influence import RunState
    from fastsel.io import Pool


@dataclass
class GradientMatrix:
    """Rows with a gradient, and what is known of all rows.

    Attributes:
        matrix: [m, k] of the rows that have one; numpy, mapped from a file, or torch.
        rows: int64 [m], their pool rows.
        target: [t, k], one for each target row that has one.
        status, reasons, n_tokens, timings, notes, provenance: see LoraGradients.
    """

    matrix: Any
    rows: NDArray[np.int64]
    target: Any
    status: NDArray[np.uint8]
    reasons: RowReasons
    n_tokens: NDArray[np.int32] | None
    timings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def has_vector(self) -> NDArray[np.bool_]:
        """Bool [n]: rows with a gradient."""
        mask = np.zeros(len(self.status), np.bool_)
        mask[self.rows] = True
        return mask

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Put down the seconds of what is done inside."""
        started = time.perf_counter()
        yield
        self.timings[step] = time.perf_counter() - started

    def drop(self, rows: NDArray[np.bool_], reason: str) -> None:
        """Leave the rows of this mask [n] without a gradient."""
        dropped, kept = rows & self.has_vector, ~rows[self.rows]
        if dropped.any():
            self.matrix, self.rows = self.matrix[kept], self.rows[kept]
            self.status[dropped] = SKIPPED
            self.reasons.add(dropped, reason)


def given_matrix(pool: "Pool", gradients: Any, target_gradients: Any) -> GradientMatrix:
    """Gradients that the user brings. Rows of zeros, or that are not finite, count as rows without a gradient.

    Args:
        gradients: [n, k], one row for each pool row: an array, a .npy file, or what read_gradient_file takes.
        target_gradients: [t, k], the same for the target.

    Raises:
        InputError: a file cannot be read, or has other rows than the pool or other columns than the other; no row of
            the target can be used.
        UsageError: only one of them is given.
    """
    if gradients is None or target_gradients is None:
        raise UsageError("gradients= and target_gradients= go together: give both, or neither to compute them")
    train, target = _opened(gradients, "gradients"), _opened(target_gradients, "target_gradients")
    if len(train.matrix) != len(pool):
        raise InputError(f"{train.name} has {len(train.matrix):,} rows, the pool {pool.name} has {len(pool):,}")
    if train.matrix.shape[1] != target.matrix.shape[1]:
        raise InputError(
            f"{train.name} has {train.matrix.shape[1]:,} columns, {target.name} has {target.matrix.shape[1]:,}"
        )
    usable = np.delete(np.arange(len(target.matrix)), list(target.flagged))
    if not len(usable):
        raise InputError(f"{target.name} has no row that can be used: {next(iter(target.flagged.values()), 'none')}")
    notes = []
    if target.flagged:
        row, reason = next(iter(target.flagged.items()))
        notes = [f"{target.name}: {len(target.flagged):,} rows do not count (row {row}: {reason})"]
    taken = GradientMatrix(
        train.matrix, np.arange(len(pool)), target.matrix[usable] if target.flagged else target.matrix,
        np.array(pool.status, np.uint8), RowReasons(pool, np.zeros(len(pool), np.uint8), [None]), None, notes=notes,
        provenance={"gradients": train.name, "target_gradients": target.name},
    )  # fmt: skip
    rows = np.flatnonzero(pool.status == OK).astype(np.int64)
    if len(rows) < len(pool):
        taken.matrix, taken.rows = taken.matrix[rows], rows
    for reason in dict.fromkeys(train.flagged.values()):
        mask = np.zeros(len(pool), np.bool_)
        mask[[row for row, why in train.flagged.items() if why == reason]] = True
        taken.drop(mask, reason)
    return taken


def _opened(given: Any, what: str) -> GradientFile:
    """An array, or a file.

    Raises:
        InputError: it is no matrix, or its file cannot be read.
    """
    name = what
    if isinstance(given, (str, Path)):
        if Path(given).suffix != ".npy":
            return read_gradient_file(given)
        name = str(given)
        try:
            given = np.load(given, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{what} {name} cannot be read: {error}") from None
    elif isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.dtype == torch.bfloat16 else given).numpy()
    else:
        given = np.asanyarray(given)
    if given.ndim != 2 or given.dtype.kind not in "fiu":
        raise InputError(f"{what} {name} must be a matrix of numbers [rows, columns], got {given.dtype} {given.shape}")
    return checked(given, name)


def projected(
    pool: "Pool",
    targets: Sequence[Target],
    state: "RunState",
    setup: "GradientSetup",
    *,
    sketch_size: int,
    seed: int = 0,
    eps_mode: str = "inside",
    overflow: str = "truncate",
    turns: str = "all",
    batch_tokens: int | None = None,
    implementation: str = "auto",
    store: Any = None,
    executor: Any = None,
    progress: str = "auto",
) -> GradientMatrix:
    """Projections of the pool's Adam steps, and of the target rows' plain gradients, as LESS takes them.

    Args:
        state: a checkpoint in use.    setup: see set_up.
        sketch_size, seed: of the projection, one for both (SJLT of a counter hash).
        eps_mode, overflow, turns, batch_tokens, implementation, store, executor, progress: see lora_gradients.

    Raises:
        InputError: no target row, or no pool row, has a gradient.
    """
    common: dict[str, Any] = {
        "forward": state.forward, "sketch": SketchSpec(sketch_size, seed=seed), "max_length": setup.max_length,
        "batch_tokens": batch_tokens, "implementation": implementation,
    }  # fmt: skip
    blocks, notes = [], []
    for target in targets:
        found = lora_gradients(
            target.pool, state.loaded, template=setup.target_template, step="sgd", progress=progress, **common
        )
        is_wanted = np.zeros(len(target.pool), np.bool_)
        is_wanted[target.rows] = True
        missing = is_wanted & ~found.has_gradient
        if missing.any():
            first = int(missing.argmax())
            notes.append(f"target {target.name}: {missing.sum():,} rows have no gradient ({found.reasons[first]})")
        blocks += [block[is_wanted[rows]] for rows, block in found.sketches()]
    if not sum(map(len, blocks)):
        raise InputError("no target row has a gradient: " + (notes[0] if notes else "there is none"))
    gradients: LoraGradients = lora_gradients(
        pool, state.loaded, template=setup.template, overflow=overflow, turns=turns, step="adam", eps_mode=eps_mode,
        moments=state.moments, store=store, executor=executor, progress=progress, **common,
    )  # fmt: skip
    rows = np.flatnonzero(gradients.has_gradient).astype(np.int64)
    if not len(rows):
        raise InputError(f"no row of {pool.name} has a gradient")
    matrix = gradients.sketch_matrix()
    # Equal rows tie to the bit, whatever batches they were in.
    place = np.zeros(len(pool), np.int64)
    place[rows] = np.arange(len(rows))
    twins = place[gradients.first_equal[rows]]
    copies = np.flatnonzero(twins != np.arange(len(rows)))
    matrix[copies] = matrix[twins[copies]]
    return GradientMatrix(
        matrix, rows, np.concatenate(blocks), gradients.status, gradients.reasons, gradients.n_tokens,
        gradients.timings, [*notes, *gradients.notes], gradients.provenance,
    )  # fmt: skip
