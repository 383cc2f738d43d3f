"""A low-rank adapter trained on a few sequences, there while a block lasts; the model's own weights never move."""

import math
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fastsel.errors import InputError, UsageError
from fastsel.models.labelled_loss import WeightedSequence, labelled_loss, padded_batches
from fastsel.models.loading import LoadedModel, require

WARM_UP = 0.03  # share of the steps over which the learning rate rises; it then falls along half a cosine
_BATCH_TOKENS = 2048  # that go through the model together


@contextmanager
def adapted(
    loaded: LoadedModel,
    sequences: Sequence[tuple[Sequence[int], int]],
    *,
    rank: int = 8,
    epochs: int = 3,
    learning_rate: float = 2e-4,
    rows_a_step: int = 16,
    seed: int = 0,
) -> Iterator[tuple[Any, Any]]:
    """The model with an adapter trained on sequences, as a (model, tokenizer) pair; gone when the block ends.

    Args:
        loaded: the model; its parameters, gradients' flags and mode are afterwards what they were.
        sequences: token ids, and how many of them come before the first that is learnt.
        rank: of the adapter, on every linear layer but the head; scaled by 2, no dropout.
        epochs: how often each sequence is seen, in an order drawn with the seed.
        learning_rate: the highest, of AdamW without weight decay.
        rows_a_step: sequences a step.
        seed: of the adapter's start and of the orders.

    Raises:
        MissingExtraError: peft is missing.
        UsageError: nothing is to be learnt, or the loss is not finite: the learning rate is too high.
    """
    learnt = [(list(ids), range(max(1, first), len(ids))) for ids, first in sequences if len(ids) > max(1, first)]
    if not learnt:
        raise UsageError("there is no answer to train on: the rows drawn have none within max_length")
    with new_adapter(loaded, seed, r=rank, lora_alpha=2 * rank, target_modules="all-linear") as adapter:
        _train(adapter, loaded, learnt, epochs, learning_rate, rows_a_step)
        adapter.eval()
        yield adapter, loaded.tokenizer


@contextmanager
def new_adapter(loaded: LoadedModel, seed: int, **lora: Any) -> Iterator[Any]:
    """A fresh LoRA adapter on a model, as a peft model with gradients on; taken out again when the block ends.

    Args:
        loaded: the model; its parameters, gradients' flags and mode are afterwards what they were, and so are the
            random generators of torch, numpy and Python.
        seed: of torch's generator inside the block, from which the adapter starts.
        lora: of peft's LoraConfig.

    Raises:
        MissingExtraError: peft is missing.
        InputError: the model has none of the modules.
    """
    require("peft", "training an adapter")
    import peft

    model = loaded.model
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            # peft says that it has noticed GPT-2's layers, which keep their weights turned round; transformers, that
            # peft calls what it is about to rename.
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            warnings.filterwarnings("ignore", category=FutureWarning)
            try:
                adapter = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
            except ValueError as error:
                linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if hasattr(m, "weight")})
                raise InputError(
                    f"no adapter can be put on {loaded.name}: {str(error).splitlines()[0]} Its modules are called: "
                    f"{', '.join(linear)}; name some (target_modules), or 'all-linear'"
                ) from error
        try:
            yield adapter
        finally:
            adapter.unload()
            if hasattr(model, "peft_config"):
                del model.peft_config
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            model.eval()
            random.setstate(states[0])
            np.random.set_state(states[1])


def _train(
    adapter: Any, loaded: LoadedModel, sequences: list[tuple[list[int], range]], epochs: int, rate: float, rows: int
) -> None:
    parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    steps = epochs * math.ceil(len(sequences) / rows)
    warm_up = max(1, round(WARM_UP * steps))
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    adapter.train()
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(sequences)).tolist()
        for start in range(0, len(order), rows):
            progress = (step - warm_up) / max(1, steps - warm_up)
            optimizer.param_groups[0]["lr"] = rate * (
                (step + 1) / warm_up if step < warm_up else 0.5 * (1 + math.cos(math.pi * progress))
            )
            optimizer.zero_grad(set_to_none=True)
            of_step = [sequences[i] for i in order[start : start + rows]]
            weight = 1 / sum(len(labelled) for _, labelled in of_step)
            weighted = [WeightedSequence(ids, labelled, weight) for ids, labelled in of_step]
            for batch in padded_batches(weighted, _BATCH_TOKENS):
                torch.autograd.backward(finite(labelled_loss(adapter, loaded.device, batch)))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1


def finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss.

    Raises:
        UsageError: it is not a finite number.
    """
    if not bool(torch.isfinite(loss)):
        raise UsageError("the loss of the adapter is not finite; take a lower learning_rate")
    return loss
