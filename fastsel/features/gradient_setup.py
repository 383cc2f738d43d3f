"""What methods on gradients begin with: a model, the checkpoints of a LoRA run of it, and how rows are written."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastsel.features.influence import checkpoints_for
from fastsel.features.token_stats import window_of
from fastsel.features.warmup import warmup
from fastsel.io.templates import Template, load_template
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
    """

    base: LoadedModel
    run: list[Checkpoint]
    template: Template
    target_template: Template
    max_length: int


def set_up(
    pool: "Pool", *, model: Any, checkpoints: Any, warmup_fraction: float, epochs: int, lora_r: int,
    learning_rate: float, template: Any, max_length: int | None, official: bool, device: str, dtype: str, seed: int,
    store: Any, progress: str,
) -> GradientSetup:  # fmt: skip
    """Load the model, and find the checkpoints or make them.

    Args:
        pool: what a warm-up draws from.
        model, device, dtype: see load_model.
        checkpoints: folders of a LoRA run of the model (see open_checkpoints); None warms up, on warmup_fraction of the
            pool, for that many epochs with lora_r and learning_rate (see fastsel.warmup).
        template: see load_template, of both; official writes target rows without an end of text, as LESS does.
        max_length: None takes 2,048 tokens, or what the model can take.
        seed, store, progress: of the warm-up.

    Raises:
        UsageError, InputError: the model or the checkpoints cannot be used.
    """
    base = load_model(model, device=device, dtype=dtype)
    length = window_of(base, max_length, papers=2048)
    prompts = load_template(template, base.tokenizer)
    asked = load_template("less_target", base.tokenizer) if official else prompts
    warm_up = partial(
        warmup, pool, model=base, fraction=warmup_fraction, epochs=epochs, lora_r=lora_r, learning_rate=learning_rate,
        template=prompts, max_length=length, official=official, seed=seed, progress=progress,
    )  # fmt: skip
    return GradientSetup(base, checkpoints_for(checkpoints, store=store, warm_up=warm_up), prompts, asked, length)
