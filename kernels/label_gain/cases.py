"""Named shapes of label_gain: tests, benchmarks and `fastsel doctor --check` read them here."""

from typing import Any, NamedTuple

import torch

from fastsel.kernels.label_gain.label_rows import LabelRows


class Case(NamedTuple):
    """n rows with `entries` labels each on average, of n_labels, and why this shape is here."""

    name: str
    n: int
    n_labels: int
    entries: float
    why: str
    asked: int | None = None  # rows asked for; None for all
    rule: str = "first_order"
    phi: str = "power"
    slow: bool = False


_LIST = [
    Case("one", 1, 1, 1, "the smallest input: one row, one label"),
    Case("tiny", 5, 7, 2, "smaller than any block; rows without labels among them"),
    Case("empty", 0, 8, 2, "no rows at all"),
    Case("unlabelled", 6, 9, 0, "rows, but not one label"),
    Case("odd", 331, 129, 7, "a multiple of nothing", rule="exact"),
    Case("exponential", 301, 97, 11, "the other curve", phi="exp"),
    Case("exponential_exact", 77, 97, 11, "the other curve, exact", phi="exp", rule="exact"),
    Case("few_of_many", 5000, 1000, 12, "what a greedy step asks for: fewer entries than labels", asked=40),
    Case("few_exact", 5000, 1000, 12, "the same, exact", asked=40, rule="exact"),
    Case("long_rows", 40, 700, 300, "rows longer than any block"),
    Case("front", 20_000, 1000, 8, "the selector's step on the case that the benchmark quotes", asked=256),
    Case("pool", 20_000, 1000, 8, "its first step: all rows"),
    Case("tulu3", 939_000, 4531, 20, "all rows of Tulu3 with the paper's labels", slow=True),
]
CASES = {case.name: case for case in _LIST}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> tuple[Any, ...]:
    """(label_rows, state, rows, rule, phi, a, b, alpha): about a third of the labels untouched, as early in a run.

    Drawn on the CPU, so that every device gets the same numbers; values lie between 0 and 10, as scores do.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.poisson(torch.full((case.n,), float(case.entries)), generator=generator).long()
    drawn = torch.randint(0, case.n_labels, (int(wanted.sum()),), generator=generator)
    pairs = torch.unique(torch.arange(case.n).repeat_interleave(wanted) * case.n_labels + drawn)
    row_of_entry, labels = pairs // case.n_labels, (pairs % case.n_labels).int()
    indptr = torch.zeros(case.n + 1, dtype=torch.int64)
    indptr[1:] = torch.bincount(row_of_entry, minlength=case.n).cumsum(0)
    values = 10 * torch.rand(len(pairs), generator=generator, dtype=torch.float64)
    is_touched = torch.rand(case.n_labels, generator=generator) < 0.67
    state = 20 * torch.rand(case.n_labels, generator=generator, dtype=torch.float64) * is_touched
    rows = None if case.asked is None else torch.randint(0, case.n, (case.asked,), generator=generator).to(device)
    label_rows = LabelRows(indptr.to(device), labels.to(device), values.to(device, dtype), case.n_labels)
    return label_rows, state.to(device), rows, case.rule, case.phi, 1e-6, 0.8, 0.5


def cost(case: Case) -> tuple[float, float]:
    """Floating-point operations, and bytes that must move at 4 bytes a value: what the roofline is drawn from."""
    n = case.n if case.asked is None else case.asked
    return 2.0 * n * case.entries, 8.0 * n * case.entries + 24.0 * n + 8.0 * case.n_labels
