"""The matrix that a selector reads: numpy, torch on any device, or mapped from a file larger than memory.

What is checked, and how a row is brought to unit length, is the same for every selector.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastsel.errors import UsageError

# Rows converted at a time: a block of 8,192 x 384 float64 is 25 MB.
BLOCK_ROWS = 8192
# Entries checked at a time: 32 MB in float64, also where rows are as wide as gradients are.
BLOCK_VALUES = 2**22
# Entries brought to unit length at a time: 20 MB on the way beside the copy.
UNIT_VALUES = 2**20
_READ_AS_THEY_ARE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Rows:
    """A matrix [n, d] with finite entries, read in blocks or as a whole.

    Attributes:
        n, d: its shape.
        given: the matrix as it was given (other numbers than float16 to float64 as float64), not at unit length.
        device: where it lies, and where blocks are made.
        unit: whether rows are read at unit length; a row of zeros stays zero, so its similarity to anything is 0.
        lengths: float64 [n] on the CPU, Euclidean lengths of the rows as given.
        is_mapped: whether it is mapped from a file: then it is never copied as a whole.
    """

    def __init__(self, x: Any, *, unit: bool = False, name: str = "x") -> None:
        """Check the matrix, in one pass over it.

        Args:
            x: [n, d] numbers; numpy (mapped files too), torch, or what numpy makes an array of.
            unit: read rows at unit length.
            name: of the argument, for messages.

        Raises:
            UsageError: not a matrix of real numbers, no columns, or NaN or infinity in a row (the first is named).
        """
        self.is_mapped = isinstance(x, np.memmap)
        matrix = x.detach() if isinstance(x, torch.Tensor) else _as_tensor(np.asarray(x), name)
        if matrix.ndim != 2 or matrix.shape[1] < 1:
            raise UsageError(f"{name} must be a matrix [rows, features], got shape {list(matrix.shape)}")
        self.given = matrix if matrix.dtype in _READ_AS_THEY_ARE else matrix.to(torch.float64)
        self.n, self.d = matrix.shape
        self.device, self.unit = matrix.device, unit
        self._whole: torch.Tensor | None = None
        self.lengths: NDArray[np.float64] = np.zeros(self.n)
        size = min(BLOCK_ROWS, max(1, BLOCK_VALUES // self.d))
        for start in range(0, self.n, size):
            length = torch.linalg.vector_norm(self.given[start : start + size].double(), dim=1).cpu().numpy()
            if not np.isfinite(length).all():
                self._refuse(name, start, start + len(length))
            self.lengths[start : start + len(length)] = length

    def _refuse(self, name: str, start: int, stop: int) -> None:
        """Name the first row that is not finite (a length may also overflow: that is refused as too large)."""
        is_bad = ~torch.isfinite(self.given[start:stop]).all(dim=1).cpu().numpy()
        if is_bad.any():
            raise UsageError(
                f"{name}: row {start + int(is_bad.argmax())} holds NaN or infinity; drop or repair it first"
            )
        raise UsageError(f"{name}: a row between {start} and {stop} is too long for float64")

    def __len__(self) -> int:
        return self.n

    def exact(self, rows: ArrayLike | slice) -> torch.Tensor:
        """Float64 [b, d]: rows by number, at unit length when `unit`; from the values as they were given."""
        index = rows if isinstance(rows, slice) else torch.as_tensor(np.asarray(rows, dtype=np.int64)).to(self.device)
        block = self.given[index].double()
        if self.unit:
            lengths = torch.from_numpy(self.lengths[rows if isinstance(rows, slice) else np.asarray(rows, np.int64)])
            block = block / torch.where(lengths > 0, lengths, 1.0).to(self.device)[:, None]
        return block

    def take(self, rows: ArrayLike | slice) -> torch.Tensor:
        """Float32 [b, d]: exact(), rounded once."""
        if self._whole is not None:
            index = rows if isinstance(rows, slice) else torch.as_tensor(np.asarray(rows, np.int64)).to(self.device)
            return self._whole[index]
        if isinstance(rows, slice) and not self.unit and self.given.dtype == torch.float32:
            return self.given[rows]
        return self.exact(rows).float()

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, float32 [b, d]) for consecutive blocks of at most `size` rows."""
        for start in range(0, self.n, size):
            yield start, self.take(slice(start, min(self.n, start + size)))

    def whole(self) -> torch.Tensor:
        """Float32 [n, d] contiguous, made once; the matrix itself where it already is that. Not for mapped files."""
        if self._whole is None:
            if not self.unit and self.given.dtype == torch.float32 and self.given.is_contiguous():
                self._whole = self.given
            else:
                whole = torch.empty(self.n, self.d, dtype=torch.float32, device=self.device)
                for start, block in self.blocks(max(1, UNIT_VALUES // self.d)):
                    whole[start : start + len(block)] = block
                self._whole = whole
        return self._whole


def _as_tensor(array: NDArray[Any], name: str) -> torch.Tensor:
    """The array as a tensor over the same memory; a copy where torch cannot read it as it lies."""
    if array.dtype.kind not in "fiu":
        raise UsageError(f"{name} must hold real numbers, got {array.dtype}")
    is_read_by_torch = array.dtype.isnative and array.dtype.kind == "f" and array.dtype.itemsize <= 8
    if not is_read_by_torch or any(step < 0 or step % array.itemsize for step in array.strides):
        array = array.astype(np.float32 if array.dtype.kind == "f" and array.dtype.itemsize <= 4 else np.float64)
    with warnings.catch_warnings():  # torch warns of memory that must not be written; nothing here writes
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        return torch.from_numpy(array)


def check_k(k: int, n: int) -> int:
    """How many rows to choose: k, but at most n.

    Raises:
        UsageError: k is no whole number, or negative.
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise UsageError(f"k must be a whole number of rows, got {k!r}")
    if k < 0:
        raise UsageError(f"k={k} must not be negative")
    return min(int(k), n)


def check_rows(rows: ArrayLike | None, n: int, name: str) -> NDArray[np.int64]:
    """Row numbers as int64 [m], in the order given; empty for None.

    Raises:
        UsageError: not whole numbers, outside 0 to n - 1, or one twice.
    """
    if rows is None:
        return np.zeros(0, np.int64)
    array = np.asarray(rows)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(f"{name} must be row numbers [m], got {array.dtype} {list(array.shape)}")
    if array.min() < 0 or array.max() >= n:
        outside = array[(array < 0) | (array >= n)][0]
        raise UsageError(f"{name}: there is no row {outside}, the matrix has {n}")
    if len(np.unique(array)) < len(array):
        values, counts = np.unique(array, return_counts=True)
        raise UsageError(f"{name}: row {values[counts > 1][0]} stands there twice")
    return array.astype(np.int64)


def check_values(values: ArrayLike | None, n: int, name: str, *, least: float | None = None) -> NDArray[np.float64]:
    """One finite number a row, float64 [n]; ones for None.

    Raises:
        UsageError: another shape, NaN or infinity, or a value below `least` (the first row is named).
    """
    if values is None:
        return np.ones(n)
    array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype=np.float64)
    if array.shape != (n,):
        raise UsageError(f"{name} must be [{n}], one number a row, got {list(array.shape)}")
    is_bad = ~np.isfinite(array) if least is None else ~(np.isfinite(array) & (array >= least))
    if is_bad.any():
        row = int(is_bad.argmax())
        wanted = "a finite number" if least is None else f"a finite number of at least {least:g}"
        raise UsageError(f"{name}: row {row} has {array[row]}, which is not {wanted}")
    return array
