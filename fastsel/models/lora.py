"""A low-rank adapter trained on a few sequences, there while a block lasts; the model's own weights never move."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastsel.errors import UsageError
from fastsel.models.loading import LoadedModel, require

WARM_UP = 0.03  # share of the steps over which the learning rate rises; it then falls along half a cosine
IGNORED = -100  # what transformers leaves out of the loss
_ROWS_AT_ONCE = 4  # of a step, that go through the model together


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
    require("peft", "training an adapter")
    import peft

    learnt = [(list(ids), first) for ids, first in sequences if len(ids) > max(1, first)]
    if not learnt:
        raise UsageError("there is no answer to train on: the rows drawn have none within max_length")
    model = loaded.model
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            # peft says that it has noticed GPT-2's layers, which keep their weights turned round; transformers, that
            # peft calls what it is about to rename.
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            warnings.filterwarnings("ignore", category=FutureWarning)
            adapter = peft.get_peft_model(model, config)
        try:
            _train(adapter, loaded, learnt, epochs, learning_rate, rows_a_step)
            adapter.eval()
            yield adapter, loaded.tokenizer
        finally:
            adapter.unload()
            if hasattr(model, "peft_config"):
                del model.peft_config
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            model.eval()


def _train(
    adapter: Any, loaded: LoadedModel, sequences: list[tuple[list[int], int]], epochs: int, rate: float, rows: int
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
            n_learnt = sum(len(ids) - max(1, first) for ids, first in of_step)
            for at in range(0, len(of_step), _ROWS_AT_ONCE):
                torch.autograd.backward(_loss(adapter, loaded, of_step[at : at + _ROWS_AT_ONCE], n_learnt))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1


def _loss(adapter: Any, loaded: LoadedModel, batch: list[tuple[list[int], int]], n_learnt: int) -> torch.Tensor:
    """Summed over the learnt tokens of the batch, over those of the whole step."""
    longest = max(len(ids) for ids, _ in batch)
    ids_bt = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask_bt = torch.zeros(len(batch), longest, dtype=torch.int64)
    labels_bt = torch.full((len(batch), longest), IGNORED)
    for row, (ids, first) in enumerate(batch):
        ids_bt[row, : len(ids)] = torch.tensor(ids)
        mask_bt[row, : len(ids)] = 1
        labels_bt[row, max(1, first) : len(ids)] = torch.tensor(ids[max(1, first) :])
    logits = adapter(input_ids=ids_bt.to(loaded.device), attention_mask=mask_bt.to(loaded.device)).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels_bt[:, 1:].flatten().to(loaded.device),
        ignore_index=IGNORED, reduction="sum",
    )  # fmt: skip
    if not bool(torch.isfinite(loss)):
        raise UsageError("the loss of the adapter is not finite; take a lower learning_rate")
    return loss / n_learnt
