"""Does fastsel.less rank real rows as whole gradients in float64 do? Prints one table; takes about 25 CPU-minutes.

    python benchmarks/less_truth.py --pool pool.jsonl --target gsm8k.jsonl --checkpoints warm/ --work folder

The reference shares nothing with LESS's engine but the tokens of a row: the model and its adapter in float64 (norms
too, which drop to float32 otherwise), peft's own layers, autograd, one row at a time; Adam's step as LESS's code has
it, with moments read from optimizer.pt in the order of its numbers; a cosine with each target row; their mean. Where
two rows' scores are closer than rounding, no ranking is wrong: the smallest gap stands beside the largest difference.

What is done is kept in --work and read again. --steps runs some of: truth direct sketch.
"""

import argparse
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch

import fastsel
from fastsel.features.training_rows import TrainingTokenizer
from fastsel.io.templates import load_template
from fastsel.kernels.random_projection import random_projection
from fastsel.models.loading import load_model

SKETCH = 8192


class Reference:
    """Gradients of LoRA matrices in float64, by autograd through peft's layers, one row at a time."""

    def __init__(self, checkpoint, max_length):
        import peft

        base = load_model("bundled", device="cpu", dtype="float32")
        template = load_template("less", base.tokenizer)
        self.tokenise = TrainingTokenizer(base.tokenizer, template, max_length=max_length)
        self.model = peft.PeftModel.from_pretrained(base.model.double(), str(checkpoint), is_trainable=True)
        self.model.double().eval()
        for module in self.model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = types.MethodType(norm_in_float64, module)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        assert [state[i]["exp_avg"].shape for i in sorted(state)] == [p.shape for p in self.parameters]
        self.first, self.second = (
            torch.cat([state[i][name].double().reshape(-1) for i in sorted(state)])
            for name in ("exp_avg", "exp_avg_sq")
        )

    def gradients(self, path):
        """Yields (row, gradient [p]) of each row of a file that has one."""
        pool = fastsel.open_pool(path)
        for row in self.tokenise(pool.examples(range(len(pool)))):
            if not row.sequences:
                continue
            total, count = torch.zeros((), dtype=torch.float64), 0
            for ids, labelled in row.sequences:
                places = torch.tensor(labelled)
                logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, places - 1]
                assert logits.dtype == torch.float64
                total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(ids)[places], reduction="sum")
                count += len(labelled)
            pieces = torch.autograd.grad(total / count, self.parameters)
            yield row.row_id, torch.cat([piece.reshape(-1) for piece in pieces])

    def adam(self, g):
        """LESS's feature: eps inside the root, nothing corrected."""
        return (0.9 * self.first + 0.1 * g) / torch.sqrt(0.999 * self.second + 0.001 * g**2 + 1e-8)


def norm_in_float64(self, hidden):
    """Root mean square normalisation as LlamaRMSNorm's, without its detour over float32."""
    scaled = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight.double() * scaled


def truth(pool, target, checkpoint, max_length):
    """Cosines [n, m] of the pool's Adam features with the target's gradients; the same of their sketches."""
    reference = Reference(checkpoint, max_length)
    n = len(fastsel.open_pool(pool))
    features = torch.full((n, len(reference.first)), float("nan"), dtype=torch.float64)
    for row, g in reference.gradients(pool):
        features[row] = reference.adam(g)
        features[row] /= features[row].norm()
        print(f"truth: pool row {row + 1} of {n}", flush=True)
    sketches = torch.nn.functional.normalize(random_projection(features, SKETCH))
    cosines, projected = [], []
    for row, g in reference.gradients(target):
        cosines.append(features @ (g / g.norm()))
        sketch = torch.nn.functional.normalize(random_projection(g[None], SKETCH))
        projected.append(sketches @ sketch[0])
        print(f"truth: target row {row + 1}", flush=True)
    return {"cosines": torch.stack(cosines, 1).numpy(), "projected": torch.stack(projected, 1).numpy()}


def ours(pool, target, checkpoints, max_length, mode):
    """Scores of fastsel.less, its order, and the CPU seconds it took."""
    started = time.process_time()
    got = fastsel.less(
        pool, target=target, checkpoints=checkpoints, mode=mode, sketch_size=SKETCH, max_length=max_length, budget=1.0,
        leaks="none", device="cpu", dtype="float32", progress="plain",
    )  # fmt: skip
    return {"scores": got.scores, "indices": got.indices, "cpu_s": np.float64(time.process_time() - started)}


def ranks(values):
    """Positions in ascending order."""
    return np.argsort(np.argsort(values, kind="stable"), kind="stable")


def report(expected, found):
    """One line a mode."""
    scores = expected["cosines"].mean(axis=1)
    with_one = np.flatnonzero(np.isfinite(scores))
    order = with_one[np.argsort(-scores[with_one], kind="stable")]
    gaps = -np.diff(scores[order])
    print(f"{len(with_one)} rows with a score; scores {scores[order[-1]]:.6f} to {scores[order[0]]:.6f}")
    print(f"gaps between neighbours: smallest {gaps.min():.2e}, median {np.median(gaps):.2e}")
    cosines, projected = expected["cosines"][with_one], expected["projected"][with_one]
    error = (projected - cosines) / ((1 - cosines**2) / np.sqrt(SKETCH))
    plain = np.sqrt(np.mean((projected - cosines) ** 2))
    print(f"SJLT of {cosines.size:,} pairs in float64: root mean square error {plain:.5f}")
    print(f"  {np.sqrt(np.mean(error**2)):.3f} of (1 - c^2) / sqrt({SKETCH}), its mean {error.mean():+.3f} of it")
    print("| mode | same ranking | rows elsewhere | Spearman | largest difference | gaps below twice that | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for mode, got in found.items():
        difference = np.abs(got["scores"][with_one] - scores[with_one]).max()
        a, b = ranks(scores[with_one]), ranks(got["scores"][with_one])
        spearman = np.corrcoef(a, b)[0, 1]
        elsewhere = int((got["indices"] != order).sum()) if len(got["indices"]) == len(order) else len(order)
        print(f"| {mode} | {'yes' if elsewhere == 0 else 'no'} | {elsewhere} | {spearman:.6f} | {difference:.2e} | "
              f"{int((gaps < 2 * difference).sum())} of {len(gaps)} | {float(got['cpu_s']):.0f} |")  # fmt: skip


def main():
    """Run what is not in --work yet, and print what is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pool", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--checkpoints", required=True, help="a run of the bundled model with one checkpoint")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100, help="drawn stratified by source")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", nargs="+", default=["truth", "direct", "sketch"])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    given.work.mkdir(parents=True, exist_ok=True)
    whole = fastsel.open_pool(given.pool)
    rows = np.sort(fastsel.random(whole, budget=given.rows, per="source").indices)
    pool = whole.write_rows(rows, given.work / "pool.jsonl")
    (checkpoint,) = fastsel.open_checkpoints(given.checkpoints)
    for step in given.steps:
        kept = given.work / f"{step}.npz"
        if not kept.exists():
            if step == "truth":
                found = truth(pool, given.target, checkpoint.folder, given.max_length)
            else:
                found = ours(pool, given.target, given.checkpoints, given.max_length, step)
            np.savez(kept, **found)
    if (given.work / "truth.npz").exists():
        modes = [mode for mode in ("direct", "sketch") if (given.work / f"{mode}.npz").exists()]
        report(np.load(given.work / "truth.npz"), {mode: np.load(given.work / f"{mode}.npz") for mode in modes})


if __name__ == "__main__":
    main()
