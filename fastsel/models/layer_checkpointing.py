"""Layers that keep only their input for the backward and compute themselves again in it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def layers_computed_twice(model: Any, *, with_dropout: bool, share: float = 1.0) -> Iterator[None]:
    """Inside, the layers of a transformers model keep their inputs only; gradients have the same bits.

    Not by transformers' own switch, which works in training mode alone and has another name in each version.

    Args:
        model: the model, or its body.
        with_dropout: the second time draws what the first did.
        share: of the layers, rounded up, from the lowest on.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    layers = layers[: math.ceil(share * len(layers))]
    own = [(layer, layer.forward) for layer in layers if "forward" not in vars(layer)]
    for layer, forward in own:
        vars(layer)["forward"] = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=with_dropout)
    try:
        yield
    finally:
        for layer, _ in own:
            vars(layer).pop("forward")
