"""label_gain as its formulas read: the dense matrix of label values."""

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

    values_nl = torch.zeros(len(label_rows), label_rows.n_labels, dtype=torch.float64, device=label_rows.device)
    row_of_entry = torch.arange(len(label_rows), device=label_rows.device).repeat_interleave(label_rows.indptr.diff())
    values_nl[row_of_entry, label_rows.indices.long()] = label_rows.values.double()
    if rows is not None:
        values_nl = values_nl[rows]
    if rule == "first_order":
        return (values_nl * slope(state)).sum(1)
    return (information(state + values_nl) - information(state)).sum(1)
