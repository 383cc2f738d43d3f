"""The loss of labelled tokens in a padded batch, and how many sequences make one: what training an adapter needs."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from fastsel.models.packed import head_parameters

WHOLE_BYTES = 256 << 20  # of logits; a batch with more goes through the head in pieces, twice, and keeps none


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

    Memory: logits of more than WHOLE_BYTES are made in pieces of a quarter of it, and made again for the backward.
    """
    longest = max(len(sequence.ids) for sequence in batch)
    ids_bt = torch.zeros(len(batch), longest, dtype=torch.int64)
    weights_bt = torch.zeros(len(batch), longest)  # of the token that a column predicts
    for row, sequence in enumerate(batch):
        ids_bt[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        weights_bt[row, torch.tensor(sequence.labelled) - 1] = sequence.weight
    columns = torch.nonzero(weights_bt.any(0))[:, 0]
    kept = weights_bt[:, columns]
    rows, places = torch.nonzero(kept, as_tuple=True)
    targets, weights = ids_bt[rows, columns[places] + 1].to(device), kept[rows, places].to(device)
    head = _plain_head(_inner(model))
    in_pieces = head is not None and 4 * head.weight.shape[0] * len(rows) > WHOLE_BYTES
    takes = inspect.signature(_inner(model).forward).parameters
    some = {"logits_to_keep": columns.to(device), "use_cache": False}
    # Without a mask: a causal model does not look at padding that comes after its tokens.
    with _without(head) if head is not None and in_pieces else nullcontext():
        output = model(input_ids=ids_bt.to(device), **{name: some[name] for name in some if name in takes}).logits
    if "logits_to_keep" not in takes:
        output = output[:, columns.to(device)]
    output = output[rows.to(device), places.to(device)]
    if head is None or not in_pieces:
        return torch.dot(_losses(output, targets), weights)
    size = max(1, WHOLE_BYTES // (16 * head.weight.shape[0]))
    total = torch.zeros((), device=device)
    for part in range(0, len(rows), size):
        piece = slice(part, part + size)
        losses = checkpoint(
            _losses_of, output[piece], head, targets[piece], use_reentrant=False, preserve_rng_state=False
        )
        total = total + torch.dot(losses, weights[piece])
    return total


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _losses_of(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    return _losses(torch.nn.functional.linear(hidden, head.weight, head.bias), targets)


def _plain_head(inner: Any) -> torch.nn.Linear | None:
    """The head, where logits are what it returns and nothing else."""
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if type(head) is not torch.nn.Linear:
        return None
    parameters = head_parameters(inner, inner.config.get_text_config())
    return head if parameters.softcap is None and parameters.scale == 1.0 else None


@contextmanager
def _without(head: torch.nn.Linear) -> Iterator[None]:
    """Inside, the model returns what its head would be given."""
    own = vars(head)
    before = {"forward": own["forward"]} if "forward" in own else {}
    own["forward"] = _as_it_is
    try:
        yield
    finally:
        del own["forward"]
        own |= before


def _as_it_is(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
