"""The rows of measure_triton.py: for each kernel at a size, our launches, their prediction, the same in plain torch.

Sizes are those of predict_triton.py where a call takes less than a second, else smaller.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import predict_triton
import torch
import torch.nn.functional as F
from predict_triton import STATS, TREES, one_prompt_many_answers, pairs_of_passes

from fastsel.kernels._runtime.triton_launch import Launch
from fastsel.kernels._runtime.triton_predict import Chip, predict, predict_straight, predict_streaming
from fastsel.kernels._runtime.triton_proof import compile_launch, machine_code
from fastsel.kernels.facility_location import gpu_triton as gains
from fastsel.kernels.k_center import gpu_triton as nearest
from fastsel.kernels.label_gain import gpu_triton as labels
from fastsel.kernels.label_gain.cases import CASES as LABEL_CASES
from fastsel.kernels.label_gain.cases import make_inputs as label_inputs
from fastsel.kernels.linear_token_stats import gpu_triton as stats
from fastsel.kernels.linear_token_stats.cases import ALL_OUTPUTS
from fastsel.kernels.lora_gradient_sketch import AdamStep, SketchSpec
from fastsel.kernels.lora_gradient_sketch import gpu_triton as lora
from fastsel.kernels.novelty import gpu_triton as novel
from fastsel.kernels.random_projection import gpu_triton as projection
from fastsel.kernels.swiglu import gpu_triton as gated
from fastsel.kernels.topk_similarity import gpu_triton as topk
from fastsel.kernels.tree_attention import gpu_triton as tree
from fastsel.kernels.tree_attention.segments import Segments

D = 1024
GAINS = {  # candidates, points, and what else is given
    "first pass of 100,000": (100_000, 100_000, {}),
    "first pass of 100,000, exp_distance": (100_000, 100_000, {"similarity": "exp_distance"}),
    "10,000 of 1M points moved": (1_000_000, 10_000, {"raised": True}),
    "1,000 of 1M points moved": (1_000_000, 1000, {"raised": True}),
    "100 of 1M points moved": (1_000_000, 100, {"raised": True}),
    "16 contenders, 1M points": (16, 1_000_000, {}),
}
NEIGHBOURS = {  # queries, points, features
    "100,000 among 100,000, d = 1,024": (100_000, 100_000, 1024),
    "20,000 among 1M, d = 384": (20_000, 1_000_000, 384),
}
PROJECTED, COORDINATES, SKETCH = 64, 2**25, 8192
TORCH_VALUES = 2**29  # of a product that plain torch makes at a time: 2 GB in float32


class Row(NamedTuple):
    """One line of the table.

    launches: ours.
    predict: the predicted seconds and the floor of those launches, on a chip.
    plain: the same by plain torch, or None.
    share: of the work that plain does; its time is divided by it.
    """

    launches: list[Launch]
    predict: Callable[[Chip], tuple[float, float]]
    plain: Callable[[], Any] | None
    share: float = 1.0


class Maker:
    """Tensors on a device, random, or without memory on the device "meta"; launches of an architecture."""

    def __init__(self, device: str, architecture: str) -> None:
        self.device, self.architecture = torch.device(device), architecture

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers, drawn in parts: a float32 copy of a large tensor of 16 bits may not fit."""
        out = torch.empty(shape, dtype=dtype, device=self.device)
        if self.device.type != "meta":
            flat = out.view(-1)
            for start in range(0, flat.numel(), 2**28):
                part = flat[start : start + 2**28]
                part.copy_(scale * torch.randn(part.shape, device=self.device))
        return out

    def unit(self, n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows of length about 1."""
        return self.normal(n, d, dtype=dtype, scale=d**-0.5)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """0 to 1."""
        return torch.rand(shape, dtype=dtype, device=self.device)

    def numbers(self, below: int, n: int) -> torch.Tensor:
        """Int64."""
        return torch.randint(0, below, (n,), device=self.device)


def _predicted(launch: Launch, work: Any, chip: Chip) -> tuple[float, float]:
    found = predict(machine_code(compile_launch(launch, chip.architecture), chip.architecture), work, chip)
    return found.seconds, found.floor_seconds


def _streamed(launch: Launch, chip: Chip, **work: Any) -> tuple[float, float]:
    code = machine_code(compile_launch(launch, chip.architecture), chip.architecture)
    found = predict_streaming(code, chip=chip, **work)
    return found.seconds, found.floor_seconds


def _unknown(chip: Chip) -> tuple[float, float]:
    return float("nan"), float("nan")


def token_stats_row(make: Maker, dtype: torch.dtype, sizes: tuple[int, int, int], outputs: tuple[str, ...]) -> Row:
    n_tokens, n_words, n_features = sizes
    hidden = make.normal(n_tokens, n_features, dtype=dtype)
    weight = make.normal(n_words, n_features, dtype=dtype, scale=3 * n_features**-0.5)
    targets = make.numbers(n_words, n_tokens)
    options = (hidden, weight, targets, None, None, 1.0, outputs)
    launches = stats.plan(*options, architecture=make.architecture)[1]

    def plain() -> Any:
        logits = (hidden @ weight.T).float()
        if len(outputs) == 1:
            return F.cross_entropy(logits, targets, reduction="none")
        logprobs = F.log_softmax(logits, dim=1)
        entropy = -(logprobs.exp() * logprobs).sum(1)
        return logprobs.gather(1, targets[:, None]), entropy, logprobs.topk(2, dim=1)

    return Row(launches, partial(_predicted, launches[0], stats.work(launches[0], *sizes)), plain)


def attention_row(make: Maker, dtype: torch.dtype, heads: tuple[int, int, int], segments: Segments) -> Row:
    n_heads, n_key_heads, head = heads
    query = make.normal(segments.n_tokens, n_heads, head, dtype=dtype)
    key, value = (make.normal(segments.n_tokens, n_key_heads, head, dtype=dtype) for _ in range(2))
    options = (query, key, value, segments, None, None, head**-0.5)
    launches = tree.plan(*options, architecture=make.architecture)[1]
    paths = [s for s in range(len(segments)) if s not in segments.parent_list]

    def plain() -> Any:
        """Each sequence from its first token, as without packing; what sequences share is computed for each."""
        out = []
        for leaf in paths:
            spans = [slice(segments.start_list[s], segments.start_list[s + 1]) for s in segments.path(leaf)]
            q, k, v = (torch.cat([x[span] for span in spans]).transpose(0, 1)[None] for x in (query, key, value))
            out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        return out

    return Row(launches, partial(_predicted, launches[0], tree.work(launches[0], segments, head)), plain)


def gains_row(
    make: Maker, dtype: torch.dtype, n: int, m: int, raised: bool = False, similarity: str = "dot"
) -> Row:  # fmt: skip
    candidates, points = make.unit(n, D, dtype), make.unit(m, D, dtype)
    best = 0.03 * make.uniform(m)
    higher = best + 0.05 if raised else None
    options = (best, higher, None, similarity, 1.0)
    launches = gains.plan(candidates, points, *options, architecture=make.architecture)[1]

    def plain() -> Any:
        total = torch.zeros(n, dtype=torch.float64, device=make.device)
        step = max(1, TORCH_VALUES // n)
        for start in range(0, m, step):
            over = slice(start, start + step)
            s = (candidates @ points[over].T).float()
            if similarity != "dot":
                s = torch.exp(-(2 - 2 * s).clamp_(min=0).sqrt_())
            added = (s - best[over]).clamp_(min=0)
            if higher is not None:
                added -= (s - higher[over]).clamp_(min=0)
            total += added.sum(1)
        return total

    return Row(launches, partial(_predicted, launches[-1], gains.work(launches[-1], n, m, D)), plain)


def nearest_row(make: Maker, dtype: torch.dtype, b: int) -> Row:
    n = 1_000_000
    points, centres = make.unit(n, D, dtype), make.unit(b, D, dtype)
    point_sqnorms, centre_sqnorms = (make.uniform(x) + 0.5 for x in (n, b))
    launches = nearest.plan(points, centres, None, None, point_sqnorms, centre_sqnorms, architecture=make.architecture)[
        1
    ]

    def plain() -> Any:
        squares = (points @ centres.T).float().mul_(-2).add_(centre_sqnorms)
        return squares.amin(1).add_(point_sqnorms).clamp_(min=0)

    return Row(launches, partial(_predicted, launches[0], nearest.work(launches[0], n, b, D)), plain)


def neighbours_row(make: Maker, dtype: torch.dtype, b: int, n: int, d: int) -> Row:
    queries, points, itself = make.unit(b, d, dtype), make.unit(n, d, dtype), make.numbers(n, b)
    launches = topk.plan(queries, points, 10, "dot", itself, True, architecture=make.architecture)[1]

    def plain() -> Any:
        out = []
        step = max(1, TORCH_VALUES // n)
        for some, own in zip(queries[: b // 4].split(step), itself[: b // 4].split(step), strict=True):
            s = (some @ points.T).float()
            out.append(s.scatter_(1, own[:, None], -torch.inf).topk(10, dim=1))
        return out

    return Row(launches, partial(_predicted, launches[0], topk.work(launches[0], b, n, d)), plain, 0.25)


def novelty_row(make: Maker, dtype: torch.dtype, n: int, t: int, rank_by: str) -> Row:
    rows, picks = make.unit(n, D, dtype), make.unit(t, D, dtype)
    weights, density = make.uniform(t, 1, dtype=torch.float64), make.uniform(n, dtype=torch.float64) + 1
    of_picks = make.uniform(t, dtype=torch.float64) + 1
    launches = novel.plan(rows, picks, weights, density, of_picks, rank_by, architecture=make.architecture)[1]

    def plain() -> Any:
        values = (1 - (rows @ picks.T).float()) * (density[:, None] + of_picks).float()
        if rank_by == "order":
            return values.double() @ weights
        return values.sort(1).values.double() @ weights

    def predicted(chip: Chip) -> tuple[float, float]:
        if rank_by != "order":
            return _predicted(launches[0], novel.work(launches[0], n, t, D), chip)
        needed = n * (D * dtype.itemsize + 8 + 4)
        passes = D // launches[0].constants["BLOCK_D"]
        return _streamed(launches[0], chip, programs=launches[0].grid[0], passes=passes, needed_bytes=needed)

    return Row(launches, predicted, plain)


def lora_row(make: Maker, mode: str) -> Row:
    n, tokens, d, r = predict_triton.LORA
    p, kind = 2 * r * d, torch.bfloat16
    x, delta = (make.normal(n * tokens, d, dtype=kind) for _ in range(2))
    lora_a, lora_b = make.normal(r, d, dtype=kind, scale=d**-0.5), make.normal(d, r, dtype=kind, scale=r**-0.5)
    state = AdamStep(make.normal(p, dtype=torch.float32, scale=1e-3), 1e-6 * make.uniform(p))
    offsets = torch.arange(0, n * tokens + 1, tokens, device=make.device)
    targets = make.normal(16, p, dtype=kind) if mode == "direct" else None
    spec = SketchSpec(SKETCH) if mode == "sketch" else None
    options = (2.0, state, False, targets, spec, None)
    launches = lora.plan(x, delta, lora_a, lora_b, offsets, *options, architecture=make.architecture)[1]
    where = signs = None
    if mode == "sketch":
        where = make.numbers(SKETCH, p)
        signs = make.uniform(p).sub_(0.5).sign_() if make.device.type != "meta" else make.uniform(p)

    def plain() -> Any:
        low_delta, low_x = ((delta @ lora_b) * 2.0).view(n, tokens, r), ((x @ lora_a.T) * 2.0).view(n, tokens, r)
        in_a = torch.einsum("ntr,ntd->nrd", low_delta, x.view(n, tokens, d)).reshape(n, -1)
        in_b = torch.einsum("ntd,ntr->ndr", delta.view(n, tokens, d), low_x).reshape(n, -1)
        g = torch.cat([in_a, in_b], 1).float()
        gamma = (0.9 * state.exp_avg + 0.1 * g) / (0.999 * state.exp_avg_sq + 0.001 * g.square() + 1e-8).sqrt()
        sqnorms = gamma.square().sum(1)
        if targets is not None:
            return gamma.to(kind) @ targets.T, sqnorms
        return torch.zeros(n, SKETCH, device=make.device).index_add_(1, where, gamma * signs), sqnorms

    def predicted(chip: Chip) -> tuple[float, float]:
        parts, floor = predict_triton.lora_module(chip, mode)
        return sum(parts.values()), floor

    return Row(launches, predicted, plain)


def projection_row(make: Maker, dtype: torch.dtype, kind: str, coordinates: int = COORDINATES) -> Row:
    x = make.normal(PROJECTED, coordinates, dtype=dtype)
    out = torch.zeros(PROJECTED, SKETCH, device=make.device)
    launches = projection.plan(x, SKETCH, kind, 1, 5, 0, out, architecture=make.architecture)

    def predicted(chip: Chip) -> tuple[float, float]:
        launch = launches[0]
        if kind == "rademacher":
            return _predicted(launch, projection.work(launch, PROJECTED, coordinates, SKETCH), chip)
        c = launch.constants
        return _streamed(
            launch, chip, programs=launch.grid[0] * launch.grid[1] * launch.grid[2],
            passes=1 << (c["SEGMENT_BITS"] - c["BITS"]),
            needed_bytes=PROJECTED * (coordinates * dtype.itemsize + 8 * SKETCH * launch.grid[0]),
            gathered=c["ROWS"] * c["BLOCK_K"] * dtype.itemsize // 4,
        )  # fmt: skip

    where = make.numbers(SKETCH, coordinates) if kind == "sjlt" else None
    signs = (make.numbers(2, coordinates) * 2 - 1).to(dtype) if kind == "sjlt" else None

    def plain() -> Any:
        if kind == "sjlt":  # in float32, and the map is given
            sums = torch.zeros(PROJECTED, SKETCH, device=make.device)
            step = 2**23
            for start in range(0, coordinates, step):
                over = slice(start, start + step)
                sums.index_add_(1, where[over], (x[:, over] * signs[over]).float())  # type: ignore[index]
            return sums
        total = torch.zeros(PROJECTED, SKETCH, device=make.device)
        step = TORCH_VALUES // SKETCH
        for start in range(0, coordinates // 16, step):
            matrix = torch.randint(0, 2, (step, SKETCH), device=make.device, dtype=torch.int8)
            total += x[:, start : start + step] @ matrix.mul_(2).sub_(1).to(dtype)
        return total

    return Row(launches, predicted, plain, 1.0 if kind == "sjlt" else 1 / 16)


def label_row(make: Maker, dtype: torch.dtype, rule: str) -> Row:
    if make.device.type == "meta":
        return Row([], _unknown, None)
    label_rows, state, *_ = label_inputs(LABEL_CASES["tulu3"], dtype, make.device)
    launches = labels.plan(label_rows, state, None, rule, "power", 1e-6, 0.8, 1.0, architecture=make.architecture)[1]
    owner = torch.arange(len(label_rows), device=make.device).repeat_interleave(label_rows.indptr.diff())

    def plain() -> Any:
        e, s = label_rows.values.double(), state[label_rows.indices.long()]
        added = e * (0.8 * (s + 1e-6) ** -0.2) if rule == "first_order" else (s + e + 1e-6) ** 0.8 - (s + 1e-6) ** 0.8
        return torch.zeros(len(label_rows), dtype=torch.float64, device=make.device).index_add_(0, owner, added)

    return Row(launches, _unknown, plain)


def swiglu_row(make: Maker, dtype: torch.dtype, gradient: bool) -> Row:
    """Plain torch keeps silu(gate) from the forward pass for the gradient, which ours forms again."""
    gate, up, d_out = (make.normal(*predict_triton.GATED, dtype=dtype) for _ in range(3))
    launches = gated.plan(gate, up, d_out if gradient else None, None, architecture=make.architecture)[1]
    silu = F.silu(gate)

    def plain() -> Any:
        return (torch.ops.aten.silu_backward(d_out * up, gate), d_out * silu) if gradient else F.silu(gate) * up

    def predicted(chip: Chip) -> tuple[float, float]:
        launch, needed = predict_triton.gated_launch(chip.architecture, dtype, gradient)
        code = machine_code(compile_launch(launch, chip.architecture), chip.architecture)
        found = predict_straight(code, launch.grid[0], needed, chip)
        return found.seconds, found.floor_seconds

    return Row(launches, predicted, plain)


def rows() -> Iterator[tuple[str, str, Callable[[Maker], Row]]]:
    """Label, dtype and what makes the row."""
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for name, sizes in STATS.items():
            for outputs in (("nll",), ALL_OUTPUTS):
                what = "nll" if len(outputs) == 1 else "all outputs"
                made = partial(token_stats_row, dtype=dtype, sizes=sizes, outputs=outputs)
                yield f"linear_token_stats, {name}, {what}", kind, made
        for name, heads in TREES.items():
            for shape, forest in (("IFD pairs", pairs_of_passes), ("prompt + 8", one_prompt_many_answers)):
                made = partial(_attention, dtype=dtype, heads=heads, forest=forest)
                yield f"tree_attention, {name}, {shape}", kind, made
        for name, (n, m, given) in GAINS.items():
            yield f"facility_location, {name}", kind, partial(gains_row, dtype=dtype, n=n, m=m, **given)
        for b in predict_triton.CENTRES:
            yield f"k_center, 1M points, {b:,} centres", kind, partial(nearest_row, dtype=dtype, b=b)
        for name, (b, n, d) in NEIGHBOURS.items():
            yield f"topk_similarity, {name}", kind, partial(neighbours_row, dtype=dtype, b=b, n=n, d=d)
        for t in (1000, 4000):
            made = partial(novelty_row, dtype=dtype, n=256, t=t, rank_by="weighted")
            yield f"novelty, scores of 256 contenders, {t:,} picks (predicted: the distances alone)", kind, made
        made = partial(novelty_row, dtype=dtype, n=1_000_000, t=1, rank_by="order")
        yield "novelty, append bound of 1M rows", kind, made
        for of in ("sjlt", "rademacher"):
            label = f"random_projection, {of}, {PROJECTED} x {COORDINATES:,} to {SKETCH:,}"
            yield label, kind, partial(projection_row, dtype=dtype, kind=of)
        for what, gradient in (("forward", False), ("gradient", True)):
            yield f"swiglu, {what}, 4,096 x 11,008", kind, partial(swiglu_row, dtype=dtype, gradient=gradient)
        if dtype == torch.float32:
            for rule in ("first_order", "exact"):
                yield f"label_gain, Tulu3, {rule}", kind, partial(label_row, dtype=dtype, rule=rule)
        else:
            for mode in ("direct", "sketch"):
                yield (
                    f"lora_gradient_sketch, a module of Llama-2-7B, 16 rows, {mode}",
                    kind,
                    partial(lora_row, mode=mode),
                )


def _attention(make: Maker, dtype: torch.dtype, heads: tuple[int, int, int], forest: Callable[[], Segments]) -> Row:
    return attention_row(make, dtype, heads, forest())
