"""Maximum information gain over sparse labels: the exact greedy choice of MIG, lazily evaluated."""

import logging
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastsel.errors import UsageError
from fastsel.kernels.label_gain import LabelRows, label_gain
from fastsel.selectors.label_matrix import (
    CompressedRows,
    propagate,
    propagation_of_embeddings,
    propagation_of_similarity,
    read_compressed,
)
from fastsel.selectors.rows import check_k, check_rows, check_values

TIE = 1e-9  # relative: gains nearer to the best than this are equal, and the lowest row wins
LEAST_FRONT = 64
FRONT_ROWS = 2.0  # a front holds this many times the square root of n: renewing it costs n, evaluating it its size
logger = logging.getLogger("fastsel")


def mig(
    labels: Any,
    k: int,
    *,
    quality: ArrayLike | None = None,
    similarity: Any = None,
    embeddings: Any = None,
    threshold: float = 0.9,
    propagation: float = 1.0,
    gain: str = "first_order",
    phi: str = "power",
    a: float = 1e-6,
    b: float = 0.8,
    alpha: float = 1.0,
    initial: ArrayLike | None = None,
    implementation: str = "auto",
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Choose k rows one after another, each the one that adds most information to what the labels have received.

        e[i, q] = quality[i] * sum_p labels[i, p] P[p, q];    x = sum of e[i] over the chosen rows
        P[p, q] = w[p, q] / sum_p w[p, q];   w = similarity, 0 below the threshold, times propagation where p != q
        gain of a row i = sum_q e[i, q] phi'(x[q])  (first_order)   or   sum_q phi(x[q] + e[i, q]) - phi(x[q])  (exact)
        phi(x) = (x + a)^b  (power)   or   1 - e^(-alpha x)  (exp)

    The choice is that of evaluating every row at every step. No gain ever rises, so an old one bounds the new one from
    above, and only a front of rows with the highest bounds is evaluated (about 2 sqrt(n) of them a step).

    Args:
        labels: [n, labels] numbers >= 0, how much of each label a row carries (1 for a tag): (indptr, indices, values),
            a scipy or torch sparse matrix, or a dense matrix; no label twice in a row. values may be None for ones.
        k: how many rows to choose; all when there are fewer.
        quality: [n] numbers >= 0 that rows are multiplied by; ones when None.
        similarity: [labels, labels] ready similarities >= 0, dense or sparse; or
        embeddings: [labels, d], whose cosines they are. With neither, no label receives from another.
        threshold: least similarity that counts, >= 0.
        propagation: weight of similar labels beside the label itself, >= 0; 0 switches it off.
        gain: "first_order" (the authors') or "exact".
        phi, a, b, alpha: the curve; b at most 1.
        initial: row numbers already chosen, in their order; they count and are not returned.
        implementation: of label_gain.

    Returns:
        indices int64 [k] and their gains float64 [k], when they were chosen. Gains within 1e-9 (relative) of the best
        are equal, and the lowest row is taken; the first j indices are the selection for j.

    Raises:
        UsageError: values that are negative or not finite (the row is named), shapes or options that do not fit.

    Fails when labels are noise: rare misspelt tags look like new information (a valid-tag list, see the method).
    Source: Chen et al., MIG, Findings of ACL 2025 (arXiv 2504.13835); first order and constants as in their code
        (yichengchen24/MIG@969eb53). The receiver of a label's weight is what normalises it, as there.
    """
    n_labels = None
    spread: CompressedRows | None = None
    if similarity is not None and embeddings is not None:
        raise UsageError("similarity and embeddings both say which labels are alike: give one of them")
    if not (threshold >= 0 and 0 <= propagation < float("inf")):
        raise UsageError(f"threshold={threshold} and propagation={propagation} must not be negative")
    if similarity is not None:
        spread = propagation_of_similarity(similarity, threshold, propagation)
    elif embeddings is not None:
        spread = propagation_of_embeddings(embeddings, threshold, propagation)
    n_labels = None if spread is None else spread.n_columns
    rows, device = read_compressed(labels, "labels", n_labels)
    if spread is not None and rows.n_columns != spread.n_columns:
        raise UsageError(f"labels has {rows.n_columns} labels, their similarities are those of {spread.n_columns}")
    n = len(rows)
    k, chosen = check_k(k, n), check_rows(initial, n, "initial")
    _check_entries(rows)
    if quality is not None:
        weights = check_values(quality, n, "quality", least=0.0)
        rows = replace(rows, values=rows.values * np.repeat(weights, np.diff(rows.indptr)))
    if spread is not None:
        rows = propagate(rows, spread)
    options: dict[str, Any] = {
        "rule": gain,
        "phi": phi,
        "a": a,
        "b": b,
        "alpha": alpha,
        "implementation": implementation,
    }
    try:
        label_rows = _on(rows, device)
        nothing = torch.zeros(label_rows.n_labels, dtype=torch.float64, device=device)
        label_gain(label_rows, nothing, nothing[:0].long(), **options)  # the kernel's checks of the options
    except ValueError as error:
        raise UsageError(str(error)) from None
    return _greedy(label_rows, min(k, n - len(chosen)), chosen, options)


def _check_entries(rows: CompressedRows) -> None:
    is_bad = ~((rows.values >= 0) & (rows.values < np.inf))
    if is_bad.any():
        entry = int(is_bad.argmax())
        row = int(np.searchsorted(rows.indptr, entry, side="right")) - 1
        raise UsageError(f"labels: row {row} holds {rows.values[entry]}, which is not a finite number of at least 0")


def _on(rows: CompressedRows, device: torch.device) -> LabelRows:
    def moved(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.require(array, requirements="W")).to(device)

    return LabelRows(moved(rows.indptr), moved(rows.indices), moved(rows.values), rows.n_columns)


class _Front(NamedTuple):
    """The rows with the highest bounds, rising, and what is known of the others.

    rows: int64 [m].
    ceiling: the highest bound outside; -inf where nothing is.
    rival: the lowest row outside whose bound ties with the ceiling.
    """

    rows: torch.Tensor
    ceiling: float
    rival: int


def _greedy(
    label_rows: LabelRows, k: int, initial: NDArray[np.int64], options: dict[str, Any]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    n = len(label_rows)
    state = torch.zeros(label_rows.n_labels, dtype=torch.float64, device=label_rows.device)
    offsets = label_rows.indptr.cpu().numpy()

    def gains_of(rows: torch.Tensor | None) -> torch.Tensor:
        return label_gain(label_rows, state, rows, **options)

    def add(row: int) -> None:
        entries = slice(int(offsets[row]), int(offsets[row + 1]))
        state.index_add_(0, label_rows.indices[entries], label_rows.values[entries].double())

    for row in initial.tolist():
        add(row)
    bounds = gains_of(None)
    bounds[torch.from_numpy(initial).to(bounds.device)] = -torch.inf
    base = max(LEAST_FRONT, int(FRONT_ROWS * n**0.5))
    indices, gains = np.zeros(k, np.int64), np.zeros(k)
    taken, size, fronts, evaluations = 0, base, 0, n
    while taken < k:
        front = _front(bounds, size)
        rows = front.rows.cpu().numpy()
        is_taken = np.zeros(len(rows), bool)
        fronts, size = fronts + 1, 2 * size  # without a pick from this one the next is larger, and ends as all rows
        while taken < k:
            fresh = gains_of(front.rows).cpu().numpy()
            fresh[is_taken] = -np.inf
            evaluations += len(rows)
            best = float(fresh.max())
            nearly = best * (1 - TIE)
            place = int((fresh >= nearly).argmax())  # rows rise: the first is the lowest
            if front.ceiling > best or (front.ceiling >= nearly and front.rival < rows[place]):
                break
            indices[taken], gains[taken] = rows[place], fresh[place]
            is_taken[place], size = True, base
            add(int(rows[place]))
            taken += 1
        bounds[front.rows] = torch.from_numpy(fresh).to(bounds.device)
    logger.debug("mig: %d gains for %d picks of %d rows, %d fronts", evaluations, k, n, fronts)
    return indices, gains


def _front(bounds: torch.Tensor, size: int) -> _Front:
    n = len(bounds)
    # The best bound that finds no room; what ties with it is taken from the lowest row on.
    ceiling = float(bounds.topk(size + 1).values[-1]) if size < n else -np.inf
    above = (bounds > ceiling).nonzero()[:, 0]
    if ceiling == -np.inf:
        return _Front(above, ceiling, n)
    tied = (bounds == ceiling).nonzero()[: size - len(above), 0]
    rows = torch.cat([above, tied]).sort().values
    is_rival = bounds >= ceiling * (1 - TIE)
    is_rival[rows] = False
    return _Front(rows, ceiling, int(is_rival.nonzero()[0, 0]))
