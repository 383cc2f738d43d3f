"""Gradient features of one shard after another with one model, here or in another process."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from fastsel.features.answer_tokens import NOT_FINITE
from fastsel.features.batches import ROWS_AT_ONCE, Shard
from fastsel.features.training_rows import TrainingRow, TrainingTokenizer
from fastsel.kernels.lora_gradient_sketch import AdamStep, SketchSpec, lora_gradient_sketch
from fastsel.models.loading import LoadedModel
from fastsel.models.lora_forward import LabelledSequence, LoraForward, ModuleTokens

if TYPE_CHECKING:
    from fastsel.io import Pool

STEPS = ("adam", "sgd", "sign")
EPS_MODES = ("inside", "outside")
# The largest entry of a stored sketch lies in [2^14, 2^15), so that what is 2^-28 of it still has all its bits.
TOP_EXPONENT = 15


class AdamMoments(NamedTuple):
    """Adam's state at a checkpoint, over all coordinates of the adapter in their order.

    exp_avg, exp_avg_sq: float32 [p].    step: optimizer steps taken.    betas, eps: of the optimizer.
    """

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True)
class GradientRule:
    """What becomes of a row's gradient.

    Attributes:
        step: "adam" (the step that Adam would take), "sgd" (the gradient itself) or "sign" (its signs).
        eps_mode: "inside": m' / sqrt(v' + eps) without bias correction, as LESS's code; "outside": Adam as published.
        moments: Adam's state, for step "adam".
        targets: [s, p], what gradients are multiplied with; None asks for no dots.
        sketch: the random projection; None asks for none.
        dense: keep whole gradients.
        trak: keep LESS's own features of so many numbers (see features/less_official.py), and nothing of the above.
    """

    step: str = "sgd"
    eps_mode: str = "inside"
    moments: AdamMoments | None = None
    targets: torch.Tensor | None = None
    sketch: SketchSpec | None = None
    dense: bool = False
    trak: int | None = None

    def adam_of(self, first: int, size: int) -> AdamStep | None:
        """Adam's step for the coordinates first..first + size."""
        if self.step != "adam" or self.moments is None:
            return None
        part = slice(first, first + size)
        beta1, beta2 = self.moments.betas
        step = AdamStep(self.moments.exp_avg[part], self.moments.exp_avg_sq[part], beta1, beta2, self.moments.eps)
        if self.eps_mode == "inside":
            return step
        t = self.moments.step + 1
        return step._replace(eps_inside=False, correction1=1 - beta1**t, correction2=1 - beta2**t)

    def record_dtype(self, p: int, *, is_double: bool) -> np.dtype[Any]:
        """What is kept of a row. `row` names its tokens, so that equal rows can be made equal to the bit."""
        fields: list[Any] = [
            ("n_tokens", "<i4"),
            ("why", "|u1"),
            ("loss", "<f8"),
            ("sqnorm", "<f8"),
            ("row", "<u8", (2,)),
        ]
        if self.targets is not None:
            fields.append(("dots", "<f8", (len(self.targets),)))
        if self.sketch is not None:
            fields += [("sketch", "<f2", (self.sketch.k,)), ("exponent", "<i2"), ("norm", "<f4")]
        if self.dense:
            fields.append(("dense", "<f8" if is_double else "<f4", (p,)))
        if self.trak is not None:
            fields.append(("trak", "<f4", (self.trak,)))
        return np.dtype(fields)


