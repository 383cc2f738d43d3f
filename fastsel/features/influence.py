"""How much a training step on a row would help target rows: cosines between gradient features (LESS, section 3).

A target is one direction a subtask, so that the pool's gradients are multiplied with few vectors, or projected once.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsel.errors import UsageError
from fastsel.features.answer_tokens import NOT_FINITE, REASONS
from fastsel.features.gradient_rows import AdamMoments, BatchFeatures, GradientRule, batches
from fastsel.features.gradients import LoraGradients, lora_gradients, moments_of
from fastsel.features.less_official import official_rows
from fastsel.features.targets import Target
from fastsel.features.training_rows import TrainingRow, TrainingTokenizer
from fastsel.io.templates import Template
from fastsel.kernels.lora_gradient_sketch import SketchSpec
from fastsel.models.checkpoints import Checkpoint, open_checkpoints
from fastsel.models.loading import LoadedModel
from fastsel.models.lora_forward import LabelledSequence, LoraForward
from fastsel.progress import Progress, progress_bar

if TYPE_CHECKING:
    from fastsel.io import Pool

AGGREGATIONS = ("official", "paper")
MODES = ("direct", "sketch", "trak")
LEAST_NORM = 1e-12  # torch's, for a row whose feature is 0
DENSE_BYTES = 256 << 20  # of whole gradients of target rows, at a time


@dataclass(frozen=True)
class RunState:
    """One checkpoint of a run, in use.

    Attributes:
        loaded: the model with its adapter.
        forward: its gradients.
        checkpoint: where they are from.
    """

    loaded: LoadedModel
    forward: LoraForward
    checkpoint: Checkpoint

    @cached_property
    def moments(self) -> AdamMoments:
        """Adam's, read when they are first asked for: plain gradients need none."""
        names = [name for module in self.forward.modules for name in module.parameter_names]
        return moments_of(self.checkpoint.adam_state(names), self.forward.modules)


def given_checkpoints(checkpoints: Any) -> list[Checkpoint] | None:
    """Folders (see open_checkpoints) or Checkpoints, by step; None where there are none.

    Raises:
        InputError: see open_checkpoints.
    """
    if checkpoints is None:
        return None
    if isinstance(checkpoints, Sequence) and checkpoints and all(isinstance(c, Checkpoint) for c in checkpoints):
        return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)
    return open_checkpoints(checkpoints)


def warmed_up(warm_up: Callable[..., list[Checkpoint]], store: Any) -> list[Checkpoint]:
    """The checkpoints of a warm-up.

    Args:
        warm_up: trains into the folder `output`.
        store: the run's folder: the warm-up goes to store/warmup, where an interrupted one goes on; None makes a folder
            that goes with the process.
    """
    if store is not None:
        return warm_up(output=Path(store) / "warmup")
    folder = tempfile.TemporaryDirectory(prefix="fastsel-warmup-")
    _KEPT.append(folder)
    return warm_up(output=Path(folder.name) / "run")


_KEPT: list[Any] = []  # folders of warm-ups that nobody gave a place


def weights_of(checkpoints: Sequence[Checkpoint]) -> tuple[list[float], str | None]:
    """(weights that add up to 1, a line for the user where they are not learning rates)."""
    rates = [checkpoint.learning_rate for checkpoint in checkpoints]
    known = [rate for rate in rates if rate is not None]
    if len(known) < len(rates) or sum(known) <= 0:
        note = "the run logged no learning rates: its checkpoints count alike" if len(rates) > 1 else None
        return [1 / len(rates)] * len(rates), note
    return [rate / sum(known) for rate in known], None


@contextmanager
def running(checkpoint: Checkpoint, base: LoadedModel, *, one_dtype: bool = False) -> Iterator[RunState]:
    """Inside, the base has the checkpoint's adapter; with one_dtype in the base's type, which peft keeps in float32."""
    loaded = checkpoint.load((base.model, base.tokenizer))
    try:
        if one_dtype:
            loaded.model.to(base.dtype)
        yield RunState(loaded, LoraForward(loaded), checkpoint)
    finally:
        loaded.model.unload()
        if hasattr(base.model, "peft_config"):
            del base.model.peft_config


@dataclass(frozen=True)
class Directions:
    """What rows are compared with.

    Attributes:
        vectors: [s, p], or [s, k] of projections; one a subtask.
        subtasks: names, one target after another.
        target_of: int64 [s], number of each one's target.
        targets: less the rows without a gradient.
    """

    vectors: torch.Tensor
    subtasks: list[str]
    target_of: NDArray[np.int64]
    targets: list[Target]


