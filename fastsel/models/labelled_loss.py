"""The loss of labelled tokens in a padded batch, and how many sequences make one: what training an adapter needs."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch


class WeightedSequence(NamedTuple):
    """Tokens, the positions of those that are learnt (from 1 on), and what each of these counts in the loss."""

    ids: Sequence[int]
    labelled: Sequence[int]
    weight: float


def padded_batches(sequences: Sequence[WeightedSequence], batch_tokens: int) -> Iterator[list[WeightedSequence]]:
    """Batches of at most batch_tokens tokens with their padding, short sequences first; one alone may exceed it."""
    batch: list[WeightedSequence] = []
    for sequence in sorted(sequences, key=lambda sequence: len(sequence.ids)):
        if batch and (len(batch) + 1) * len(sequence.ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def labelled_loss(model: Any, device: torch.device, batch: Sequence[WeightedSequence]) -> torch.Tensor:
    """The weighted sum of -log p over the labelled tokens of a batch: float32 scalar, with gradients.

    Args:
        model: a transformers causal language model, or peft's form of one. Only the columns in which some sequence has
            a label reach its head, where it lets them be named (logits_to_keep).
        device: where it runs.
        batch: sequences; shorter ones are padded at the end.
    """
    longest = max(len(sequence.ids) for sequence in batch)
    ids_bt = torch.zeros(len(batch), longest, dtype=torch.int64)
    weights_bt = torch.zeros(len(batch), longest)  # of the token that a column predicts
    for row, sequence in enumerate(batch):
        ids_bt[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        weights_bt[row, torch.tensor(sequence.labelled) - 1] = sequence.weight
    columns = torch.nonzero(weights_bt.any(0))[:, 0]
    takes = inspect.signature(_inner(model).forward).parameters
    some = {"logits_to_keep": columns.to(device), "use_cache": False}
    # Without a mask: a causal model does not look at padding that comes after its tokens.
    logits = model(input_ids=ids_bt.to(device), **{name: some[name] for name in some if name in takes}).logits
    if "logits_to_keep" not in takes:
        logits = logits[:, columns.to(device)]
    kept = weights_bt[:, columns]
    rows, places = torch.nonzero(kept, as_tuple=True)
    predicted = logits[rows.to(device), places.to(device)].float()
    targets = ids_bt[rows, columns[places] + 1].to(device)
    losses = torch.nn.functional.cross_entropy(predicted, targets, reduction="none")
    return torch.dot(losses, kept[rows, places].to(device))


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
