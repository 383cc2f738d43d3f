"""A LoRA run by transformers' Trainer that keeps a checkpoint an epoch, Adam's moments with it.

A step's loss is the mean over its rows of each row's mean loss over its labelled tokens, whatever number of rows goes
through the model together: what LESS's training computes with one row a device, and what its gradients are of.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from fastsel.errors import UsageError
from fastsel.models.checkpoints import Checkpoint, open_checkpoints
from fastsel.models.labelled_loss import WeightedSequence, labelled_loss, padded_batches
from fastsel.models.layer_checkpointing import layers_computed_twice
from fastsel.models.loading import LoadedModel, require
from fastsel.models.lora import finite, new_adapter

# What a batch may keep for its backward, in bytes; larger ones keep each layer's input and compute the layer again.
ACTIVATION_BYTES = 1 << 30
SHARE_OF_GPU = 0.25
NUMBERS_A_LAYER = 24  # kept for each token, in hidden sizes; SmolLM2 with adapters and dropout on q, k, v, o: 21
# A row: its sequences, each as token ids and the positions of the labelled ones.
TrainingRow = Sequence[tuple[Sequence[int], Sequence[int]]]


def train_adapter(
    loaded: LoadedModel,
    rows: Sequence[TrainingRow],
    folder: Path,
    *,
    lora: dict[str, Any],
    epochs: int,
    learning_rate: float,
    warmup_ratio: float,
    rows_a_step: int,
    batch_tokens: int,
    seed: int,
    resume_from: Checkpoint | None,
    on_tokens: Callable[[int], None],
) -> None:
    """Train, and keep a checkpoint an epoch; a run that goes on from one ends in the same weights.

    Args:
        loaded: the base; afterwards what it was.
        rows: what is learnt; each has a labelled token.
        folder: gets a checkpoint-N folder at the end of each epoch.
        lora: of peft's LoraConfig.
        epochs, learning_rate, warmup_ratio: AdamW without decay; the rate rises over that share of all steps, then
            falls in a line to 0. Gradients are clipped to norm 1.
        rows_a_step: rows for each step of the optimizer.
        batch_tokens: tokens, padding included, that go through the model together.
        seed: of the adapter's start, the order of rows and dropout.
        resume_from: a checkpoint of this very run.
        on_tokens: called with the tokens of each finished batch.

    Raises:
        InputError, MissingExtraError: see new_adapter.
        UsageError: the loss is not finite; another GPU than the first was named.
    """
    require("accelerate", "training an adapter")
    import transformers

    if loaded.device.type == "cuda" and loaded.device.index not in (None, 0):
        raise UsageError(
            f"training runs on the first GPU that it sees, not on {loaded.device}: set CUDA_VISIBLE_DEVICES"
        )

    class LoraTrainer(transformers.Trainer):  # type: ignore[misc]  # defined here, where transformers is imported
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            model.train()
            of_step: list[TrainingRow] = inputs["rows"]
            weighted = [
                WeightedSequence(ids, labelled, 1 / (len(of_step) * sum(len(where) for _, where in row)))
                for row in of_step
                for ids, labelled in row
            ]
            total = torch.zeros((), device=loaded.device)
            for batch in padded_batches(weighted, batch_tokens):
                large = _keeps_too_much(loaded, len(batch) * max(len(sequence.ids) for sequence in batch))
                with layers_computed_twice(loaded.model, with_dropout=True) if large else nullcontext():
                    with self.compute_loss_context_manager():
                        loss = finite(labelled_loss(model, loaded.device, batch))
                    self.accelerator.backward(loss)
                total += loss.detach()
                on_tokens(sum(len(sequence.ids) for sequence in batch))
            return total

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            self.model.save_pretrained(output_dir, save_embedding_layers=False)  # "auto" would ask the hub

        def floating_point_ops(self, inputs: Any) -> int:
            return 0  # the default reads input_ids

    steps = epochs * math.ceil(len(rows) / rows_a_step)
    rising = min(math.ceil(warmup_ratio * steps), steps - 1)  # the first of them has a rate of 0: not all there are
    with new_adapter(loaded, seed, **lora) as adapter:
        origin = (loaded.origin or {}).get("model", loaded.name)
        adapter.peft_config["default"].base_model_name_or_path = origin
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=rows_a_step,
            learning_rate=learning_rate, lr_scheduler_type="linear", warmup_steps=rising,
            weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch", save_strategy="epoch", logging_steps=1,
            seed=seed, data_seed=seed, remove_unused_columns=False, dataloader_pin_memory=False, report_to="none",
            disable_tqdm=True, use_cpu=loaded.device.type == "cpu", bf16=loaded.dtype == torch.bfloat16,
            fp16=loaded.dtype == torch.float16 and loaded.device.type == "cuda",
        )  # fmt: skip
        arguments._n_gpu = min(1, arguments.n_gpu)  # several would be wrapped in DataParallel
        trainer = LoraTrainer(
            model=adapter, args=arguments, train_dataset=list(rows), data_collator=lambda of_step: {"rows": of_step}
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from.folder))


def _keeps_too_much(loaded: LoadedModel, tokens: int) -> bool:
    """Whether a batch's backward would need more memory than it may have."""
    config = loaded.model.config.get_text_config()
    needed = NUMBERS_A_LAYER * config.hidden_size * config.num_hidden_layers * tokens * loaded.dtype.itemsize
    if loaded.device.type != "cuda":
        return bool(needed > ACTIVATION_BYTES)
    return bool(needed > SHARE_OF_GPU * torch.cuda.get_device_properties(loaded.device).total_memory)


def last_whole_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint to go on from; what an interruption left half written is removed."""
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:  # the file that the Trainer writes last
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            whole.append(checkpoint)
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return open_checkpoints(whole)[-1] if whole else None
