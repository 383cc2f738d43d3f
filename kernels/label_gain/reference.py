"""label_gain as its formulas read: one term for each entry of a row, all rows whatever is asked for."""

import torch

from fastsel.kernels.label_gain.label_rows import LabelRows


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

    def information(x: torch.Tensor) -> torch.Tensor:
        return (x + a) ** b if phi == "power" else 1 - torch.exp(-alpha * x)

    def slope(x: torch.Tensor) -> torch.Tensor:
        return b * (x + a) ** (b - 1) if phi == "power" else alpha * torch.exp(-alpha * x)

    row_of_entry = torch.arange(len(label_rows), device=state.device).repeat_interleave(label_rows.indptr.diff())
    x, values = state[label_rows.indices.long()], label_rows.values.double()
    terms = values * slope(x) if rule == "first_order" else information(x + values) - information(x)
    gains_n = torch.zeros(len(label_rows), dtype=torch.float64, device=state.device).index_add_(0, row_of_entry, terms)
    return gains_n if rows is None else gains_n[rows]
