"""label_gain in plain torch: the entries of a block of rows are gathered, weighed and summed row by row.

phi or its slope is evaluated once a label; BLOCK_ROWS rows are in hand at a time, so their entries bound the memory.
segment_reduce sums each row's entries in their order: no atomics, the same bits in every block.
"""

import torch

from fastsel.kernels.label_gain.label_rows import LabelRows

BLOCK_ROWS = 65_536


def unsupported(*inputs: object) -> str | None:
    """It takes everything."""
    return None


def compute(
    label_rows: LabelRows,
    state: torch.Tensor,
    rows: torch.Tensor | None,
    rule: str,
    phi: str,
    a: float,
    b: float,
    alpha: float,
) -> torch.Tensor:
    """See api.label_gain."""
    is_exact = rule == "exact"
    if is_exact:
        table_l = _information(state, phi, a, b, alpha)
    elif phi == "power":
        table_l = b * (state + a) ** (b - 1)
    else:
        table_l = alpha * torch.exp(-alpha * state)
    n = len(label_rows) if rows is None else len(rows)
    gains_n = torch.empty(n, dtype=torch.float64, device=label_rows.device)
    for start in range(0, n, BLOCK_ROWS):
        stop = min(n, start + BLOCK_ROWS)
        entries, lengths = _entries(label_rows, rows, start, stop)
        labels, values = label_rows.indices[entries].long(), label_rows.values[entries].double()
        if is_exact:
            terms = _information(state[labels] + values, phi, a, b, alpha) - table_l[labels]
        else:
            terms = values * table_l[labels]
        gains_n[start:stop] = torch.segment_reduce(terms, "sum", lengths=lengths, unsafe=True, initial=0)
    return gains_n


def _information(x: torch.Tensor, phi: str, a: float, b: float, alpha: float) -> torch.Tensor:
    return (x + a) ** b if phi == "power" else 1 - torch.exp(-alpha * x)


def _entries(
    label_rows: LabelRows, rows: torch.Tensor | None, start: int, stop: int
) -> tuple[torch.Tensor | slice, torch.Tensor]:
    """Where the entries of rows start..stop lie, one row after another, and how many each row has."""
    if rows is None:
        bounds = label_rows.indptr[start : stop + 1]
        return slice(int(bounds[0]), int(bounds[-1])), bounds.diff()
    chosen = rows[start:stop]
    first = label_rows.indptr[chosen]
    lengths = label_rows.indptr[chosen + 1] - first
    before = lengths.cumsum(0) - lengths
    total = int(lengths.sum())
    shift = (first - before).repeat_interleave(lengths, output_size=total)
    return shift + torch.arange(total, device=rows.device), lengths
