"""Examples laid into one packed row, and what LoRA modules saw of them gathered again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastsel.models.lora_modules import LoraModule
from fastsel.models.packed import CannotPackError


class LabelledSequence(NamedTuple):
    """Tokens, and the positions of those that count in the loss (from 1 on, increasing)."""

    ids: Sequence[int]
    labelled: Sequence[int]


class ModuleTokens(NamedTuple):
    """What one LoRA module saw of some examples.

    module: whose x and delta these are.
    x: [t, d_in], the module's input, in the type of A; not to be changed, as delta.
    delta: [t, d_out], the gradient of its output.
    scale: factor of the gradients (see above).
    offsets: int64 [n + 1] on the CPU; the n examples have the rows offsets[i]:offsets[i + 1].
    examples: which of the examples given to run() these n are.
    """

    module: LoraModule
    x: torch.Tensor
    delta: torch.Tensor
    scale: float
    offsets: torch.Tensor
    examples: slice


Consumer = Callable[[ModuleTokens], None]


@dataclass
class LabelledBatch:
    """Examples in one packed row; the last labelled token of a sequence, and what follows it, predicts nothing.

    Behind them may come tokens that belong to no example and have no label.
    """

    token_ids: torch.Tensor  # [t]
    position_ids: torch.Tensor  # [t]
    lengths: list[int]  # of each sequence, fillers among them
    offsets: torch.Tensor  # [n + 1], CPU
    rows: torch.Tensor  # [l], packed rows that predict a labelled token
    targets: torch.Tensor  # [l]
    weights: torch.Tensor  # [l], 1 / number of labelled tokens of the example
    example_of_label: torch.Tensor  # [l], CPU


def lay_out(
    examples: Sequence[Sequence[LabelledSequence]], device: torch.device, loss_scale: float, multiple: int = 1
) -> LabelledBatch:
    """The examples one after another, filled up to a multiple of tokens.

    Weights are loss_scale over the number of an example's labelled tokens. The fillers are sequences of their own, none
    longer than the longest of the examples'.
    """
    ids: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    offsets, rows, targets, weights, owners = [0], [], [], [], []
    for number, example in enumerate(examples):
        n_labelled = sum(len(sequence.labelled) for sequence in example)
        for sequence in example:
            if not len(sequence.labelled):
                continue
            start, stop = len(ids), max(sequence.labelled)
            ids += sequence.ids[:stop]
            positions += range(stop)
            lengths.append(stop)
            rows += [start + position - 1 for position in sequence.labelled]
            targets += [sequence.ids[position] for position in sequence.labelled]
            weights += [loss_scale / n_labelled] * len(sequence.labelled)
            owners += [number] * len(sequence.labelled)
        offsets.append(len(ids))
    while fillers := min(-len(ids) % multiple, max(lengths, default=0)):
        ids += ids[:1] * fillers
        positions += range(fillers)
        lengths.append(fillers)
    where: dict[str, Any] = {"dtype": torch.int64, "device": device}
    return LabelledBatch(
        torch.tensor(ids, **where),
        torch.tensor(positions, **where),
        lengths,
        torch.tensor(offsets, dtype=torch.int64),
        torch.tensor(rows, **where),
        torch.tensor(targets, **where),
        torch.tensor(weights, dtype=torch.float64, device=device),
        torch.tensor(owners, dtype=torch.int64),
    )


class Capture:
    """Hands a module's x and delta on as soon as all of its uses in this batch have reported."""

    def __init__(
        self,
        modules: Sequence[LoraModule],
        consumer: Consumer,
        offsets: torch.Tensor,
        examples: slice,
        loss_scale: float,
        row_counts: list[int],
    ) -> None:
        self._modules, self._consumer, self._offsets, self._examples = modules, consumer, offsets, examples
        self._loss_scale, self._row_counts = loss_scale, row_counts
        self._n_tokens = int(offsets[-1])
        self._uses = [0] * len(modules)
        self._reported: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in modules]
        self._done = [False] * len(modules)
        self.forward_is_over = False

    def on_forward(self, module: LoraModule) -> None:
        """A layer runs; what a checkpoint computes again in the backward is not another use."""
        if not self.forward_is_over:
            self._uses[module.number] += 1

    def hand_over(self, module: LoraModule, x: torch.Tensor, delta: torch.Tensor) -> None:
        """One use of a module reports; what it says of fillers is left out."""
        if len(x) not in self._row_counts:
            raise CannotPackError(f"its layer {module.name} runs over other tokens than the sequence has")
        reported = self._reported[module.number]
        reported.append((x[: self._n_tokens], delta[: self._n_tokens]))
        if len(reported) == self._uses[module.number]:
            self._give(module)

    def finish(self) -> None:
        """Modules that took no part have gradient 0, and the consumer is told that too."""
        for module in self._modules:
            if not self._done[module.number]:
                self._give(module)

    def _give(self, module: LoraModule) -> None:
        self._done[module.number] = True
        pieces = self._reported[module.number]
        self._reported[module.number] = []
        scale = module.scale / self._loss_scale
        if len(pieces) == 1:
            x, delta, offsets = *pieces[0], self._offsets
        elif not pieces:
            x, delta = (
                module.lora_a.new_zeros(0, module.lora_a.shape[1]),
                module.lora_b.new_zeros(0, module.lora_b.shape[0]),
            )
            offsets = torch.zeros_like(self._offsets)
        else:
            x, delta, offsets = self._joined(pieces)
        self._consumer(ModuleTokens(module, x, delta, scale, offsets, self._examples))

    def _joined(
        self, pieces: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Several uses, each over all rows (layers that share matrices) or over one sequence (of a single example)."""
        x, delta = torch.cat([x for x, _ in pieces]), torch.cat([d for _, d in pieces])
        counts = self._offsets.diff()
        if len(counts) == 1:  # any order will do
            return x, delta, torch.tensor([0, len(x)])
        uses = len(pieces)
        owner = torch.arange(len(counts)).repeat_interleave(counts).repeat(uses)
        order = torch.argsort(owner, stable=True).to(x.device)
        if len(owner) != len(x):
            raise CannotPackError("layers that share LoRA matrices run over different tokens")
        return x[order], delta[order], self._offsets * uses
