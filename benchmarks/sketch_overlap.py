"""How many of LESS's best rows do random projections agree on? Prints one table; 400 rows take about 20 CPU-minutes.

    python benchmarks/sketch_overlap.py --pool pool.jsonl --target gsm8k.jsonl --checkpoints warm/

Whole gradients of real rows (float32, Adam's step for the pool, plain for the target) are ranked as they are, and
projected with several seeds: dense signs, as the authors' code projects, and SJLT. A projection that agreed with the
exact ranking less than two dense ones agree with each other would cost something that LESS's own noise does not.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch

import fastsel
from fastsel.features.gradients import lora_gradients
from fastsel.features.influence import running
from fastsel.io.templates import load_template
from fastsel.kernels.random_projection import random_projection
from fastsel.models.loading import load_model

SKETCH = 8192
KINDS = {"dense signs": "rademacher", "SJLT": "sjlt"}


def unit_gradients(path, state, template, **options):
    """Unit gradients [m, p] of the rows that have one."""
    pool = fastsel.open_pool(path)
    got = lora_gradients(
        pool, state.loaded, template=load_template(template, state.loaded.tokenizer), dense=True, forward=state.forward,
        progress="plain", **options,
    )  # fmt: skip
    return torch.cat(
        [
            torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(dense)).float())
            for _, dense in got.dense()
        ]
    )


def scores(features, targets):
    """Mean cosine [n] with the target's rows."""
    return (features.double() @ targets.double().mean(dim=0)).numpy()


def shared(a, b, k):
    """Share of the k best that two rankings have in common."""
    return len(set(np.argsort(-a, kind="stable")[:k]) & set(np.argsort(-b, kind="stable")[:k])) / k


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pool", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--checkpoints", required=True, help="a run of the bundled model; its last checkpoint is taken")
    parser.add_argument("--rows", type=int, default=400, help="drawn stratified by source")
    parser.add_argument("--target-rows", type=int, default=50)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=4)
    given = parser.parse_args()
    checkpoint = fastsel.open_checkpoints(given.checkpoints)[-1]
    base = load_model("bundled", device="cpu", dtype="float32")
    with running(checkpoint, base) as state, tempfile.TemporaryDirectory() as folder:
        window = {"max_length": given.max_length}
        pool = fastsel.open_pool(given.pool)
        rows = np.sort(fastsel.random(pool, budget=given.rows, per="source").indices)
        features = unit_gradients(
            pool.write_rows(rows, Path(folder) / "pool.jsonl"), state, "less", step="adam",
            moments=state.moments, **window,
        )  # fmt: skip
        target = fastsel.open_pool(given.target)
        first = target.write_rows(np.arange(min(given.target_rows, len(target))), Path(folder) / "target.jsonl")
        targets = unit_gradients(first, state, "less_target", **window)
    exact = scores(features, targets)
    found = {}
    for name, kind in KINDS.items():
        for seed in range(given.seeds):
            project = [random_projection(x, SKETCH, kind=kind, seed=seed) for x in (features, targets)]
            found[name, seed] = scores(*map(torch.nn.functional.normalize, project))
    print(f"{len(exact)} rows, {len(targets)} target rows, {SKETCH} numbers, {given.seeds} seeds; means of all pairs")
    print("| best | " + " | ".join(f"{name} / exact | {name} / {name}, another seed" for name in KINDS) + " |")
    print("|---|" + "---|---|" * len(KINDS))
    for share in (0.05, 0.1, 0.2):
        k = max(1, round(share * len(exact)))
        cells = []
        for name in KINDS:
            runs = [found[name, seed] for seed in range(given.seeds)]
            cells.append(np.mean([shared(run, exact, k) for run in runs]))
            cells.append(np.mean([shared(a, b, k) for a, b in itertools.combinations(runs, 2)]))
        print(f"| {share:.0%} ({k} rows) | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
