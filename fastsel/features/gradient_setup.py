"""What methods on gradients begin with: targets and their leaks, a model, checkpoints of a LoRA run of it, templates.

In this order: targets, checkpoints and model are opened before anything is computed, so that what cannot be used is
said at once; then leaks are looked for, then the model is warmed up if no checkpoints were given.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsel.errors import FastselWarning, InputError, UsageError
from fastsel.features.influence import given_checkpoints, warmed_up
from fastsel.features.target_setup import TargetSetup, with_leaks
from fastsel.features.targets import Target, open_targets
from fastsel.features.token_stats import window_of
from fastsel.features.warmup import warmup
from fastsel.io.templates import Template, load_template
from fastsel.models.adam_state import find_optimizer
from fastsel.models.checkpoints import Checkpoint
from fastsel.models.loading import LoadedModel, load_model

if TYPE_CHECKING:
    from fastsel.io import Pool


@dataclass(frozen=True)
class GradientSetup:
    """Ready to take gradients.

    Attributes:
        base: the model without an adapter.
        run: checkpoints, by step.
        template: of pool rows.
        target_template: of target rows.
        max_length: of both, in tokens.
        sought: targets and leaks.
    """

    base: LoadedModel
    run: list[Checkpoint]
    template: Template
    target_template: Template
    max_length: int
    sought: TargetSetup

    def record(self, uses: Mapping[int, str], targets: Sequence[Target] | None = None) -> dict[str, Any]:
        """For the manifest and the report: the base, each checkpoint and what it was used for, by its step; and the
        targets, which may have lost rows without a gradient since they were opened.
        """
        return {
            "base": {"name": self.base.name, "revision": self.base.revision},
            "checkpoints": [
                {"folder": str(c.folder), "step": c.step, "learning_rate": c.learning_rate, "used": uses.get(c.step)}
                for c in self.run
            ],
            **(self.sought if targets is None else replace(self.sought, targets=list(targets))).record,
        }

    def note(self, uses: Mapping[int, str]) -> str:
        """The same in a line for the user."""
        used = ", ".join(f"{c.step} ({uses[c.step]})" for c in self.run if c.step in uses)
        return f"checkpoints in {self.run[-1].folder.parent}, by step: {used}"


def set_up(
    pool: "Pool", *, target: Any, subtask_column: str | None, leaks: str, drop_leaks: bool, model: Any,
    checkpoints: Any, warmup_fraction: float, epochs: int, lora_r: int, learning_rate: float, template: Any,
    max_length: int | None, device: str, dtype: str, seed: int, store: Any, progress: str, official: bool = False,
    one_target: str | None = None, base_dtype: str | None = None, needs_adam: bool = True,
) -> GradientSetup:  # fmt: skip
    """Open what is named, look for leaks, and warm up if no checkpoints are named.

    Args:
        pool: what leaks are looked for in, and what a warm-up draws from.
        target, subtask_column, leaks, drop_leaks: see set_up_targets; a target is needed.
        model, device, dtype: see base_model.
        checkpoints: folders of a LoRA run of the model (see open_checkpoints); None warms up, on warmup_fraction of the
            pool, for that many epochs with lora_r and learning_rate (see fastsel.warmup).
        template: see load_template, of both; official writes target rows without an end of text, as LESS does.
        max_length: None takes 2,048 tokens, or what the model can take.
        seed, store, progress: of the warm-up.
        base_dtype: of the model whose gradients are taken, where another one than the warm-up's; None takes dtype.
        needs_adam: every checkpoint must have the optimizer's state; looked for before anything is computed.
        one_target: the method that can serve only one, for the message.

    Raises:
        UsageError, InputError: the targets, the model or the checkpoints cannot be used.
    """
    targets = open_targets(target, subtask_column=subtask_column)
    if one_target is not None and len(targets) > 1:
        raise UsageError(f"{one_target} chooses for one target; put several into one file, with --subtask-column")
    run = given_checkpoints(checkpoints)
    for checkpoint in run or [] if needs_adam else []:
        find_optimizer(checkpoint.folder)
    own_dtype = dtype if base_dtype is None else base_dtype
    base = base_model(model, run, device=device, dtype=own_dtype)
    length = window_of(base, max_length, papers=2048)
    prompts = load_template(template, base.tokenizer)
    asked = load_template("less_target", base.tokenizer) if official else prompts
    sought = with_leaks(pool, targets, leaks, drop_leaks, device=device, store=store, progress=progress)
    if run is None:
        run = warmed_up(partial(
            warmup, pool, model=base if own_dtype == dtype else model or "bundled", fraction=warmup_fraction,
            epochs=epochs, lora_r=lora_r, learning_rate=learning_rate, template=prompts, max_length=length,
            official=official, device=device, dtype=dtype, seed=seed, progress=progress,
        ), store)  # fmt: skip
    return GradientSetup(base, run, prompts, asked, length, sought)


def base_model(
    model: Any, run: Sequence[Checkpoint] | None, *, device: str = "auto", dtype: str = "auto"
) -> LoadedModel:
    """The model that the checkpoints were trained on.

    Args:
        model: see load_model; None takes the one that the checkpoints name, or "bundled" where there are none.
        run: checkpoints, if there are some.
        device, dtype: see load_model.

    Raises:
        InputError: it cannot be loaded; what to name is said.

    Warns:
        FastselWarning: the checkpoints name another model than this one. Where its layers have the same shapes nothing
            else would tell.
    """
    trained_on = run[-1].base if run else None
    if model is None and run:
        folder = run[-1].folder
        if trained_on is None:
            raise InputError(f"{folder} does not say what it was trained on: --model (model=) names it")
        try:
            return load_model(trained_on, device=device, dtype=dtype)
        except InputError as error:
            raise InputError(
                f"{folder} was trained on {trained_on}, which cannot be loaded: {error}\n"
                "--model (model=) says where it is"
            ) from error
    base = load_model("bundled" if model is None else model, device=device, dtype=dtype)
    named = (base.origin or {}).get("model")
    if run and named and trained_on and not _may_be_the_same(str(named), trained_on):
        warnings.warn(
            f"{run[-1].folder} was trained on {trained_on}, and gradients are taken with {base.name}: with another "
            "base they mean nothing. Leave --model (model=) out to take the first",
            FastselWarning,
            stacklevel=3,
        )
    return base


def _may_be_the_same(named: str, trained_on: str) -> bool:
    """Whether two names of models may be of one: the same folder, or the same last part of a path or a hub id."""
    if Path(trained_on).exists() and Path(named).exists():
        return Path(trained_on).resolve() == Path(named).resolve() or Path(trained_on).name == Path(named).name
    is_a_name = "/" in trained_on or trained_on == "bundled"  # of a class, where a model had no name
    return not is_a_name or Path(trained_on).name == Path(named).name