def target_directions(
    targets: Sequence[Target],
    state: RunState,
    *,
    template: Template,
    max_length: int,
    aggregation: str = "official",
    sketch: SketchSpec | None = None,
    trak: int | None = None,
    batch_tokens: int = 1024,
    implementation: str = "auto",
    progress: str = "none",
) -> Directions:
    """The direction of each subtask, from plain gradients of its rows.

        official: mean over its rows of v / |v| (not normalised again);   paper: (mean of v) / |mean of v|

    v: whole gradients; projections with sketch; LESS's own features of so many numbers with trak. `progress` counts
    tokens; see progress_bar.

    Raises:
        UsageError: another aggregation.
        InputError: a target has no row with a gradient.
    """
    if aggregation not in AGGREGATIONS:
        raise UsageError(f"aggregation={aggregation!r} is not known; it is one of: {', '.join(AGGREGATIONS)}")
    tokenise = TrainingTokenizer(state.loaded.tokenizer, template, max_length=max_length)
    rule = GradientRule("sgd", sketch=sketch, dense=sketch is None and trak is None, trak=trak)
    vectors: list[torch.Tensor] = []
    names: list[str] = []
    target_of: list[int] = []
    kept: list[Target] = []
    tokenised = [[row for row in tokenise(target.examples()) if row.sequences] for target in targets]
    n_tokens = sum(row.size for rows in tokenised for row in rows)
    bar = progress_bar(n_tokens, "tok", mode=progress, description="taking the target's gradients")
    add_up = partial(_add_up, state.forward, rule, aggregation == "official", batch_tokens, implementation, bar)
    with bar:
        summed = [add_up(target, rows) for target, rows in zip(targets, tokenised, strict=True)]
    for number, (target, (sums, counts, missing)) in enumerate(zip(targets, summed, strict=True)):
        target = target.without(missing) if missing else target
        alive = counts > 0
        means = sums[alive].div_(counts[alive, None])
        if aggregation == "paper":
            means = torch.nn.functional.normalize(means, dim=1)
        vectors.append(means)
        names += target.subtasks
        target_of += [number] * len(target.subtasks)
        kept.append(target)
    return Directions(torch.cat(vectors), names, np.array(target_of, np.int64), kept)


def _add_up(
    forward: LoraForward,
    rule: GradientRule,
    to_unit_length: bool,
    batch_tokens: int,
    implementation: str,
    bar: Progress,
    target: Target,
    rows: Sequence[TrainingRow],
) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]]:
    """(sums of the gradients of each subtask [s, p], how many rows each has [s], row -> why it has no gradient)."""
    missing = dict.fromkeys(set(target.rows.tolist()) - {row.row_id for row in rows}, "it has no labelled token")
    subtask_of = dict(zip(target.rows.tolist(), target.subtask.tolist(), strict=True))
    n_columns = rule.trak or (forward.n_parameters if rule.sketch is None else rule.sketch.k)
    own = torch.promote_types(forward.modules[0].lora_a.dtype, torch.float32)
    sums = torch.zeros(len(target.subtasks), n_columns, dtype=own, device=forward.loaded.device)
    counts = torch.zeros(len(target.subtasks), dtype=own, device=forward.loaded.device)
    for row, vector in _features(forward, rows, rule, batch_tokens, implementation):
        bar.update(row.size)
        norm = torch.linalg.vector_norm(vector, dtype=torch.float64)
        if not bool(torch.isfinite(norm)):
            missing[row.row_id] = str(REASONS[NOT_FINITE])
            continue
        subtask = subtask_of[row.row_id]
        if not to_unit_length:
            sums[subtask].add_(vector)
        elif rule.trak is not None:  # in its own type, as the code does
            sums[subtask].add_(torch.nn.functional.normalize(vector, dim=0))
        else:
            sums[subtask].add_(vector, alpha=1 / max(float(norm), LEAST_NORM))
        counts[subtask] += 1
    return sums, counts, missing


