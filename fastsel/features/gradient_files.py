"""Gradient features that other programs wrote: LESS's .pt files, and bergson's index folders.

    all_orig.pt           LESS: [n, k], rows of length 1 (in bfloat16 0.997 to 1.003)
    all_unormalized.pt    LESS: [n, k] as projected (the name is the authors' own)
    info.json  gradients.bin    bergson: one record a row, a field a module

Which random numbers projected them is written nowhere: train and target features must come from one program, one seed
and, for fast_jl, one kind of GPU.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.errors import InputError

LESS_FILES = ("all_orig.pt", "all_unormalized.pt")
ZERO, NOT_FINITE = "it is all zeros: the row has no labelled token", "it holds NaN or infinity"


@dataclass(frozen=True)
class GradientFile:
    """Features of rows, in the order of the file that they were computed from.

    Attributes:
        matrix: float32 or float16 [n, k]; mapped from disk where the file allows it.
        is_normalised: whether every row has length 1 (to bfloat16's rounding); zero rows aside.
        flagged: row -> why it must not be scored.
        name: of the file.
    """

    matrix: NDArray[np.floating[Any]]
    is_normalised: bool
    flagged: dict[int, str]
    name: str


def read_gradient_file(path: str | Path) -> GradientFile:
    """Read features.

    Args:
        path: a .pt file of LESS, a folder with one (all_unormalized.pt before all_orig.pt, such as dim8192), or a
            folder of bergson's.

    Raises:
        InputError: there is nothing of the kind, it holds something else, or it cannot be read without running code.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "info.json").is_file() and (path / "gradients.bin").is_file():
            return checked(_bergson(path), str(path))
        found = [path / name for name in reversed(LESS_FILES) if (path / name).is_file()]
        if not found:
            shards = sorted(path.glob("grads-*.pt"))
            advice = f"; {shards[0].name} is a shard, which LESS merges at its end" if shards else ""
            raise InputError(f"{path} holds neither {' nor '.join(LESS_FILES)} nor bergson's gradients.bin{advice}")
        path = found[0]
    return checked(_less(path), str(path))


def _less(path: Path) -> NDArray[np.floating[Any]]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a foreign file: what it raises depends on where it is broken
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path} cannot be read: {lines[0]}") from error
    if not isinstance(loaded, torch.Tensor) or loaded.ndim != 2 or not loaded.is_floating_point():
        what = f"{loaded.dtype} {list(loaded.shape)}" if isinstance(loaded, torch.Tensor) else type(loaded).__name__
        raise InputError(f"{path} holds {what}, not a matrix [rows, features]")
    matrix: NDArray[np.floating[Any]] = (loaded if loaded.dtype != torch.bfloat16 else loaded.float()).numpy()
    return matrix


def _bergson(folder: Path) -> NDArray[np.floating[Any]]:
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        n, sizes = int(info["num_grads"]), dict(info["grad_sizes"])
        base = np.dtype(info["base_dtype"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'info.json'} is not bergson's: {error!r}") from None
    width = sum(sizes.values())
    path = folder / "gradients.bin"
    if base.kind != "f" or path.stat().st_size != n * width * base.itemsize:
        raise InputError(
            f"{path} has {path.stat().st_size:,} bytes; info.json says {n:,} rows of {width:,} {base} numbers"
        )
    return np.memmap(path, dtype=base, mode="r", shape=(n, width))


def checked(matrix: NDArray[np.floating[Any]], name: str, block: int = 4096) -> GradientFile:
    """A matrix [n, k] as a file of that name, its rows looked at."""
    flagged: dict[int, str] = {}
    is_normalised = len(matrix) > 0
    for start in range(0, len(matrix), block):
        norms = np.linalg.norm(np.asarray(matrix[start : start + block], np.float64), axis=1)
        for place in np.flatnonzero(~np.isfinite(norms)):
            flagged[start + int(place)] = NOT_FINITE
        for place in np.flatnonzero(norms == 0):
            flagged[start + int(place)] = ZERO
        rest = norms[np.isfinite(norms) & (norms > 0)]
        is_normalised &= bool(np.all(np.abs(rest - 1) < 0.01))
    return GradientFile(matrix, is_normalised, dict(sorted(flagged.items())), name)
