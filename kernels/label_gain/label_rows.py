"""Sparse rows of label weights, checked once: a greedy selection reads them thousands of times."""

from __future__ import annotations

import torch

from fastsel.kernels._runtime.checks import check_tensor

CHECKED_AT_ONCE = 1 << 24  # entries: the checks' temporaries stay below 400 MB for files larger than memory
VALUE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LabelRows:
    """An immutable matrix [n, n_labels] in compressed rows: entries indptr[i] : indptr[i + 1] belong to row i.

    Attributes:
        indptr: [n + 1] int64, from 0, never falling.
        indices: [nnz] int32 label numbers, strictly rising within a row (so that no label stands there twice).
        values: [nnz] float64 | float32 | bfloat16 | float16, finite, >= 0: how much of the label the row brings.
        n_labels: how many labels there are, >= 1.
    """

    def __init__(self, indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, n_labels: int) -> None:
        """Check and keep the arrays (they are not copied).

        Raises:
            ValueError: shapes, dtypes or devices differ from the above, or an entry breaks a rule (its row is named).
        """
        check_tensor("indptr", indptr, ("n + 1",), dtypes=(torch.int64,))
        check_tensor("indices", indices, ("nnz",), dtypes=(torch.int32,), device=indptr.device)
        check_tensor("values", values, (len(indices),), dtypes=VALUE_DTYPES, device=indptr.device)
        if not 1 <= n_labels < 2**31:
            raise ValueError(f"n_labels must lie between 1 and 2^31 - 1, got {n_labels}")
        if len(indptr) < 1 or int(indptr[0]) != 0 or int(indptr[-1]) != len(indices):
            raise ValueError(f"indptr must begin with 0 and end with {len(indices)}, the number of entries")
        if bool((indptr[1:] < indptr[:-1]).any()):
            raise ValueError("indptr must never fall")
        self.indptr, self.indices, self.values = indptr.contiguous(), indices.contiguous(), values.contiguous()
        self.n_labels = int(n_labels)
        for start in range(0, len(indices), CHECKED_AT_ONCE):
            self._check_entries(start, min(len(indices), start + CHECKED_AT_ONCE))

    def _check_entries(self, start: int, stop: int) -> None:
        labels, values = self.indices[start:stop], self.values[start:stop]
        is_outside = (labels < 0) | (labels >= self.n_labels)
        if bool(is_outside.any()):
            entry = int(is_outside.int().argmax())
            row = self._row_of(start + entry)
            raise ValueError(f"row {row} has the label {int(labels[entry])}; there are {self.n_labels}")
        is_bad = ~(values >= 0) | torch.isinf(values)
        if bool(is_bad.any()):
            entry = int(is_bad.int().argmax())
            row = self._row_of(start + entry)
            raise ValueError(f"row {row} holds {float(values[entry])}; values are finite and not negative")
        pairs = self.indices[start : stop + 1]  # the first entry of the next part too
        rises = pairs[1:] > pairs[:-1]
        starts_a_row = self.indptr[(self.indptr > start) & (self.indptr < start + len(pairs))] - start - 1
        rises[starts_a_row] = True
        if not bool(rises.all()):
            row = self._row_of(start + 1 + int((~rises).int().argmax()))
            raise ValueError(f"the labels of row {row} must rise, each once")

    def _row_of(self, entry: int) -> int:
        return int(torch.searchsorted(self.indptr, entry, right=True)) - 1

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def device(self) -> torch.device:
        """Where the arrays lie."""
        return self.indptr.device