def _features(
    forward: LoraForward, rows: Sequence[TrainingRow], rule: GradientRule, batch_tokens: int, implementation: str
) -> Iterator[tuple[TrainingRow, torch.Tensor]]:
    """Whole gradients of rows, projections of them, or LESS's own features."""
    if rule.trak is not None:
        yield from ((row, feature) for row, _, _, feature in official_rows(forward, rows, rule.trak))
        return
    most_rows = max(1, DENSE_BYTES // (8 * (forward.n_parameters if rule.sketch is None else rule.sketch.k)))
    for whole in batches(rows, batch_tokens):
        for start in range(0, len(whole), most_rows):
            batch = whole[start : start + most_rows]
            features = BatchFeatures(len(batch), forward, rule, implementation)
            forward.run([[LabelledSequence(*s) for s in row.sequences] for row in batch], features)
            found = features.dense if rule.sketch is None else features.sketch
            assert found is not None
            yield from zip(batch, found, strict=True)


@dataclass
class Influence:
    """What training on each pool row would do for each subtask, over all checkpoints.

    Attributes:
        products: float64 [n, s], sum over checkpoints of weight times cosine; NaN where a row has no gradient.
        gradients: of the last checkpoint: status, reasons, tokens of every row.
        directions: of the last checkpoint: names of the subtasks, the target of each.
        notes: lines for the user.
        weights: of the checkpoints, by their steps.
    """

    products: NDArray[np.float64]
    gradients: LoraGradients
    directions: Directions
    notes: list[str]
    weights: dict[int, float] = field(default_factory=dict)

    @property
    def uses(self) -> dict[int, str]:
        """What each checkpoint was used for, by its step."""
        return {step: f"weight {weight:.3f}" for step, weight in self.weights.items()}

    @property
    def by_subtask(self) -> dict[str, NDArray[np.float64]]:
        """Name -> float64 [n]; the best of subtasks of one name in several targets."""
        columns: dict[str, NDArray[np.float64]] = {}
        for name, column in zip(self.directions.subtasks, self.products.T, strict=True):
            columns[name] = np.maximum(columns[name], column) if name in columns else column
        return columns

    @property
    def by_target(self) -> NDArray[np.float64]:
        """Float64 [n, targets]: of each target the best of its subtasks."""
        of = self.directions.target_of
        return np.stack([self.products[:, of == t].max(axis=1) for t in range(int(of.max()) + 1)], axis=1)


def influence(
    pool: "Pool",
    targets: Sequence[Target],
    run: Sequence[Checkpoint],
    base: LoadedModel,
    *,
    template: Template,
    target_template: Template | None = None,
    max_length: int,
    mode: str = "direct",
    sketch_size: int = 8192,
    aggregation: str = "official",
    seed: int = 0,
    store: Any = None,
    implementation: str = "auto",
    progress: str = "auto",
    **options: Any,
) -> Influence:
    """Compare Adam's step on each pool row with the gradients of the target, at each checkpoint.

        products[i, s] = sum_c w_c <Gamma_c(i) / |Gamma_c(i)|, u_c(s)>;   u_c: see target_directions

    Args:
        pool, targets: the rows.
        run: checkpoints; w are their learning rates over the sum of these.
        base: the model that the run trained.
        template, target_template, max_length: what is labelled; None takes the pool's template for targets too.
        mode: "direct" (with whole gradients), "sketch" (with random projections of both to sketch_size numbers), or
            "trak" (with those that LESS's code stores; see features/less_official.py).
        aggregation: see target_directions.
        seed: of the sketch.
        store: a folder, with one of its own for each checkpoint; or None.
        implementation, progress, options: of lora_gradients.

    Raises:
        UsageError: an option has no such value.
        InputError: see target_directions and lora_gradients.
    """
    if mode not in MODES:
        raise UsageError(f"mode={mode!r} is not known; it is one of: {', '.join(MODES)}")
    weights, note = weights_of(run)
    sketch = SketchSpec(sketch_size, seed=seed) if mode == "sketch" else None
    trak = sketch_size if mode == "trak" else None
    total = np.zeros(())
    timings: dict[str, float] = {}
    for number, (checkpoint, weight) in enumerate(zip(run, weights, strict=True), 1):
        with running(checkpoint, base, one_dtype=mode == "trak") as state:
            started = time.perf_counter()
            wanted = target_directions(
                targets, state, template=target_template or template, max_length=max_length, aggregation=aggregation,
                sketch=sketch, trak=trak, implementation=implementation, progress=progress,
            )  # fmt: skip
            asked = time.perf_counter() - started
            gradients = lora_gradients(
                pool, state.loaded, forward=state.forward, template=template, max_length=max_length, step="adam",
                moments=state.moments, targets=wanted.vectors if mode == "direct" else None, sketch=sketch, trak=trak,
                store=store and Path(store) / f"checkpoint-{checkpoint.step}", implementation=implementation,
                progress=progress, description=f"taking gradients at checkpoint {number} of {len(run)}", **options,
            )  # fmt: skip
            total = total + weight * _products(gradients, wanted.vectors, base.dtype)
            for step, seconds in {"targets": asked, **gradients.timings}.items():
                timings[step] = timings.get(step, 0.0) + seconds
    lost = gradients.has_gradient & np.isnan(total).any(axis=1)
    gradients.drop(lost, "the model's loss is not a finite number at another checkpoint")
    gradients.timings = timings
    notes = [*(target.note for target in wanted.targets), *([note] if note else []), *gradients.notes]
    steps = [checkpoint.step for checkpoint in run]
    return Influence(total, gradients, wanted, notes, dict(zip(steps, weights, strict=True)))


def _products(gradients: LoraGradients, vectors: torch.Tensor, dtype: torch.dtype) -> NDArray[np.float64]:
    """[n, s]: unit features with directions; LESS's own features come to length 1 in this type, the model's."""
    if gradients.dots is not None:
        unit: NDArray[np.float64] = gradients.dots / np.maximum(np.sqrt(gradients.sqnorm), LEAST_NORM)[:, None]
        return unit
    products = np.full((len(gradients.loss), len(vectors)), np.nan)
    if gradients.keeps("trak"):
        for rows, block in gradients.trak():
            units = torch.nn.functional.normalize(torch.from_numpy(np.array(block)).to(dtype), dim=1)
            products[rows] = (units.to(vectors.dtype) @ vectors.cpu().T).numpy()
        return products[gradients.first_equal]
    wanted = vectors.double().cpu().numpy()
    for rows, block in gradients.sketches():
        norms = np.linalg.norm(block.astype(np.float64), axis=1, keepdims=True)
        products[rows] = (block.astype(np.float64) @ wanted.T) / np.maximum(norms, LEAST_NORM)
    return products[gradients.first_equal]
