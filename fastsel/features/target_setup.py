"""What a selection is for: targets, and which of their rows the pool already holds."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastsel.features.leaks import REASON, Leaks, find_leaks
from fastsel.features.targets import Target, open_targets

if TYPE_CHECKING:
    from fastsel.io import Pool


@dataclass(frozen=True)
class TargetSetup:
    """What a selection is for.

    Attributes:
        targets: opened.
        leaks: target rows in the pool.
        drop_leaks: whether the pool rows that hold them are left out.
    """

    targets: list[Target]
    leaks: Leaks
    drop_leaks: bool

    def kept_out(self, n: int) -> NDArray[np.bool_]:
        """Bool [n]: pool rows that are not eligible."""
        return self.leaks.mask(n) & self.drop_leaks

    @property
    def rule(self) -> str | None:
        """Why rows with a score are not eligible; None where all are."""
        return REASON if self.drop_leaks and self.leaks.found else None

    @property
    def record(self) -> dict[str, Any]:
        """For the manifest and the report."""
        return {
            "targets": [target.record for target in self.targets],
            "leaks": self.leaks.record(self.drop_leaks) if self.targets else None,
        }

    @property
    def notes(self) -> list[str]:
        """Lines for the user."""
        return [*(target.note for target in self.targets), self.leaks.note] if self.targets else []


def set_up_targets(
    pool: "Pool", target: Any, *, subtask_column: str | None, leaks: str, drop_leaks: bool, device: str, store: Any,
    progress: str, optional: bool = False,
) -> TargetSetup:  # fmt: skip
    """Open the targets, and look for their rows in the pool, with a warning when some are there.

    Args:
        target, subtask_column: see open_targets.
        leaks, device, progress: see find_leaks.
        drop_leaks: what the warning says becomes of them.
        store: the run's folder, or None.
        optional: no target is needed.

    Raises:
        UsageError, InputError: see open_targets and find_leaks.
    """
    targets = [] if optional and target is None else open_targets(target, subtask_column=subtask_column)
    return with_leaks(pool, targets, leaks, drop_leaks, device=device, store=store, progress=progress)


def with_leaks(
    pool: "Pool", targets: list[Target], leaks: str, drop_leaks: bool, *, store: Any, **options: Any
) -> TargetSetup:
    """The targets and their leaks, with a warning when there are some; see set_up_targets."""
    found = find_leaks(pool, targets, how=leaks if targets else "none", store=store and f"{store}/leaks", **options)
    found.warn(drop_leaks)
    return TargetSetup(targets, found, drop_leaks)
