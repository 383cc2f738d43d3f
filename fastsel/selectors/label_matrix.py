"""The label matrix that mig reads: any usual form of sparse rows, spread over a graph of similar labels.

Everything here is arithmetic on compressed rows (indptr, indices, values); no [labels, labels] matrix is made from
embeddings, and no [rows, labels] one from anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.errors import UsageError
from fastsel.selectors.rows import Rows

BLOCK_ENTRIES = 1 << 22  # expanded entries in hand at a time: about 150 MB
BLOCK_LABELS = 1024


@dataclass(frozen=True)
class CompressedRows:
    """A sparse matrix [n, n_columns]: entries indptr[i] : indptr[i + 1] belong to row i, columns rising within a row.

    Attributes:
        indptr: int64 [n + 1].
        indices: int32 [nnz].
        values: float64 or float32 [nnz].
        n_columns: how many columns there are.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    values: NDArray[Any]
    n_columns: int

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, rows: NDArray[np.int64]) -> "CompressedRows":
        """The rows with these numbers, in the order asked."""
        lengths = np.diff(self.indptr)[rows]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        at = np.arange(indptr[-1]) + np.repeat(self.indptr[rows] - indptr[:-1], lengths)
        return replace(self, indptr=indptr, indices=self.indices[at], values=self.values[at])


def read_compressed(matrix: Any, name: str, n_columns: int | None = None) -> tuple[CompressedRows, torch.device]:
    """Read sparse rows in any usual form.

    Args:
        matrix: CompressedRows; (indptr, indices, values or None for ones) of numpy or torch arrays; a scipy sparse
            matrix; a torch sparse tensor; or a dense matrix [n, columns] of numpy (mapped files too) or torch, read in
            blocks.
        name: of the argument, for messages.
        n_columns: how many columns there are, where the form does not say; the largest index + 1 when None.

    Returns:
        The rows, and the device that held them.

    Raises:
        UsageError: none of these forms, or pieces that do not fit together.
    """
    device = torch.device("cpu")
    if isinstance(matrix, CompressedRows):
        return matrix, device
    if isinstance(matrix, torch.Tensor):
        device = matrix.device
        if matrix.layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc):
            entries: torch.Tensor = matrix.detach().to_sparse_coo().coalesce().cpu()  # type: ignore[no-untyped-call]
            indptr = np.zeros(matrix.shape[0] + 1, np.int64)
            np.cumsum(np.bincount(entries.indices()[0].numpy(), minlength=matrix.shape[0]), out=indptr[1:])
            return _from_parts((indptr, entries.indices()[1], entries.values()), name, int(matrix.shape[1])), device
    if hasattr(matrix, "tocsr"):
        csr = matrix.tocsr()
        return _from_parts((csr.indptr, csr.indices, csr.data), name, int(csr.shape[1])), device
    if isinstance(matrix, tuple):
        if len(matrix) != 3:
            raise UsageError(f"{name} as a tuple is (indptr, indices, values), got {len(matrix)} parts")
        device = next((part.device for part in matrix if isinstance(part, torch.Tensor)), device)
        return _from_parts(matrix, name, n_columns), device
    return _from_dense(matrix, name), device


def _from_parts(parts: Sequence[Any], name: str, n_columns: int | None) -> CompressedRows:
    arrays = [part.detach().cpu().numpy() if isinstance(part, torch.Tensor) else part for part in parts]
    indptr, indices = np.asarray(arrays[0]), np.asarray(arrays[1])
    for part, array in (("indptr", indptr), ("indices", indices)):
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise UsageError(f"{name}: {part} must be whole numbers in one row, got {array.dtype} {list(array.shape)}")
    if len(indptr) < 1 or indptr[0] != 0 or indptr[-1] != len(indices) or (indptr[1:] < indptr[:-1]).any():
        raise UsageError(f"{name}: indptr must rise from 0 to {len(indices)}, the number of entries")
    values = np.ones(len(indices)) if arrays[2] is None else np.asarray(arrays[2])
    if values.shape != indices.shape or values.dtype.kind not in "fiub":
        raise UsageError(f"{name}: values must be one number an entry, got {values.dtype} {list(values.shape)}")
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float64)
    most = int(indices.max()) + 1 if len(indices) else 1
    n_columns = most if n_columns is None else n_columns
    if len(indices) and (indices.min() < 0 or most > n_columns):
        wrong = int(((indices < 0) | (indices >= n_columns)).argmax())
        row = int(np.searchsorted(indptr, wrong, side="right")) - 1
        raise UsageError(f"{name}: row {row} has the label {indices[wrong]}; there are {n_columns}")
    rows = CompressedRows(indptr.astype(np.int64, copy=False), indices.astype(np.int32, copy=False), values, n_columns)
    return _with_rising_columns(rows)


def _with_rising_columns(rows: CompressedRows) -> CompressedRows:
    """Equal rows then have equal sums whatever the order in which their entries came."""
    rises = np.ones(len(rows.indices), bool)
    rises[1:] = rows.indices[1:] > rows.indices[:-1]
    rises[rows.indptr[:-1][np.diff(rows.indptr) > 0]] = True
    if rises.all():
        return rows
    order = np.lexsort((rows.indices, np.repeat(np.arange(len(rows)), np.diff(rows.indptr))))
    return replace(rows, indices=rows.indices[order], values=rows.values[order])


