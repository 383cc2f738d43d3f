"""Vectors of target rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsel.features.embeddings import embed_pool
from fastsel.features.targets import Target


@dataclass(frozen=True)
class TargetVectors:
    """Vectors of the rows that have one.

    Attributes:
        matrix: float32 [m, d].
        groups: int64 [m], position in subtasks.
        subtasks: names of all targets' subtasks, one target after another.
        targets: the targets, less the rows without a vector.
    """

    matrix: NDArray[np.float32]
    groups: NDArray[np.int64]
    subtasks: list[str]
    targets: list[Target]


def target_vectors(targets: Sequence[Target], encoder: Any, **options: Any) -> TargetVectors:
    """Embed target rows as the pool's are.

    Args:
        targets: the rows; one without a vector is left out.
        encoder: a loaded one: a matrix has no rows for a target.
        options: text and others of embed_pool.

    Raises:
        InputError: a target is left without a row.
    """
    subtasks: list[str] = []
    matrices, groups, kept = [], [], []
    for target in targets:
        embeddings = embed_pool(target.pool, encoder, progress="none", **options)
        missing = np.setdiff1d(target.rows, embeddings.rows)
        target = target.without({int(row): embeddings.reasons[int(row)] for row in missing})
        matrices.append(embeddings.matrix[np.isin(embeddings.rows, target.rows)])
        groups.append(target.subtask + len(subtasks))
        subtasks += target.subtasks
        kept.append(target)
    return TargetVectors(np.concatenate(matrices), np.concatenate(groups), subtasks, kept)
