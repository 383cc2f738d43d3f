"""Whole tasks on the GPU that is here, beside plain torch and transformers: python measure_gpu.py -o FILE.jsonl

losses      per-token losses of IFD's two passes under a Llama of 1.2B random weights in bfloat16: packed, and padded
gradients   per-example gradients of LoRA (r = 8 on q, k, v, o) under the same model, Adam's step and SJLT to 8,192:
            packed, and by autograd one row at a time, without step and projection
selectors   facility location, k-center greedy and NovelSelect of 200,000 x 384; loops of plain torch where these take
            seconds

Seconds are of the wall clock with the device idle at both ends, once, after a run over fewer rows. --divide makes
everything smaller, and then it runs on a CPU too.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastsel import selectors
from fastsel.kernels.linear_token_stats import linear_token_stats
from fastsel.models.loading import load_model
from fastsel.models.packed import PackedForward, pack

HIDDEN, LAYERS, HEADS, KEY_HEADS, INNER, WORDS = 2048, 16, 32, 8, 8192, 128_256  # Llama-3.2-1B's shape
BATCH_TOKENS, BATCHES = 16_384, 6
N, D, CENTRES = 200_000, 384, 1000
PICKS = {"facility_location": 1000, "k_center": 1000, "novelselect": 300}
PLAIN_PICKS = {"facility_location": 3, "k_center": 1000, "novelselect": 300}


def seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall time of one call, and what it returned."""
    wait(device)
    started = time.perf_counter()
    result = run()
    wait(device)
    return time.perf_counter() - started, result


def wait(device: torch.device) -> None:
    """Until the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------ losses


def llama(device: torch.device, divide: int) -> Any:
    """A Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS // divide, hidden_size=HIDDEN, intermediate_size=INNER // divide,
        num_hidden_layers=max(1, LAYERS // divide), num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS,
        max_position_embeddings=8192, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def sequences_of_rows(n: int, words: int) -> list[tuple[list[int], int]]:
    """(tokens, first scored) of both passes of each row: a template of 30 tokens, 10 to 170 of its own, 30 to 300 of an
    answer, as in Alpaca with GPT-4's answers; and the answer alone.
    """
    draw = np.random.default_rng(0)
    template = draw.integers(2, words, 30).tolist()
    found = []
    for _ in range(n):
        prompt = template + draw.integers(2, words, draw.integers(10, 170)).tolist()
        answer = draw.integers(2, words, draw.integers(30, 300)).tolist()
        found += [(prompt + answer, len(prompt)), ([1, *answer], 1)]
    return found


def in_batches(sequences: list[tuple[list[int], int]], most: int, *, padded: bool) -> Iterator[list[int]]:
    """Numbers of sequences, short ones first, of at most so many tokens, padding counted or not."""
    batch: list[int] = []
    filled = 0
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i][0])):
        size = len(sequences[i][0])
        total = size * (len(batch) + 1) if padded else filled + size
        if batch and total > most:
            yield batch
            batch, filled = [], 0
        batch.append(i)
        filled += size
    yield batch


def packed_losses(
    forward: PackedForward, sequences: list[tuple[list[int], int]], most: int
) -> tuple[torch.Tensor, int]:
    """Mean loss of each sequence, and the tokens that went through the model."""
    means, computed = torch.zeros(len(sequences)), 0
    for members in in_batches(sequences, most, padded=False):
        batch = pack([sequences[i][0] for i in members])
        spans = [(len(sequences[i][0]), sequences[i][1]) for i in members]
        rows = torch.cat([batch.rows(j, first - 1, size - 1) for j, (size, first) in enumerate(spans)])
        hidden = forward.hidden_states(batch, rows)
        targets = torch.tensor([t for i in members for t in sequences[i][0][sequences[i][1] :]], device=hidden.device)
        head = forward.head
        nll = linear_token_stats(hidden, head.weight, targets, head.bias, head.softcap, head.scale).nll
        assert nll is not None
        parts = nll.cpu().split([size - first for size, first in spans])
        means[members] = torch.stack([part.mean() for part in parts])
        computed += batch.segments.n_tokens
    return means, computed


@torch.inference_mode()
def padded_losses(model: Any, sequences: list[tuple[list[int], int]], most: int) -> tuple[torch.Tensor, int]:
    """The same by transformers alone: padded batches of sequences of similar length, all logits."""
    means, computed, device = torch.zeros(len(sequences)), 0, model.device
    for members in in_batches(sequences, most, padded=True):
        longest = max(len(sequences[i][0]) for i in members)
        ids = torch.tensor([sequences[i][0] + [0] * (longest - len(sequences[i][0])) for i in members])
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for line, i in enumerate(members):
            tokens, first = sequences[i]
            labels[line, first : len(tokens)] = ids[line, first : len(tokens)]
            mask[line, : len(tokens)] = 1
        labels = labels.to(device)
        next_ones = F.pad(labels[:, 1:], (0, 1), value=-100)
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        nll = F.cross_entropy(logits.float().flatten(0, 1), next_ones.flatten(), reduction="none")
        means[members] = (nll.view_as(next_ones).sum(1) / (next_ones >= 0).sum(1)).float().cpu()
        computed += ids.numel()
    return means, computed