@dataclass
class GradientWorker:
    """shard -> its records. Another process is sent the model and makes a forward of its own."""

    pool: "Pool"
    loaded: LoadedModel
    tokenise: TrainingTokenizer
    rule: GradientRule
    batch_tokens: int
    implementation: str
    checkpointing: bool | None
    forward: LoraForward | None = None
    on_tokens: Callable[[int], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "forward": None, "on_tokens": None}

    def model(self) -> LoraForward:
        """The forward, made when it is first asked for."""
        if self.forward is None:
            self.forward = LoraForward(self.loaded)
        return self.forward

    def read(self, shard: Shard) -> tuple[list[TrainingRow], NDArray[Any]]:
        """The rows of a shard that can be learnt, in order, and its records, which so far say what each row is."""
        forward = self.model()
        is_double = forward.modules[0].lora_a.dtype == torch.float64
        records = np.zeros(shard.stop - shard.start, self.rule.record_dtype(forward.n_parameters, is_double=is_double))
        usable = []
        for examples in self.pool.chunks(shard.start, shard.stop, rows=ROWS_AT_ONCE):
            for row in self.tokenise(examples):
                place = row.row_id - shard.start
                records["n_tokens"][place], records["why"][place] = row.n_tokens, row.why
                if row.sequences:
                    records["row"][place] = np.frombuffer(_name(row), "<u8")
                    usable.append(row)
        return usable, records

    def __call__(self, shard: Shard) -> NDArray[Any]:
        rows, records = self.read(shard)
        firsts: dict[bytes, int] = {}
        twins: list[tuple[TrainingRow, int]] = []
        distinct = []
        for row in rows:
            place = row.row_id - shard.start
            name = records["row"][place].tobytes()
            if name in firsts:
                twins.append((row, firsts[name]))
            else:
                firsts[name] = place
                distinct.append(row)
        for batch in batches(distinct, self.batch_tokens):
            self._batch(batch, [row.row_id - shard.start for row in batch], records)
            if self.on_tokens is not None:
                self.on_tokens(sum(row.size for row in batch))
        for row, first in twins:  # equal rows get equal bits, so that they tie
            n_tokens = records["n_tokens"][row.row_id - shard.start]
            records[row.row_id - shard.start] = records[first]
            records["n_tokens"][row.row_id - shard.start] = n_tokens
            if self.on_tokens is not None:
                self.on_tokens(row.size)
        return records

    def _batch(self, batch: Sequence[TrainingRow], places: list[int], records: NDArray[Any]) -> None:
        forward, rule = self.model(), self.rule
        examples = [[LabelledSequence(ids, labelled) for ids, labelled in row.sequences] for row in batch]
        features = BatchFeatures(len(batch), forward, rule, self.implementation)
        losses = forward.run(examples, features, checkpointing=self.checkpointing)
        records["loss"][places] = losses.numpy()
        records["sqnorm"][places] = features.sqnorms.cpu().numpy()
        is_finite = torch.isfinite(losses) & torch.isfinite(features.sqnorms.cpu())
        if features.dots is not None:
            records["dots"][places] = features.dots.cpu().numpy()
            is_finite &= torch.isfinite(features.dots.cpu()).all(1)
        if features.sketch is not None:
            sketch, exponent, norm = as_stored(features.sketch)
            records["sketch"][places], records["exponent"][places], records["norm"][places] = sketch, exponent, norm
            is_finite &= torch.from_numpy(np.isfinite(norm))
        if features.dense is not None:
            records["dense"][places] = features.dense.cpu().numpy()
        for place, fine in zip(places, is_finite.tolist(), strict=True):
            if not fine:
                why, n_tokens, row = NOT_FINITE, records["n_tokens"][place], records["row"][place].copy()
                records[place] = np.zeros((), records.dtype)
                records["why"][place], records["n_tokens"][place], records["row"][place] = why, n_tokens, row


class BatchFeatures:
    """Consumer of LoraForward.run: adds up what each module gives, tile by tile, never a whole gradient unless asked.

    Attributes:
        sqnorms: float64 [n].
        dots: float64 [n, s], or None.
        sketch: float32 (float64 for float64 models) [n, k], or None.
        dense: [n, p], or None.
    """

    def __init__(self, n: int, forward: LoraForward, rule: GradientRule, implementation: str) -> None:
        device, dtype = forward.loaded.device, forward.modules[0].lora_a.dtype
        working = torch.promote_types(dtype, torch.float32)
        where: dict[str, Any] = {"device": device}
        self._rule, self._implementation = rule, implementation
        self.sqnorms = torch.zeros(n, dtype=torch.float64, **where)
        self.dots = self.sketch = self.dense = None
        if rule.targets is not None:
            self.dots = torch.zeros(n, len(rule.targets), dtype=torch.float64, **where)
        if rule.sketch is not None:
            self.sketch = torch.zeros(n, rule.sketch.k, dtype=working, **where)
        if rule.dense:
            self.dense = torch.zeros(n, forward.n_parameters, dtype=working, **where)

    def __call__(self, part: ModuleTokens) -> None:
        module, rule = part.module, self._rule
        columns = slice(module.first, module.first + module.size)
        adam = rule.adam_of(module.first, module.size)
        if self.dense is not None:
            self.dense[part.examples, columns] = _whole(part, adam, rule.step, self.dense.dtype)
            if self.dots is None and self.sketch is None:
                self.sqnorms[part.examples] += self.dense[part.examples, columns].square().sum(1, dtype=torch.float64)
                return
        spec = None if rule.sketch is None else rule.sketch._replace(first=rule.sketch.first + module.first)
        reduced = lora_gradient_sketch(
            part.x,
            part.delta,
            module.lora_a,
            module.lora_b,
            part.offsets,
            scale=part.scale,
            adam=adam,
            sign=rule.step == "sign",
            targets=None if rule.targets is None else rule.targets[:, columns],
            sketch=spec,
            out=None if self.sketch is None else self.sketch[part.examples],
            implementation=self._implementation,
        )
        self.sqnorms[part.examples] += reduced.sqnorms
        if self.dots is not None and reduced.dots is not None:
            self.dots[part.examples] += reduced.dots


