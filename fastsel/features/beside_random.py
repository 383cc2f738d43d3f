"""How near every row is to a chosen one, beside what a random draw of the same size gives."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.features.embeddings import Embeddings
from fastsel.kernels.topk_similarity import topk_similarity

if TYPE_CHECKING:
    from fastsel.selection import Selection

MOST_ROWS = 10_000  # looked at: the mean is then good to one hundredth of the spread


def note_nearness(selection: "Selection", embeddings: Embeddings) -> None:
    """Add a line to the notes: the cosine of a row with the nearest chosen row, its mean and least, twice.

    Args:
        selection: made from these embeddings.
        embeddings: of the pool.
    """
    looked_at = np.unique(np.linspace(0, len(embeddings.rows) - 1, MOST_ROWS).astype(np.int64))
    words = []
    for chosen in (selection.indices, np.intersect1d(selection.baseline, embeddings.rows)):
        if not len(chosen):
            return
        nearest = _nearest(embeddings.matrix, looked_at, np.searchsorted(embeddings.rows, chosen))
        words.append(f"mean {nearest.mean():.3f}, least {nearest.min():.3f}")
    of = "" if len(looked_at) == len(embeddings.rows) else f" (of {len(looked_at):,} rows)"
    selection.notes.append(f"cosine with the nearest chosen row{of}: {words[0]}; random draw: {words[1]}")


def _nearest(
    matrix: NDArray[np.float32], looked_at: NDArray[np.int64], chosen: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Float32 [m]: the largest cosine of each row looked at with a chosen one."""
    queries, points = _unit(matrix[looked_at]), _unit(matrix[chosen])
    best: NDArray[np.float32] = topk_similarity(queries, points, 1).values[:, 0].cpu().numpy()
    return best


def _unit(vectors: NDArray[np.float32]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(vectors)), dim=1)