def measure_losses(device: torch.device, divide: int) -> Iterator[dict[str, Any]]:
    """Tokens a second are of the sequences as they are, whatever was padded or shared."""
    model = llama(device, divide)
    words = model.config.vocab_size
    matrices = sum(p.numel() for p in model.parameters()) - words * HIDDEN
    most = BATCH_TOKENS // divide
    rows = sequences_of_rows(max(4, BATCHES * most // 470), words)
    n_tokens = sum(len(tokens) for tokens, _ in rows)
    n_scored = sum(len(tokens) - first for tokens, first in rows)
    few = rows[: max(4, len(rows) // 3)]
    loaded = load_model((model, lambda *_: None))
    took, forward = seconds(lambda: PackedForward(loaded), device)
    yield {"task": "making and checking a PackedForward", "seconds": took, "path": forward.path,
           "ran": dict(forward.implementations)}  # fmt: skip
    runs: dict[str, Callable[[list[tuple[list[int], int]]], tuple[torch.Tensor, int]]] = {
        "packed (fastsel)": lambda some: packed_losses(forward, some, most),
        "padded (transformers)": lambda some: padded_losses(model, some, most),
    }
    results = {}
    for name, run in runs.items():
        run(few)
        took, (results[name], computed) = seconds(partial(run, rows), device)
        flops = 2 * matrices * computed + 2 * words * HIDDEN * (n_scored if "packed" in name else computed)
        yield {"task": f"losses, {name}", "seconds": took, "tokens_a_second": n_tokens / took, "computed": computed,
               "tokens": n_tokens, "model_tflops_a_second": flops / took / 1e12}  # fmt: skip
    ours, theirs = results.values()
    yield {"task": "losses, largest difference of a mean, bfloat16", "value": float((ours - theirs).abs().max()),
           "mean_loss": float(theirs.mean())}  # fmt: skip


# ------------------------------------------------------------------------------------ gradients


def measure_gradients(device: torch.device, divide: int) -> Iterator[dict[str, Any]]:
    """The full sequences of the same rows; made-up moments."""
    import peft

    from fastsel.features.gradient_rows import AdamMoments, BatchFeatures, GradientRule
    from fastsel.kernels.lora_gradient_sketch import SketchSpec
    from fastsel.models.lora_forward import LabelledSequence, LoraForward

    base = llama(device, divide)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    took, forward = seconds(lambda: LoraForward(load_model((model, lambda *_: None))), device)
    yield {"task": "making and checking a LoraForward", "seconds": took, "path": forward.path,
           "parameters": forward.n_parameters, "ran": dict(forward.implementations)}  # fmt: skip
    words = base.config.vocab_size
    rows = [
        [LabelledSequence(tokens, range(first, len(tokens)))]
        for tokens, first in sequences_of_rows(max(4, 128 // divide), words)[::2]
    ]
    n_tokens = sum(len(row[0].ids) for row in rows)
    moments = AdamMoments(*(torch.rand(forward.n_parameters, device=device) * size for size in (1e-4, 1e-8)), step=100)
    rule = GradientRule(step="adam", moments=moments, sketch=SketchSpec(8192))

    def ours(some: list[list[Any]]) -> torch.Tensor:
        norms = torch.zeros(len(some), dtype=torch.float64)
        order = sorted(range(len(some)), key=lambda i: len(some[i][0].ids))
        for start in range(0, len(order), 8):
            members = order[start : start + 8]
            features = BatchFeatures(len(members), forward, rule, "auto")
            forward.run([some[i] for i in members], features)
            norms[members] = features.sqnorms.cpu()
        return norms

    parameters = [p for p in model.parameters() if p.requires_grad]

    def one_by_one(some: list[list[Any]]) -> None:
        for ((ids, labelled),) in some:
            tokens = torch.tensor(ids, device=device)
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, labelled.start - 1 : -1]
            loss = F.cross_entropy(logits.float(), tokens[labelled.start :])
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])

    for name, run in (("packed, Adam and SJLT (fastsel)", ours), ("autograd, one row at a time", one_by_one)):
        run(rows[:16])
        took, norms = seconds(partial(run, rows), device)
        found = {"task": f"gradients, {name}", "seconds": took, "rows": len(rows), "tokens_a_second": n_tokens / took}
        yield found if norms is None else found | {"finite": bool(torch.isfinite(norms).all())}


# ------------------------------------------------------------------------------------ selectors


def clustered(n: int, d: int, device: torch.device) -> torch.Tensor:
    """Unit rows around centres, drawn on the device."""
    generator = torch.Generator(device).manual_seed(0)
    centres = torch.randn(CENTRES, d, device=device, generator=generator)
    of = torch.randint(0, CENTRES, (n,), device=device, generator=generator)
    noise = torch.randn(n, d, device=device, generator=generator)
    return F.normalize(centres[of] + noise, dim=1)


def plain_facility_location(x: torch.Tensor, k: int) -> list[int]:
    """A pass over all pairs before each pick: [n, n] does not fit."""
    best = torch.zeros(len(x), device=x.device)
    picks: list[int] = []
    for _ in range(k):
        gains = torch.zeros(len(x), device=x.device)
        step = max(1, 2**29 // len(x))
        for start in range(0, len(x), step):
            gains += (x @ x[start : start + step].T - best[start : start + step]).clamp_(min=0).sum(1)
        gains[picks] = -torch.inf
        picks.append(int(gains.argmax()))
        best = torch.maximum(best, x @ x[picks[-1]])
    return picks


def plain_k_center(x: torch.Tensor, k: int) -> list[int]:
    """One new centre after another; a pick is not looked at on the CPU before the end."""
    nearest = torch.full((len(x),), torch.inf, device=x.device)
    pick = torch.zeros((), dtype=torch.int64, device=x.device)
    picks = []
    for _ in range(k):
        picks.append(pick)
        nearest = torch.minimum(nearest, 2 - 2 * (x @ x[pick]))
        pick = nearest.argmax()
    return [int(pick) for pick in picks]


def plain_novelselect(x: torch.Tensor, k: int, density: torch.Tensor) -> list[int]:
    """All distances to the picks are sorted before each pick, as in the authors' code."""
    values = torch.empty(len(x), k, device=x.device)
    weights = 1 / torch.arange(1, k + 1, device=x.device)
    picks = [0]
    for t in range(1, k):
        values[:, t - 1] = (1 - x @ x[picks[-1]]) * (density + density[picks[-1]])
        scores = values[:, :t].sort(1).values @ weights[:t]
        scores[picks] = -torch.inf
        picks.append(int(scores.argmax()))
    return picks


def measure_selectors(device: torch.device, divide: int) -> Iterator[dict[str, Any]]:
    """Ours and plain loops; they need not agree to the row, as float32 decides the plain ones."""
    n = N // divide
    x, few = clustered(n, D, device), clustered(max(200, n // 20), D, device)
    density = 1 + torch.rand(n, device=device, dtype=torch.float64)
    ours: dict[str, Callable[[torch.Tensor, int], Any]] = {
        "facility_location": lambda x, k: selectors.facility_location(x, k),
        "k_center": lambda x, k: selectors.k_center(x, k, metric="cosine"),
        "novelselect": lambda x, k: selectors.novelselect(x, k, first=0, density=density[: len(x)].cpu().numpy()),
    }
    plain: dict[str, Callable[[torch.Tensor, int], list[int]]] = {
        "facility_location": plain_facility_location,
        "k_center": plain_k_center,
        "novelselect": lambda x, k: plain_novelselect(x, k, density[: len(x)].float()),
    }
    for name in ours:
        k = max(2, PICKS[name] // divide)
        found: dict[str, Any] = {"task": f"{name}, {n:,} x {D}, k = {k:,}", "dtype": "float32"}
        try:
            ours[name](few, k)  # as many picks: kernels are compiled for their number
            found["seconds"], (picks, _) = seconds(partial(ours[name], x, k), device)
            most = max(2, PLAIN_PICKS[name] // divide)
            plain[name](few, 2)
            found["torch_seconds"], theirs = seconds(partial(plain[name], x, most), device)
            found["torch_picks"] = most
            found["same_first_picks"] = int(np.cumprod(picks[:most] == np.array(theirs)).sum())
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        yield found
    took, _ = seconds(lambda: selectors.novelselect(x, 2), device)
    yield {"task": f"density of {n:,} rows and 2 picks of novelselect", "dtype": "float32", "seconds": took}


TASKS: dict[str, Callable[[torch.device, int], Iterator[dict[str, Any]]]] = {
    "losses": measure_losses,
    "gradients": measure_gradients,
    "selectors": measure_selectors,
}


def main() -> None:
    """Run the tasks named, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--divide", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    with given.output.open("a") as file:
        for task in given.tasks or TASKS:
            try:
                for row in TASKS[task](torch.device(given.device), given.divide):
                    print(json.dumps(row), flush=True)
                    file.write(json.dumps(row) + "\n")
            except Exception as error:
                print(f"{task}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
