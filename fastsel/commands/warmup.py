"""`fastsel warmup`: one call of the API from the words of the command line, and what it came to."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsel.commands.catalogue import WARMUP
from fastsel.commands.config import warmup_options
from fastsel.commands.options import OPTIONS, POOL, read_value
from fastsel.errors import UsageError

if TYPE_CHECKING:
    from fastsel.models.checkpoints import Checkpoint


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up came to.

    Attributes:
        folder: of the run.
        checkpoints: by step.
    """

    folder: Path
    checkpoints: "list[Checkpoint]"

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "status": "done",
            "exit_code": 0,
            "command": "warmup",
            "folder": str(self.folder),
            "checkpoints": [
                {"folder": str(c.folder), "step": c.step, "learning_rate": c.learning_rate} for c in self.checkpoints
            ],
        }

    def text(self) -> str:
        """The result for people."""
        lines = [f"{len(self.checkpoints)} checkpoints in {self.folder}"]
        for c in self.checkpoints:
            rate = "" if c.learning_rate is None else f", mean learning rate {c.learning_rate:.4g} since the one before"
            lines.append(f"  {c.folder.name}: step {c.step}{rate}")
        lines.append(f"use them: --checkpoints {shlex.quote(str(self.folder))}")
        return "\n".join(lines)


def warm_up(given: Mapping[str, Any], *, progress: str) -> WarmUp:
    """Train, or go on, or find it done.

    Args:
        given: option -> raw value, only those that were given; `pool` and `output` among them.
        progress: see fastsel.progress.

    Raises:
        UsageError: no pool or no folder was named; a value does not fit; see fastsel.warmup for the rest.
    """
    if not given.get("pool"):
        raise UsageError("which pool? fastsel warmup POOL -o DIR names a file, a folder or a quoted glob")
    if given.get("output") is None:
        raise UsageError("where to write? -o DIR names a folder for the run")
    values = warmup_options() | {
        name: read_value(name, raw, "flags") for name, raw in given.items() if name != "output"
    }
    from fastsel.features.warmup import warmup
    from fastsel.io import open_pool

    paths = values.pop("pool")
    of_pool = {name: values[name] for name in values if OPTIONS[name].group == POOL and values[name] is not None}
    pool = open_pool(paths[0] if len(paths) == 1 else paths, **of_pool, progress=progress)
    training = {name: values[name] for name in (*WARMUP, "seed")}
    training["fraction"] = training.pop("warmup_fraction")
    if list(training["target_modules"]) == ["all-linear"]:
        training["target_modules"] = "all-linear"
    return WarmUp(Path(given["output"]), warmup(pool, output=given["output"], **training, progress=progress))
