"""Per-example gradients of LoRA matrices, as what they are made of: each linear's input x and output gradient delta.

Many examples go through the model in one packed row, nothing padded and nothing shared, each with its own mean loss:

    loss_i = mean over the labelled tokens t of example i of -log p(token t | the tokens before it)

Since examples do not see each other, one backward of their sum gives everyone's delta, and over the tokens of i

    dA_i = scale (delta_i B)^T x_i   [r, d_in]          dB_i = scale delta_i^T (x_i A^T)   [d_out, r]

which is left to a consumer. The adapter is merged into W for both directions, nothing else gets a gradient, and the
backward ends at the lowest LoRA layer.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastsel.errors import FastselWarning, InputError
from fastsel.kernels._runtime.dispatch import recording
from fastsel.kernels._runtime.freed_memory import FreedMemory
from fastsel.models.frozen_linear import ROWS_MULTIPLE, frozen_linears, multiplied_by_onednn
from fastsel.models.gated_mlp import find_gated_mlps, gates_fused
from fastsel.models.layer_checkpointing import layers_computed_twice
from fastsel.models.loading import LoadedModel
from fastsel.models.lora_batch import Capture, Consumer, LabelledBatch, LabelledSequence, ModuleTokens, lay_out
from fastsel.models.lora_modules import LoraLayers, LoraModule
from fastsel.models.loss_gradient import loss_and_gradient
from fastsel.models.packed import CannotPackError, PackedForward, attention_switched
from fastsel.models.segment_attention import ATTENTION_NAME, packed_lengths, segment_attention

__all__ = ["Consumer", "LabelledSequence", "LoraForward", "ModuleTokens"]

# What a forward may keep for its backward; batches that would keep more compute some of their layers twice instead. A
# GPU may keep an eighth of its memory, if that is more.
ACTIVATION_BYTES = 832 << 20
# What the process may grow by before it gives freed memory back; with a tile of logits and what comes between two looks
# it stays below 1.5 GB.
GROWTH_BYTES = 1072 << 20
# Largest relative difference of whole gradients that rounding can make between a packed pass and autograd's.
PROBE_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
# Below what float16 can tell from 0 lie many of the gradients of a mean; the factor is taken out again exactly.
LOSS_SCALE = {torch.float16: 2.0**10}


def activation_bytes(device: torch.device) -> int:
    """What a forward may keep for its backward there."""
    if device.type != "cuda":
        return ACTIVATION_BYTES
    return max(ACTIVATION_BYTES, torch.cuda.get_device_properties(device).total_memory // 8)


class LoraForward:
    """Forward and backward of packed examples through a model with a LoRA adapter.

    When it is made, three short sequences go through it, and their gradients are compared with autograd's through the
    model's own layers. A model that cannot be packed exactly takes its examples one at a time. It says so once.

    Attributes:
        path: "packed" or "one by one".
        reason: why the path is not packed, or None.
        modules: the adapter's LoraModules, in the order of named_parameters().
        n_parameters: coordinates of a gradient.
        bytes_per_token: what a forward keeps for its backward, measured.
        implementations: kernel -> the code that runs it in a packed pass.

    Raises:
        InputError: there is no plain LoRA adapter on linear layers, or gradients differ from autograd's.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        """Args: a model with a peft adapter that is not merged; `loaded.model` may be the peft model."""
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION_NAME, segment_attention)
        self.loaded = loaded
        model = loaded.model
        self._inner = (
            model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
        )
        self.lora = LoraLayers(model)
        self.modules, self.n_parameters = self.lora.modules, self.lora.n_parameters
        head = self._inner.get_output_embeddings()
        if any(layer.layer is head for layer in self.lora.layers):
            raise InputError("the adapter is on lm_head too; gradients are taken of the layers below it: train without")
        self._scale = LOSS_SCALE.get(loaded.dtype, 1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastselWarning)  # what it does instead is not what is done here
            forward = PackedForward(replace(loaded, model=self._inner), prepack=False)
        self.head, self.body, self._most_packed = forward.head, forward.body, forward.same_rotation_until
        self.reason = forward.reason
        self.bytes_per_token = 0.0
        self._freed = FreedMemory(GROWTH_BYTES)
        self._linears, self._gated = frozen_linears(self.body), find_gated_mlps(self.body)
        self._multiple = ROWS_MULTIPLE if self._linears else 1
        with recording() as self.implementations:
            self._probe()
        self.path = "one by one" if self.reason else "packed"
        if self._linears:
            self.implementations["frozen_linear"] = "onednn"
        if self.reason:
            self.implementations.clear()  # tried, and not used
            warnings.warn(
                f"{loaded.name} cannot be packed ({self.reason}); gradients are taken one row at a time, "
                "which is slower",
                FastselWarning,
                stacklevel=2,
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process is sent the model and makes, and checks, a forward of its own."""
        return LoraForward, (self.loaded,)

    def run(
        self, examples: Sequence[Sequence[LabelledSequence]], consumer: Consumer, *, checkpointing: bool | None = None
    ) -> torch.Tensor:
        """Hand x and delta of every LoRA module to a consumer, once for each module and batch.

        Args:
            examples: the sequences of each example; its loss is the mean over the labelled tokens of all of them. At
                least one token of each is labelled.
            consumer: called with the ModuleTokens of all examples, during the backward, so from the highest layer down;
                on the path "one by one", and for sequences that cannot be packed, for each example alone.
            checkpointing: keep only each layer's input and compute the layer again in the backward; None does so with
                as many layers as it takes to keep at most activation_bytes().

        Returns:
            Float64 [n], on the CPU: each example's loss. NaN where its logits are not finite, which leaves the others
            alone.

        Raises:
            ValueError: nothing is labelled in an example, a label has no token before it, or a sequence is longer than
                the model can take.
        """
        for number, example in enumerate(examples):
            self._check(number, example)
        losses = torch.zeros(len(examples), dtype=torch.float64)
        longest = max((len(s.ids) for example in examples for s in example), default=0)
        if self.path == "packed" and longest <= self._most_packed:
            self._run(examples, slice(0, len(examples)), losses, consumer, checkpointing, packed=True)
        else:
            for i in range(len(examples)):
                self._run(examples, slice(i, i + 1), losses, consumer, checkpointing, packed=False)
        return losses

    def _check(self, number: int, example: Sequence[LabelledSequence]) -> None:
        limit = self.loaded.max_positions
        if not any(len(sequence.labelled) for sequence in example):
            raise ValueError(f"example {number} has no labelled token, so no loss")
        for sequence in example:
            if limit is not None and len(sequence.ids) > limit:
                raise ValueError(
                    f"example {number} has {len(sequence.ids)} tokens, {self.loaded.name} takes at most {limit}"
                )
            if len(sequence.labelled) and not 1 <= min(sequence.labelled) <= max(sequence.labelled) < len(sequence.ids):
                raise ValueError(f"example {number}: labels must have a token before them and be within the sequence")

    def _run(
        self,
        examples: Sequence[Sequence[LabelledSequence]],
        members: slice,
        losses: torch.Tensor,
        consumer: Consumer,
        checkpointing: bool | None,
        *,
        packed: bool,
    ) -> None:
        batch = lay_out(examples[members], self.loaded.device, self._scale, self._multiple if packed else 1)
        n_tokens = int(batch.offsets[-1])
        twice = float(checkpointing or False)  # share of the layers
        if checkpointing is None:
            kept = activation_bytes(self.loaded.device)
            twice = max(0.0, 1 - kept / (n_tokens * self.bytes_per_token or 1.0))
        row_counts = [len(batch.token_ids)] if packed else batch.lengths
        capture = Capture(self.modules, consumer, batch.offsets, members, self._scale, row_counts)

        def on_forward(module: LoraModule) -> None:
            self._freed.look()
            capture.on_forward(module)

        def hand_over(module: LoraModule, x: torch.Tensor, delta: torch.Tensor) -> None:
            self._freed.look()
            capture.hand_over(module, x, delta)

        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_frozen(self.loaded.model))
            stack.enter_context(self.lora.active(hand_over, on_forward))
            stack.enter_context(multiplied_by_onednn(self._linears))
            stack.enter_context(gates_fused(self._gated))
            if twice:
                stack.enter_context(layers_computed_twice(self.body, with_dropout=False, share=twice))
            if packed:
                stack.enter_context(packed_lengths(batch.lengths))
                stack.enter_context(attention_switched(self._inner, ATTENTION_NAME))
                hidden = [self._body(batch.token_ids, batch.position_ids)]
            else:
                hidden = [self._body(ids) for ids in torch.split(batch.token_ids, batch.lengths)]
            self._backward(hidden, batch, losses[members], capture)
        capture.finish()

    def _body(self, token_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        positions = {} if position_ids is None else {"position_ids": position_ids[None]}
        output = self.body(input_ids=token_ids[None], use_cache=False, **positions)
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def _backward(
        self,
        hidden: list[torch.Tensor],
        batch: LabelledBatch,
        losses: torch.Tensor,
        capture: Capture,
    ) -> None:
        together = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        predicting = together[batch.rows]
        nll, gradient = loss_and_gradient(predicting.detach(), self.head, batch.targets, batch.weights)
        losses.index_add_(0, batch.example_of_label, nll * batch.weights.cpu().double() / self._scale)
        capture.forward_is_over = True
        torch.autograd.backward(predicting, gradient)

    def _probe(self) -> None:
        """Compare with autograd through the model's own layers; sets reason and bytes_per_token.

        Raises:
            InputError: even one example at a time differs.
        """
        examples = _probe_examples(self.head.weight.shape[0])
        expected = torch.stack([self._autograd(example[0]) for example in examples])
        tolerance = PROBE_TOLERANCE.get(self.loaded.dtype, 0.3)
        for path in ["one by one"] if self.reason else ["packed", "one by one"]:
            self.path = path
            kept: dict[int, int] = {}
            found = torch.zeros_like(expected)
            with torch.autograd.graph.saved_tensors_hooks(partial(_count, kept), _as_it_is):
                try:
                    self.run(examples, partial(_dense, found), checkpointing=False)
                except CannotPackError as error:
                    self.reason = str(error)
                    continue
            weights = {p.untyped_storage().data_ptr() for p in self.loaded.model.parameters()}
            sizes = [len(sequence.ids) - 1 for example in examples for sequence in example]
            n_tokens = -(-sum(sizes) // self._multiple) * self._multiple if path == "packed" else max(sizes)
            self.bytes_per_token = sum(size for at, size in kept.items() if at not in weights) / n_tokens
            difference = float(((found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)).max())
            if difference <= tolerance:
                return
            self.reason = f"packed gradients differ from autograd's by {difference:.1e}"
        raise InputError(
            f"{self.loaded.name}: gradients of its LoRA matrices differ from autograd's by {difference:.1e}, so that "
            "its layers do something unknown with them; name another model"
        )

    def _autograd(self, sequence: LabelledSequence) -> torch.Tensor:
        """[p]: the gradient of the loss of one sequence, by the model's own layers alone."""
        ids = torch.tensor([list(sequence.ids)], device=self.loaded.device)
        matrices = [matrix for layer in self.lora.layers for matrix in layer.parameters]
        distinct = list({id(matrix): matrix for matrix in matrices}.values())
        with torch.enable_grad(), _frozen(self.loaded.model):
            try:
                for matrix in distinct:
                    matrix.requires_grad_(True)
                logits = self._inner(input_ids=ids, use_cache=False).logits[0]
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                labelled = torch.tensor(list(sequence.labelled), device=logits.device)
                loss = torch.nn.functional.cross_entropy(logits[labelled - 1], ids[0, labelled])
                found = torch.autograd.grad(loss, distinct, allow_unused=True)
            finally:
                for matrix in distinct:
                    matrix.requires_grad_(False)
        whole = [torch.zeros_like(m) if g is None else g for m, g in zip(distinct, found, strict=True)]
        return torch.cat([g.reshape(-1) for g in whole]).double().cpu()


def _probe_examples(vocabulary: int) -> list[list[LabelledSequence]]:
    """Three sequences whose labels begin at other places."""
    # Small ids: ordinary characters in most vocabularies, no image or special tokens.
    low, high = min(16, vocabulary // 2), min(vocabulary, 250)
    ids = [low + (37 * i + i * i) % (high - low) for i in range(54)]
    parts = [(ids[:23], 9), (ids[23:33], 1), (ids[33:], 14)]
    return [[LabelledSequence(part, range(first, len(part)))] for part, first in parts]


def _dense(found: torch.Tensor, part: ModuleTokens) -> None:
    module = part.module
    lora_a, lora_b, x, delta = (tensor.double() for tensor in (module.lora_a, module.lora_b, part.x, part.delta))
    bounds = part.offsets.tolist()
    for row, start, stop in zip(found[part.examples], bounds, bounds[1:], strict=False):
        grad_a = part.scale * (delta[start:stop] @ lora_b).T @ x[start:stop]
        grad_b = part.scale * delta[start:stop].T @ (x[start:stop] @ lora_a.T)
        row[module.first : module.first + module.size] = torch.cat([grad_a.reshape(-1), grad_b.reshape(-1)])


def _count(kept: dict[int, int], tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    kept[storage.data_ptr()] = storage.nbytes()
    return tensor


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Inside, no parameter asks for a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
