"""LESS's warm-up: a LoRA run on a few rows of the pool, whose checkpoints say how the model learns from rows like them.

output/checkpoint-17/   the adapter, optimizer.pt (Adam's moments), trainer_state.json; one an epoch
output/rows.npy         the pool rows that were drawn, in the order of the draw
output/index.json       what was trained on what with what; a run of other options is refused with the difference
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastsel
from fastsel.errors import UsageError
from fastsel.features.answer_scorer import torch_build
from fastsel.features.answer_tokens import REASONS
from fastsel.features.token_stats import window_of
from fastsel.features.training_rows import TrainingRow, TrainingTokenizer
from fastsel.io import Pool, open_pool
from fastsel.io.examples import OK
from fastsel.io.templates import load_template
from fastsel.models.checkpoints import Checkpoint, open_checkpoints
from fastsel.models.loading import load_model
from fastsel.models.lora_training import last_whole_checkpoint, train_adapter
from fastsel.progress import progress_bar
from fastsel.store import FeatureStore

BATCH_TOKENS = {"cpu": 512, "cuda": 4096}
OFFICIAL_SEED = 42  # LESS's sample_data_seed
logger = logging.getLogger("fastsel")


def warmup(
    pool: Any,
    *,
    output: str | Path,
    model: Any = "bundled",
    fraction: float = 0.05,
    epochs: int = 4,
    lora_r: int = 128,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.1,
    target_modules: str | Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    learning_rate: float = 2e-5,
    warmup_ratio: float = 0.03,
    rows_a_step: int = 32,
    template: Any = "less",
    max_length: int | None = None,
    official: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int | None = None,
    seed: int = 0,
    progress: str = "auto",
) -> list[Checkpoint]:
    """Train a LoRA adapter on rows drawn from the pool, and keep a checkpoint with Adam's moments after each epoch.

    The defaults are LESS's. An interrupted run goes on from its last checkpoint when called again, and ends in the same
    weights as one that was not; a finished one is only read.

    Args:
        pool: see ifd.
        output: a folder of its own for the run.
        model, device, dtype: see load_model.
        fraction: share of the pool's usable rows that is drawn, without replacement.
        epochs: how often each row is seen; one checkpoint each.
        lora_r, lora_alpha, lora_dropout, target_modules: of the adapter; lora_alpha None takes 4 * lora_r, LESS's
            ratio; target_modules "all-linear" takes every linear layer but the head.
        learning_rate, warmup_ratio: AdamW without decay; the rate rises over that share of the steps, then falls in a
            line to 0.
        rows_a_step: rows an optimizer step: 32 as LESS's script does on one GPU (its 4 GPUs take 128).
        template: what stands before an answer; see load_template.
        max_length: of a row in tokens; None takes LESS's 2,048, or what the model can take.
        official: LESS's draw: the first int(fraction * n) of numpy's permutation of all rows with seed 42, whatever
            seed is.
        batch_tokens: tokens, padding included, that go through the model together; None takes 512 on a CPU, 4,096 on a
            GPU. Batches that would keep more than 1 GiB (a quarter of a GPU's memory) for their backward compute
            layers twice instead.
        seed: of the draw, the adapter's start, the order of rows and dropout.
        progress: see progress_bar; counts tokens.

    Returns:
        The checkpoints, by step.

    Raises:
        UsageError: an option has no such value; no row is left to train on; the loss is not finite.
        InputError: the pool or model cannot be used; the folder holds another run (with the differences), or is in use.
        MissingExtraError: peft or accelerate is missing.
    """
    _check(fraction, epochs, lora_r, rows_a_step, learning_rate, warmup_ratio)
    pool = open_pool(pool)
    loaded = load_model(model, device=device, dtype=dtype)
    max_length = window_of(loaded, max_length, 2048)
    prompts = load_template(template, loaded.tokenizer)
    rows = draw_rows(pool, fraction, OFFICIAL_SEED if official else seed, official=official)
    tokenise = TrainingTokenizer(loaded.tokenizer, prompts, max_length=max_length)
    drawn, dropped = _training_rows(pool, rows, tokenise, max_length)
    if not drawn:
        raise UsageError(f"no row drawn from {pool.name} has an answer to train on: {next(iter(dropped.values()))}")
    per_batch = batch_tokens or BATCH_TOKENS["cpu" if loaded.device.type == "cpu" else "cuda"]
    lora: dict[str, Any] = {
        "r": lora_r,
        "lora_alpha": 4 * lora_r if lora_alpha is None else lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": target_modules if isinstance(target_modules, str) else sorted(target_modules),
    }
    training: dict[str, Any] = {
        "epochs": epochs, "learning_rate": learning_rate, "warmup_ratio": warmup_ratio, "rows_a_step": rows_a_step,
        "batch_tokens": per_batch, "seed": seed,
    }  # fmt: skip
    fingerprint = {
        "feature": "warm-up", "fastsel": fastsel.__version__, "torch": torch_build(),
        "model": {"name": loaded.name, "revision": loaded.revision, "fingerprint": loaded.fingerprint},
        "device": loaded.device.type, "dtype": str(loaded.dtype).removeprefix("torch."),
        "template": {"id": prompts.id, "sha256": prompts.sha256}, "max_length": max_length,
        "lora": lora, **training, "fraction": fraction, "official": official,
        "pool": pool.fingerprint, "rows": len(pool),
    }  # fmt: skip
    output = Path(output)
    with FeatureStore(output, fingerprint) as kept:
        steps = -(-len(drawn) // rows_a_step)
        if kept.plan is None:
            np.save(output / "rows.npy", rows)
            kept.set_plan({"steps an epoch": steps, "rows trained on": len(drawn), "rows left out": dropped})
        if dropped:
            row, reason = next(iter(dropped.items()))
            logger.info(
                "warm-up: %d of %d rows drawn cannot be learnt (row %d: %s)", len(dropped), len(rows), row, reason
            )
        last = last_whole_checkpoint(output)
        done = 0 if last is None else last.step // steps
        if done < epochs:
            tokens = sum(row.size for row in drawn)
            with progress_bar(epochs * tokens, "tok", mode=progress, description="warm-up") as bar:
                bar.skip(done * tokens)
                train_adapter(
                    loaded, [row.sequences for row in drawn], output, lora=lora, resume_from=last,
                    on_tokens=bar.update, **training,
                )  # fmt: skip
        return open_checkpoints(output)


def draw_rows(pool: Pool, fraction: float, seed: int, *, official: bool = False) -> NDArray[np.int64]:
    """Pool rows to warm up on, in the order of the draw.

    Args:
        pool: the rows; those that cannot be used are not drawn, unless official.
        fraction: share of them, at least one row.
        seed: of numpy's legacy generator, whose stream is frozen.
        official: LESS's draw: int(fraction * n) of all n rows, whatever is wrong with them.
    """
    candidates = np.arange(len(pool)) if official else np.flatnonzero(pool.status == OK)
    n = int(fraction * len(candidates)) if official else round(fraction * len(candidates))
    order = np.random.RandomState(seed).permutation(len(candidates))
    return candidates[order[: max(1, n)]].astype(np.int64)


def _check(
    fraction: float, epochs: int, lora_r: int, rows_a_step: int, learning_rate: float, warmup_ratio: float
) -> None:
    if not 0 < fraction <= 1:
        raise UsageError(f"fraction={fraction} must be above 0 and at most 1")
    if not 0 <= warmup_ratio < 1:
        raise UsageError(f"warmup_ratio={warmup_ratio} must be from 0 to below 1")
    if not learning_rate > 0:
        raise UsageError(f"learning_rate={learning_rate} must be above 0")
    for name, value in (("epochs", epochs), ("lora_r", lora_r), ("rows_a_step", rows_a_step)):
        if value < 1:
            raise UsageError(f"{name}={value} must be at least 1")


def _training_rows(
    pool: Pool, rows: NDArray[np.int64], tokenise: TrainingTokenizer, max_length: int
) -> tuple[list[TrainingRow], dict[int, str]]:
    """What is learnt, in the order of the draw, and why the others are not."""
    examples = pool.examples(rows)
    tokenised = tokenise(examples)
    learnt = [row for row in tokenised if row.sequences]
    dropped = {example.row_id: example.reason or "" for example in examples}
    dropped |= {row.row_id: (REASONS[row.why] or "").format(max_length=max_length) for row in tokenised}
    for row in learnt:
        del dropped[row.row_id]
    return learnt, dropped