def _from_dense(matrix: Any, name: str) -> CompressedRows:
    dense = Rows(matrix, name=name)
    counts, indices, values = [np.zeros(1, np.int64)], [], []
    for start in range(0, dense.n, BLOCK_LABELS):
        block = dense.exact(slice(start, min(dense.n, start + BLOCK_LABELS))).cpu().numpy()
        counts.append(np.count_nonzero(block, axis=1))
        indices.append(np.nonzero(block)[1].astype(np.int32))
        values.append(block[block != 0])
    empty = [np.zeros(0)]
    columns = np.concatenate(indices or empty).astype(np.int32)
    return CompressedRows(np.cumsum(np.concatenate(counts)), columns, np.concatenate(values or empty), dense.d)


def propagation_of_similarity(similarity: Any, threshold: float, propagation: float) -> CompressedRows:
    """How a label's weight spreads, from ready similarities.

    Args:
        similarity: [labels, labels] in any form of read_compressed; similarities >= 0 to others count, to itself > 0.
        threshold: what is below it counts as 0; a label's similarity to itself always counts.
        propagation: what the similarities to other labels are multiplied by.

    Returns:
        P [labels, labels], P[p, q] = weight[p, q] / sum over p of weight[p, q]: row p says which labels receive what.

    Raises:
        UsageError: not square, not finite, or a label without similarity to itself.
    """
    rows, _ = read_compressed(similarity, "similarity")
    if len(rows) != rows.n_columns:
        raise UsageError(f"similarity must be [labels, labels], got [{len(rows)}, {rows.n_columns}]")
    labels = np.repeat(np.arange(len(rows), dtype=np.int32), np.diff(rows.indptr))
    if not np.isfinite(rows.values).all():
        raise UsageError(f"similarity: row {labels[int((~np.isfinite(rows.values)).argmax())]} holds NaN or infinity")
    is_own = labels == rows.indices
    owns = np.zeros(len(rows))
    owns[labels[is_own]] = rows.values[is_own]
    if (owns <= 0).any():
        raise UsageError(f"similarity: label {int((owns <= 0).argmax())} has none to itself")
    counts = is_own | (rows.values >= threshold)
    weights = np.where(is_own, 1.0, propagation) * rows.values
    return _normalised(labels[counts], rows.indices[counts], weights[counts], len(rows))


def propagation_of_embeddings(embeddings: Any, threshold: float, propagation: float) -> CompressedRows:
    """The same from label embeddings [labels, d]: cosines in float64, a label's cosine with itself is 1."""
    vectors = Rows(embeddings, unit=True, name="embeddings")
    whole = vectors.exact(slice(0, vectors.n))
    froms, tos, weights = [], [], []
    for start in range(0, vectors.n, BLOCK_LABELS):
        cosines = (whole[start : start + BLOCK_LABELS] @ whole.T).cpu().numpy()
        own = np.arange(len(cosines))
        cosines[own, own + start] = max(1.0, threshold)
        here, there = np.nonzero(cosines >= threshold)
        is_own = there == here + start
        froms.append((here + start).astype(np.int32))
        tos.append(there.astype(np.int32))
        weights.append(np.where(is_own, 1.0, propagation * cosines[here, there]))
    return _normalised(np.concatenate(froms), np.concatenate(tos), np.concatenate(weights), vectors.n)


def _normalised(
    labels: NDArray[np.int32], receivers: NDArray[np.int32], weights: NDArray[np.float64], n_labels: int
) -> CompressedRows:
    received = np.bincount(receivers, weights, minlength=n_labels)
    indptr = np.zeros(n_labels + 1, np.int64)
    np.cumsum(np.bincount(labels, minlength=n_labels), out=indptr[1:])
    return CompressedRows(indptr, receivers, weights / received[receivers], n_labels)


def propagate(rows: CompressedRows, spread: CompressedRows) -> CompressedRows:
    """rows @ spread in float64: what each label receives from each row.

    Entries of one label are added in the order of the labels that they come from.
    """
    lengths = np.diff(spread.indptr)
    expanded = np.zeros(len(rows.indices) + 1, np.int64)
    np.cumsum(lengths[rows.indices], out=expanded[1:])
    ends = expanded[rows.indptr]  # expanded entries up to each row
    counts, indices, values = [np.zeros(1, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0)]
    start = 0
    while start < len(rows):
        stop = max(start + 1, int(np.searchsorted(ends, ends[start] + BLOCK_ENTRIES, side="right")) - 1)
        first, last = rows.indptr[start], rows.indptr[stop]
        labels = rows.indices[first:last]
        here = lengths[labels]
        at = np.arange(here.sum()) + np.repeat(spread.indptr[labels] - (np.cumsum(here) - here), here)
        row = np.repeat(np.arange(stop - start), np.diff(ends[start : stop + 1]))
        key = row * spread.n_columns + spread.indices[at]
        terms = np.repeat(rows.values[first:last].astype(np.float64), here) * spread.values[at]
        order = np.argsort(key, kind="stable")
        key = key[order]
        begins = np.flatnonzero(np.diff(key, prepend=-1))
        values.append(np.add.reduceat(terms[order], begins) if len(begins) else np.zeros(0))
        row, column = np.divmod(key[begins], spread.n_columns)
        indices.append(column.astype(np.int32))
        counts.append(np.bincount(row, minlength=stop - start))
        start = stop
    return CompressedRows(
        np.cumsum(np.concatenate(counts)), np.concatenate(indices), np.concatenate(values), spread.n_columns
    )