def _whole(part: ModuleTokens, adam: AdamStep | None, step: str, dtype: torch.dtype) -> torch.Tensor:
    """[n, p_module]: the gradients themselves, stepped."""
    module, bounds = part.module, part.offsets.tolist()
    lora_a, lora_b, x, delta = (tensor.to(dtype) for tensor in (module.lora_a, module.lora_b, part.x, part.delta))
    low_delta, low_x = (delta @ lora_b) * part.scale, (x @ lora_a.T) * part.scale
    g = torch.stack(
        [
            torch.cat([(low_delta[a:b].T @ x[a:b]).reshape(-1), (delta[a:b].T @ low_x[a:b]).reshape(-1)])
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
    )
    if step == "sign":
        return torch.where(g.isnan(), g, g.sign())  # torch's sign of NaN is 0
    if adam is None:
        return g
    f_m, f_g, f_v, f_gg = adam.factors()
    second = f_v * adam.exp_avg_sq.to(dtype) + f_gg * g.square()
    root = (second + adam.eps).sqrt() if adam.eps_inside else second.sqrt() + adam.eps
    assert adam.exp_avg is not None
    return (f_m * adam.exp_avg.to(dtype) + f_g * g) / root.masked_fill(root == 0, torch.inf)


def as_stored(
    sketch: torch.Tensor,
) -> tuple[NDArray[np.float16], NDArray[np.int16], NDArray[np.float32]]:
    """float16 [n, k], exponents [n] and norms [n]: row = float16 row * 2^exponent, exact but for float16's 11 bits."""
    largest = sketch.abs().amax(1).double()
    _, exponent = torch.frexp(torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0))
    exponent = exponent - TOP_EXPONENT
    scaled = torch.ldexp(sketch.double(), -exponent[:, None])
    norms = torch.linalg.vector_norm(sketch.double(), dim=1).to(torch.float32)
    return scaled.to(torch.float16).cpu().numpy(), exponent.to(torch.int16).cpu().numpy(), norms.cpu().numpy()


def batches(rows: Sequence[TrainingRow], batch_tokens: int) -> Iterator[list[TrainingRow]]:
    """Batches of at most batch_tokens tokens, short rows first; one row alone may exceed it."""
    batch: list[TrainingRow] = []
    filled = 0
    for row in sorted(rows, key=lambda row: (row.size, row.row_id)):
        if batch and filled + row.size > batch_tokens:
            yield batch
            batch, filled = [], 0
        batch.append(row)
        filled += row.size
    if batch:
        yield batch


def _name(row: TrainingRow) -> bytes:
    digest = xxhash.xxh3_128()
    for ids, labelled in row.sequences:
        digest.update(np.array([len(ids), *ids, *labelled], "<i8").tobytes())
    return digest.digest()


def moved(rule: GradientRule, device: torch.device) -> GradientRule:
    """The rule with its tensors on a device."""
    moments, targets = rule.moments, rule.targets
    if moments is not None:
        moments = moments._replace(exp_avg=moments.exp_avg.to(device), exp_avg_sq=moments.exp_avg_sq.to(device))
    return replace(rule, moments=moments, targets=None if targets is None else targets.to(device))
