"""DataInf: the influence of training rows on a target's loss, in closed form, layer by layer, from their gradients."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastsel.budget import rank_rows
from fastsel.errors import UsageError
from fastsel.selectors.rows import BLOCK_VALUES, Rows, check_k, check_rows

Blocks = Callable[[], Iterable[ArrayLike]]
Columns = Mapping[str, tuple[int, int]]


def data_influence(
    train: Any,
    target: Any,
    k: int,
    *,
    columns: Columns | None = None,
    layers: Sequence[str] | None = None,
    damping: float = 0.1,
    initial: ArrayLike | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k rows whose influence lowers the target's loss most; see influences.

    Args:
        train, target, columns, layers, damping: see influences.
        k: how many, at least 0; more than there are takes all.
        initial: row numbers already chosen: they are not chosen again, and count among the training rows all the same.

    Returns:
        indices int64 [k], and gains float64 [k]: minus their influences, largest first. Ties go to the lowest row. The
        first j of k are the choice of j.

    Raises:
        UsageError: an argument is not as above, or a row holds NaN or infinity (it is named).
    """
    values = -influences(train, target, columns=columns, layers=layers, damping=damping)
    before = check_rows(initial, len(values), "initial")
    is_new = np.ones(len(values), bool)
    is_new[before] = False
    indices = rank_rows(values, is_new, largest=True)[: check_k(k, int(is_new.sum()))]
    return indices, values[indices]


def influences(
    train: Any,
    target: Any,
    *,
    columns: Columns | None = None,
    layers: Sequence[str] | None = None,
    damping: float = 0.1,
    each: bool = False,
) -> NDArray[np.float64]:
    """What training on a row does to the target's loss, to first order; negative where it falls.

        lambda_l = damping * mean over rows and entries of g_l^2
        h_l      = mean_i (v_l - <v_l, g_il> / (lambda_l + |g_il|^2) g_il) / lambda_l
        I_k      = - sum over layers l of <h_l, g_kl>

    Args:
        train: [n, p] gradients of the training rows: numpy, mapped from a file, or torch; or a function that returns
            them in blocks of rows, from the first to the last, each time it is called (three times), so that they need
            lie nowhere as a whole.
        target: [m, p] gradients of the target rows; v is their mean.
        columns: layer -> (first column, end); the whole width is one layer when None. In DataInf each LoRA matrix is a
            layer of its own.
        layers: those that count; all when None.
        damping: above 0; the authors' lambda_const_param is its inverse, 10.
        each: an influence on every target row instead: [m, n]. Their mean is the influence on the mean.

    Returns:
        Float64 [n]. A layer whose training gradients are all 0 adds nothing.

    Raises:
        UsageError: shapes, columns, a name or damping are not as above, or a row holds NaN or infinity.

    Determinism: sums run over one row after another in float64, on one thread: the same bits from the same blocks.
    Cost: three passes over train, 6 n p (m + 1) flops (m = 1 for the mean); memory 3 (m + 1) p numbers and a block.
        The first pass needs |g_il|^2 and <v_l, g_il>, the second adds up w_il g_il with w_il = <v_l, g_il> /
        (n (lambda_l + |g_il|^2)) to r_l, the third needs <r_l, g_il>: I_i = - sum_l (<v_l, g_il> - <r_l, g_il>) /
        lambda_l. An engine that gives these never has to write a gradient down.
    Source: DataInf, ICLR 2024 (arXiv 2310.00902), equation 5; the authors' IFEngine, ykwon0407/DataInf@fe9145a.
    """
    if not 0 < damping < np.inf:
        raise UsageError(f"damping must be a number above 0, got {damping}")
    wanted = Rows(target, name="target")
    if wanted.n == 0:
        raise UsageError("target has no rows")
    v = wanted.exact(slice(0, wanted.n)).cpu().numpy()
    if not each:
        v = v.mean(0, keepdims=True)
    spans = _spans(columns, layers, wanted.d)
    blocks = train if callable(train) else _blocks_of(train)

    passes = InfluencePasses(spans, v)

    def parts() -> Iterator[tuple[int, NDArray[Any]]]:
        start = 0
        for given in blocks():
            block = np.asarray(given.detach().cpu() if isinstance(given, torch.Tensor) else given)
            if block.ndim != 2 or block.shape[1] != wanted.d:
                raise UsageError(f"train has blocks {list(block.shape)}, the target has {wanted.d} columns")
            yield start, block
            start += len(block)

    square_parts, dot_parts = [], []
    for start, block in parts():
        of_block, dots = passes.products(block)
        _refuse(start, block, of_block)
        square_parts.append(of_block)
        dot_parts.append(dots)
    if not square_parts or not sum(map(len, square_parts)):
        return np.zeros((wanted.n, 0) if each else 0)
    squares, dots = np.concatenate(square_parts), np.concatenate(dot_parts)
    weights, inverse = passes.weights(squares, dots, damping)
    sums = np.zeros_like(v)
    for start, block in parts():
        passes.add(sums, block, weights[start : start + len(block)])
    found = np.concatenate(
        [passes.values(block, dots[start : start + len(block)], sums, inverse) for start, block in parts()]
    )
    per_row: NDArray[np.float64] = found.T.copy() if each else found[:, 0].copy()
    return per_row


