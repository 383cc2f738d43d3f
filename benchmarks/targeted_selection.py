"""What share of the chosen rows is of the target's kind? One table for each target, one line for each method.

    python benchmarks/targeted_selection.py --pool pool.jsonl --target gsm8k.jsonl --kind gsm8k_train \
        --kind gsm8k_train,flan_cot_aqua,mgsm --work folder bm25 "rds encoder=lm:bundled" random

Rows are drawn stratified by source; each method chooses 10 % of them; a share is followed by its 95 % interval (Wilson)
over the chosen rows. What the kind is, the sources say: a method that finds other useful rows gets no credit for them.
What a model computes is kept in --work, so that an interrupted run goes on, and one method can be added later.
"""

import argparse
import math
import warnings
from pathlib import Path

import numpy as np

import fastsel
from fastsel.commands.catalogue import METHODS
from fastsel.errors import FastselWarning


def wilson(hits, n, z=1.96):
    """The 95 % interval of a share."""
    share, damp = hits / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / damp
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / damp
    return max(0.0, middle - half), min(1.0, middle + half)


def choose(words, pool, target, work, budget):
    """The selection of a method given as "name option=value ...", values as JSON where they are."""
    import yaml

    name, *options = words.split()
    given = {key: yaml.safe_load(value) for key, _, value in (option.partition("=") for option in options)}
    if name != "random":
        given["target"] = target
    if METHODS[name].runs_shards:
        model = str(given.get("encoder", given.get("model", METHODS[name].defaults.get("encoder")))).replace("/", "_")
        given |= {"store": work / f"{name}-{model}"}
    return getattr(fastsel, name)(pool, budget=budget, **given)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pool", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--kind", action="append", required=True, help="sources of the target's kind, comma-separated")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--budget", default="10%")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("methods", nargs="+")
    given = parser.parse_args()
    whole = fastsel.open_pool(given.pool)
    rows = np.sort(fastsel.random(whole, budget=given.rows, per="source").indices)
    given.work.mkdir(parents=True, exist_ok=True)
    pool = fastsel.open_pool(whole.write_rows(rows, given.work / "pool.jsonl"))
    sources = np.array(pool.sources().to_pylist())
    kinds = [np.isin(sources, kind.split(",")) for kind in given.kind]
    print(f"| method | {' | '.join(given.kind)} |")
    print(f"|---|{'---|' * len(kinds)}")
    print(f"| all {len(pool):,} rows | {' | '.join(f'{kind.mean():.1%}' for kind in kinds)} |")
    for words in given.methods:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastselWarning)
            chosen = choose(words, pool, given.target, given.work, given.budget).indices
        cells = []
        for kind in kinds:
            hits, n = int(kind[chosen].sum()), len(chosen)
            low, high = wilson(hits, n)
            cells.append(f"{hits / n:.1%} ({low:.1%} to {high:.1%})")
        print(f"| {words} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
