"""Gradients of a pool's rows with respect to a LoRA adapter, as LESS and its kin use them: never one by one in memory.

For each row: its loss, the squared norm of its gradient's step (what Adam would do with it, the gradient itself, or its
signs), and dot products with target vectors, or a random projection. Batches are cut inside shards of the pool, from
token counts alone, before the first forward; so the numbers do not depend on where a run was interrupted.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

import fastsel
from fastsel.errors import UsageError
from fastsel.features.answer_scorer import torch_build
from fastsel.features.answer_tokens import OVERFLOW, TURNS
from fastsel.features.batches import Shard
from fastsel.features.gradient_rows import (
    EPS_MODES,
    STEPS,
    AdamMoments,
    BatchFeatures,
    GradientRule,
    GradientWorker,
    moved,
)
from fastsel.features.less_official import BLOCK_SIZE, SEED, OfficialWorker
from fastsel.features.shard_runs import Executor, OnTokens, run_shards
from fastsel.features.training_rows import TrainingTokenizer
from fastsel.features.verdicts import verdicts
from fastsel.io.examples import SKIPPED, TRUNCATED
from fastsel.io.row_reasons import RowReasons
from fastsel.io.templates import Template
from fastsel.kernels._runtime.dispatch import recording
from fastsel.kernels.lora_gradient_sketch import SketchSpec
from fastsel.models import lora_forward
from fastsel.models.loading import LoadedModel
from fastsel.models.lora_forward import LoraForward, ModuleTokens
from fastsel.models.lora_modules import LoraModule

if TYPE_CHECKING:
    from fastsel.io import Pool

# More gain nothing: 2,048 tokens of SmolLM2-135M are as fast, each, as 4,096.
MOST_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
RECORDS = ("n_tokens", "why", "loss", "sqnorm", "row", "dots", "norm", "exponent")  # held in memory for every row


@dataclass
class LoraGradients:
    """Arrays over all pool rows; NaN where a row has no gradient.

    Attributes:
        loss: float64 [n], the mean -log p of a labelled token, natural logarithm.
        sqnorm: float64 [n], of the step.
        dots: float64 [n, s] with the targets, or None.
        n_tokens: int32 [n], of a row under the template, not cut.
        status: uint8 [n], the pool's codes with truncated and skipped rows added.
        reasons: why a row is not ok, with its line.
        first_equal: int64 [n], the first row with the same tokens (often itself): values[first_equal] lets equal rows
            tie to the bit, whatever batches they were in.
        n_parameters: p, coordinates of a gradient.
        tokens: processed over all rows.
        timings: seconds by step.
        provenance: model, template, device, options and what ran each kernel, for the manifest.
        notes: lines for the user.
    """

    loss: NDArray[np.float64]
    sqnorm: NDArray[np.float64]
    dots: NDArray[np.float64] | None
    n_tokens: NDArray[np.int32]
    status: NDArray[np.uint8]
    reasons: RowReasons
    first_equal: NDArray[np.int64]
    n_parameters: int
    tokens: int
    timings: dict[str, float]
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _shards: list[tuple[Shard, NDArray[Any]]] = field(default_factory=list)  # mapped from the store, if there is one

    @property
    def has_gradient(self) -> NDArray[np.bool_]:
        """Bool [n]: rows with a gradient."""
        usable: NDArray[np.bool_] = self.status <= TRUNCATED
        return usable

    def drop(self, rows: NDArray[np.bool_], reason: str) -> None:
        """Leave the rows of this mask [n] without a gradient."""
        self.status[rows] = SKIPPED
        self.reasons.add(rows, reason)

    def keeps(self, name: str) -> bool:
        """Whether sketch, dense or trak was asked for."""
        return any(name in (records.dtype.names or ()) for _, records in self._shards)

    def sketches(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """(pool rows [b], their projections [b, k]), shard by shard, of the rows that have a gradient.

        Raises:
            ValueError: no sketch was asked for.
        """
        for rows, records in self._kept("sketch"):
            yield rows, np.ldexp(records["sketch"].astype(np.float32), records["exponent"].astype(np.int32)[:, None])

    def dense(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.floating[Any]]]]:
        """(pool rows [b], their gradients' steps [b, p]), shard by shard, of the rows that have one.

        Raises:
            ValueError: they were not asked for.
        """
        for rows, records in self._kept("dense"):
            yield rows, records["dense"]

    def trak(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """(pool rows [b], LESS's own features of them, unnormalised [b, k]), shard by shard.

        Raises:
            ValueError: they were not asked for.
        """
        for rows, records in self._kept("trak"):
            yield rows, records["trak"]

    def sketch_matrix(self) -> NDArray[np.float32]:
        """[m, k]: sketches() in one matrix, for selectors that need them all; m rows have a gradient."""
        blocks = [block for _, block in self.sketches()]
        return np.concatenate(blocks) if blocks else np.zeros((0, 0), np.float32)

    def _kept(self, name: str) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        for shard, records in self._shards:
            if name not in (records.dtype.names or ()):
                raise ValueError(f"no {name} was asked for")
            rows = shard.start + np.flatnonzero(self.has_gradient[shard.start : shard.stop])
            if len(rows):
                yield rows, records[rows - shard.start]


def lora_gradients(
    pool: "Pool",
    loaded: LoadedModel,
    *,
    template: Template,
    max_length: int,
    overflow: str = "truncate",
    turns: str = "all",
    step: str = "sgd",
    eps_mode: str = "inside",
    moments: AdamMoments | None = None,
    targets: torch.Tensor | None = None,
    sketch: SketchSpec | None = None,
    dense: bool = False,
    trak: int | None = None,
    batch_tokens: int | None = None,
    checkpointing: bool | None = None,
    implementation: str = "auto",
    forward: LoraForward | None = None,
    store: Any = None,
    executor: Executor | None = None,
    progress: str = "auto",
    description: str = "taking gradients",
) -> LoraGradients:
    """Gradient features of every usable row.

    Args:
        pool: the rows.
        loaded: a model with a LoRA adapter that is not merged, such as Checkpoint.load() gives.
        template, max_length, overflow, turns: which tokens are labelled; see TrainingTokenizer.
        step, eps_mode, moments, targets, sketch, dense, trak: see GradientRule. Coordinates follow named_parameters(),
            A before B, row by row.
        batch_tokens: tokens a pass processes at once; None takes 2,048 on a CPU and 16,384 on a GPU, or fewer where
            these would keep more than lora_forward.activation_bytes() for the backward.
        checkpointing: see LoraForward.run.
        implementation: of lora_gradient_sketch, "auto" or a name.
        forward: the model's LoraForward, where one was made before; it is made here otherwise.
        store: a folder that keeps finished shards, so that the same call goes on after an interruption; or None.
        executor: where shards run (see fastsel.executors); None runs them here, one after another.
        progress, description: see progress_bar; counts tokens.

    Raises:
        UsageError: an unknown option value, or moments or targets that do not fit the adapter.
        InputError: the adapter cannot be used (see LoraForward); the store holds something else; a row is too long and
            overflow is "error".
    """
    rule = GradientRule(step, eps_mode, moments, targets, sketch, dense, trak)
    for name, value, known in (("overflow", overflow, OVERFLOW), ("turns", turns, TURNS), ("step", step, STEPS),
                               ("eps_mode", eps_mode, EPS_MODES)):  # fmt: skip
        if value not in known:
            raise UsageError(f"{name}={value!r} is not known; it is one of: {', '.join(known)}")
    if batch_tokens is not None and batch_tokens < 1:
        raise UsageError(f"batch_tokens={batch_tokens} must be at least 1")
    started = time.perf_counter()
    forward = forward or LoraForward(loaded)
    _check(rule, forward.n_parameters)
    tokenise = TrainingTokenizer(loaded.tokenizer, template, max_length=max_length, overflow=overflow, turns=turns)
    per_batch = batch_tokens or _batch_tokens(forward)
    worker = (GradientWorker if trak is None else OfficialWorker)(
        pool, loaded, tokenise, moved(rule, loaded.device), per_batch, implementation, checkpointing, forward
    )
    options = described_run(
        forward, rule, template, max_length=max_length, overflow=overflow, turns=turns, batch_tokens=per_batch,
        implementation=implementation,
    )  # fmt: skip
    feature = {"feature": "lora gradients", "fastsel": fastsel.__version__, "torch": torch_build()}
    parts: list[tuple[Shard, NDArray[Any]]] = []
    prepared_s = time.perf_counter() - started

    def working(on_tokens: OnTokens) -> GradientWorker:
        worker.on_tokens = on_tokens
        return worker

    run = run_shards(
        pool, tokenise, working, lambda shard, records: parts.append((shard, records)),
        fingerprint={**feature, **options}, store=store, executor=executor, progress=progress,
        description=description,
    )  # fmt: skip
    parts.sort(key=lambda part: part[0].start)
    gradients = _collect(pool, parts, rule, forward.n_parameters, max_length)
    gradients.tokens = run.tokens
    gradients.timings = {"prepare": prepared_s, "plan": run.plan_s, "gradients": run.work_s}
    gradients.provenance = {**options, "device": str(loaded.device), "forward": forward.path}
    gradients.notes = [note for note in (loaded.note, forward.reason) if note]
    return gradients


def described_run(
    forward: LoraForward, rule: GradientRule, template: Template, *, max_length: int, overflow: str, turns: str,
    batch_tokens: int, implementation: str,
) -> dict[str, Any]:  # fmt: skip
    """All that gradient features depend on beside the pool and the versions, as JSON values."""
    loaded = forward.loaded
    return {
        "model": {"name": loaded.name, "revision": loaded.revision, "fingerprint": loaded.fingerprint},
        "adapter": _adapter_name(forward.modules),
        "device": loaded.device.type,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "implementation": implementation,
        "implementations": _what_runs(forward, rule, implementation),
        "template": {"id": template.id, "sha256": template.sha256},
        "max_length": max_length,
        "overflow": overflow,
        "turns": turns,
        "batch_tokens": batch_tokens,
        "flatten": "named_parameters, A then B, row by row",
        "n_parameters": forward.n_parameters,
        **_described(rule),
    }


def moments_of(state: Any, modules: Sequence[LoraModule]) -> AdamMoments:
    """The moments of an AdamState (models.adam_state), flat, in the order of the modules' coordinates."""
    names = [name for module in modules for name in module.parameter_names]
    first, second = (torch.cat([state.moments[name][i].reshape(-1) for name in names]) for i in (0, 1))
    return AdamMoments(first, second, state.step, state.betas, state.eps)


def _check(rule: GradientRule, p: int) -> None:
    if rule.step == "adam" and rule.moments is None:
        raise UsageError("step='adam' needs Adam's moments: take them from a checkpoint, or take step='sgd'")
    if rule.step == "adam" and rule.moments is not None and rule.moments.exp_avg.shape != (p,):
        raise UsageError(f"the moments have {rule.moments.exp_avg.numel()} coordinates, the adapter {p}")
    if rule.targets is not None and (rule.targets.ndim != 2 or rule.targets.shape[1] != p):
        raise UsageError(f"targets are {list(rule.targets.shape)}, the adapter has {p} coordinates: want [s, {p}]")
    if rule.trak is not None and (rule.eps_mode != "inside" or rule.step == "sign"):
        raise UsageError("trak= gives LESS's own features, whose eps is inside the root, of step 'adam' or 'sgd'")


def _what_runs(forward: LoraForward, rule: GradientRule, implementation: str) -> dict[str, str]:
    """Kernel -> the code that runs it for this adapter here: it decides the last bits."""
    if rule.trak is not None:
        return {}
    module = forward.modules[0]
    x, delta = module.lora_a.new_zeros(1, module.lora_a.shape[1]), module.lora_b.new_zeros(1, module.lora_b.shape[0])
    part = ModuleTokens(module, x, delta, module.scale, torch.tensor([0, 1]), slice(0, 1))
    with recording() as ran:
        BatchFeatures(1, forward, moved(rule, forward.loaded.device), implementation)(part)
    return {**forward.implementations, **ran}


def _batch_tokens(forward: LoraForward) -> int:
    device = forward.loaded.device
    most = MOST_BATCH_TOKENS["cpu" if device.type == "cpu" else "cuda"]
    return max(1, min(most, int(lora_forward.activation_bytes(device) / forward.bytes_per_token)))


def _adapter_name(modules: Sequence[LoraModule]) -> str:
    """What the model's weights do not say: which layers, in which order, scaled by what."""
    digest = xxhash.xxh3_128()
    for module in modules:
        shapes = f"{list(module.lora_a.shape)} {list(module.lora_b.shape)}"
        digest.update(f"{module.name} {shapes} {module.scale!r}\n".encode())
    return digest.hexdigest()


def _described(rule: GradientRule) -> dict[str, Any]:
    described: dict[str, Any] = {"step": rule.step, "dense": rule.dense}
    if rule.step == "adam" and rule.moments is not None:
        m = rule.moments
        described["adam"] = {"eps_mode": rule.eps_mode, "step": m.step, "betas": list(m.betas), "eps": m.eps,
                             "moments": _digest(m.exp_avg, m.exp_avg_sq)}  # fmt: skip
    if rule.targets is not None:
        described["targets"] = {"count": len(rule.targets), "xxh3": _digest(rule.targets)}
    if rule.sketch is not None:
        described["sketch"] = {"generator": "counter hash", **rule.sketch._asdict(), "scaled_by_root_k": False}
    if rule.trak is not None:
        described["trak"] = {"generator": "trak basic", "k": rule.trak, "seed": SEED, "block_size": BLOCK_SIZE}
    return described


def _digest(*tensors: torch.Tensor) -> str:
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _collect(
    pool: "Pool", parts: list[tuple[Shard, NDArray[Any]]], rule: GradientRule, p: int, max_length: int
) -> LoraGradients:
    light = [name for name in RECORDS if parts and name in (parts[0][1].dtype.names or ())]
    held: Mapping[str, NDArray[Any]] = {name: np.concatenate([records[name] for _, records in parts]) for name in light}
    n = len(pool)
    if not parts:
        held = {name: np.zeros((0, 2) if name == "row" else 0) for name in RECORDS[:5]}
    has, status, reasons = verdicts(pool, held["why"], max_length)
    # Equal rows of different shards were in different batches, whose last bits may differ.
    source = np.arange(n)
    rows = np.flatnonzero(has)
    if len(rows):
        _, first, which = np.unique(held["row"][rows], axis=0, return_index=True, return_inverse=True)
        source[rows] = rows[first[which.reshape(-1)]]
    nan = np.where(has, 0.0, np.nan)
    dots = None
    if rule.targets is not None:
        dots = held["dots"][source] + nan[:, None]
    return LoraGradients(
        loss=held["loss"][source] + nan,
        sqnorm=held["sqnorm"][source] + nan,
        dots=dots,
        n_tokens=held["n_tokens"].astype(np.int32),
        status=status,
        reasons=reasons,
        first_equal=source,
        n_parameters=p,
        tokens=0,
        timings={},
        _shards=parts,
    )