@dataclass(frozen=True)
class InfluencePasses:
    """What the three passes do with a block of training gradients [b, p]; in float64, one row after another.

    Attributes:
        spans: (name, first column, end) of each layer.
        v: float64 [m, p], what influences are on.
    """

    spans: list[tuple[str, int, int]]
    v: NDArray[np.float64]

    def products(self, block: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """|g_il|^2 [b, layers], and <v_l, g_il> [b, layers, m]."""
        parts = self._parts(block)
        squares = [np.einsum("bp,bp->b", g, g) for g, _, _ in parts]
        return np.stack(squares, 1), np.stack([np.einsum("bp,mp->bm", g, self.v[:, a:b]) for g, a, b in parts], 1)

    def weights(
        self, squares: NDArray[np.float64], dots: NDArray[np.float64], damping: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """w_il [n, layers, m] from the products of all rows, and 1 / lambda_l [layers], 0 where all gradients are."""
        damp = damping * squares.mean(0) / np.array([end - first for _, first, end in self.spans])
        inverse = np.divide(1.0, damp, out=np.zeros_like(damp), where=damp > 0)
        below = damp + squares
        weights = np.divide(
            dots, len(squares) * below[:, :, None], out=np.zeros_like(dots), where=below[:, :, None] > 0
        )
        return weights, inverse

    def add(self, sums: NDArray[np.float64], block: NDArray[Any], weights: NDArray[np.float64]) -> None:
        """Add the block's w_il g_il to r [m, p]."""
        for i, (g, a, b) in enumerate(self._parts(block)):
            sums[:, a:b] += np.einsum("bm,bp->mp", weights[:, i], g)

    def values(
        self, block: NDArray[Any], dots: NDArray[np.float64], sums: NDArray[np.float64], inverse: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """I_i [b, m]."""
        found = np.zeros((len(block), len(self.v)))
        for i, (g, a, b) in enumerate(self._parts(block)):
            found -= (dots[:, i] - np.einsum("bp,mp->bm", g, sums[:, a:b])) * inverse[i]
        return found

    def _parts(self, block: NDArray[Any]) -> list[tuple[NDArray[np.float64], int, int]]:
        return [(block[:, first:end].astype(np.float64), first, end) for _, first, end in self.spans]


def _blocks_of(train: Any) -> Blocks:
    """Blocks of a matrix, checked."""
    rows = Rows(train, name="train")
    size = max(1, BLOCK_VALUES // rows.d)
    return lambda: (rows.given[start : start + size].double() for start in range(0, rows.n, size))


def _spans(columns: Columns | None, layers: Sequence[str] | None, width: int) -> list[tuple[str, int, int]]:
    if columns is None:
        if layers is not None:
            raise UsageError("layers= names layers of columns=, which is missing")
        return [("all", 0, width)]
    names = list(columns) if layers is None else list(layers)
    unknown = [name for name in names if name not in columns]
    if unknown:
        raise UsageError(f"there is no layer {unknown[0]}; the layers are: {', '.join(columns)}")
    if not names or len(set(names)) < len(names):
        raise UsageError("layers must name at least one layer, and none twice")
    spans = [(name, *columns[name]) for name in names]
    for name, first, end in spans:
        if not 0 <= first < end <= width:
            raise UsageError(f"layer {name} has columns {first} to {end}, the gradients have {width}")
    return spans


def _refuse(start: int, block: NDArray[Any], squares: NDArray[np.float64]) -> None:
    """Name the first row of a block that is not finite."""
    is_bad = ~np.isfinite(squares).all(axis=1)
    if is_bad.any():
        row = int(is_bad.argmax())
        is_finite = bool(np.isfinite(block[row]).all())
        raise UsageError(
            f"train: row {start + row} " + ("is too long for float64" if is_finite else "holds NaN or infinity")
        )
