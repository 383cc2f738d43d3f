"""The contract of label_gain and the table of its implementations."""

import torch

from fastsel.kernels._runtime.checks import check_tensor
from fastsel.kernels._runtime.dispatch import run
from fastsel.kernels.label_gain.label_rows import LabelRows

IMPLEMENTATIONS = {  # tried in this order
    "triton": "fastsel.kernels.label_gain.gpu_triton",
    "native": "fastsel.kernels.label_gain.cpu_native",
    "torch": "fastsel.kernels.label_gain.torch_blocked",
    "reference": "fastsel.kernels.label_gain.reference",
}


def label_gain(
    label_rows: LabelRows,
    state: torch.Tensor,
    rows: torch.Tensor | None = None,
    *,
    rule: str = "first_order",
    phi: str = "power",
    a: float = 1e-6,
    b: float = 0.8,
    alpha: float = 1.0,
    implementation: str = "auto",
) -> torch.Tensor:
    """How much information each row would add to labels that have already received `state`.

        phi(x) = (x + a)^b for "power", 1 - e^(-alpha x) for "exp";   e[i, l]: the value of label l in row i, mostly 0
        first_order: gains[i] = sum_l e[i, l] phi'(state[l])
        exact:       gains[i] = sum_l phi(state[l] + e[i, l]) - phi(state[l])

    Args:
        label_rows: [n, n_labels] sparse, values >= 0; checked when it was made.
        state: [n_labels] float64, same device; what each label has received so far, >= 0 (below -a: NaN).
        rows: [b] int64, same device: the rows to evaluate, any number of times each; None takes all n.
        rule: "first_order" or "exact".
        phi: "power" or "exp".
        a: > 0; b: > 0 and at most 1; read by "power".
        alpha: > 0; read by "exp".
        implementation: "auto", "triton", "native", "torch" or "reference".

    Returns:
        gains [b] (or [n]) float64, whatever the values' dtype; 0 for a row without labels.

    Raises:
        ValueError: shapes, dtypes, devices, row numbers or options do not match the above.
        NoImplementationError: the implementation asked for cannot take these inputs; the message says why.

    Ties and determinism: a row's bits depend on its own entries, their order and the state only, not on the other rows,
        their number or the threads: equal rows have equal gains. torch: its pow rounds by the place in a vector, so
        the last bits may follow the rows beside. Implementations may differ in the last bits.
    Laws: phi is concave: no gain rises when the state rises, up to rounding; an old gain bounds the new from above.
        "exact" takes differences of phi: relative error about 2^-52 phi(state) / gain.
    Cost: 2 flops and one gather an entry, and min(entries, n_labels) evaluations of phi or phi' ("exact": one more for
        each entry); reads 4 bytes and a value an entry, 16 bytes a row; memory 8 n_labels; never [n, n_labels].
    Source: Chen et al., "MIG: Automatic Data Selection for Instruction Tuning by Maximizing Information Gain in
        Semantic Space", Findings of ACL 2025 (arXiv 2504.13835), section 3.3; "first_order" is its gradient.
    """
    if not isinstance(label_rows, LabelRows):
        raise ValueError(f"label_rows must be LabelRows, got {type(label_rows).__name__}")
    check_tensor("state", state, (label_rows.n_labels,), dtypes=(torch.float64,), device=label_rows.device)
    if rows is not None:
        check_tensor("rows", rows, ("b",), dtypes=(torch.int64,), device=label_rows.device)
        if len(rows):
            least, most = torch.aminmax(rows)
            if int(least) < 0 or int(most) >= len(label_rows):
                raise ValueError(f"rows must lie between 0 and {len(label_rows) - 1}, got {int(least)} to {int(most)}")
    if rule not in ("first_order", "exact"):
        raise ValueError(f"rule must be first_order or exact, got {rule!r}")
    if phi not in ("power", "exp"):
        raise ValueError(f"phi must be power or exp, got {phi!r}")
    infinity = float("inf")
    if not (0 < a < infinity and 0 < b <= 1 and 0 < alpha < infinity):
        raise ValueError(f"a and alpha must be positive and finite, b above 0 and at most 1; got {a}, {alpha} and {b}")
    with torch.no_grad():
        gains: torch.Tensor = run(
            IMPLEMENTATIONS, implementation, label_rows, state, rows, rule, phi, float(a), float(b), float(alpha)
        )
    return gains
