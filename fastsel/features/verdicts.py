"""What a pass of a model found out about each pool row: whether it can be used, whether it was cut, and why not."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastsel.features.answer_tokens import FITS, REASONS, WITH_SCORE
from fastsel.io.examples import OK, SKIPPED, TRUNCATED
from fastsel.io.row_reasons import RowReasons

if TYPE_CHECKING:
    from fastsel.io import Pool


def verdicts(
    pool: "Pool", why: NDArray[Any], max_length: int
) -> tuple[NDArray[np.bool_], NDArray[np.uint8], RowReasons]:
    """(usable rows, status of each row, why rows are not ok), all over the pool.

    Args:
        pool: the rows, with a status of their own, which stays where it is not ok.
        why: [n] positions in answer_tokens.REASONS.
        max_length: for the reasons' texts.
    """
    in_pool = pool.status == OK
    has = in_pool & np.isin(why, WITH_SCORE)
    status = np.array(pool.status, dtype=np.uint8)
    status[in_pool & (why != FITS)] = SKIPPED
    status[has & (why != FITS)] = TRUNCATED
    texts = [text and text.format(max_length=max_length) for text in REASONS]
    return has, status, RowReasons(pool, np.where(in_pool, why, FITS), texts)
