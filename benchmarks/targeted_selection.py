"""What share of the chosen rows is of the target's kind? One table for each target, one line for each method.

    python benchmarks/targeted_selection.py --pool pool.jsonl --work folder \
        --target gsm8k.jsonl gsm8k_train gsm8k_train,flan_cot_aqua,mgsm \
        --target mbpp.jsonl mbpp_train mbpp_train,gpteacher_code --methods bm25 "rds encoder=lm:bundled" less random

Rows are drawn stratified by source; each method chooses 10 % of them; a share is followed by its 95 % interval (Wilson)
over the chosen rows. What the kind is, the sources say: a method that finds other useful rows gets no credit for them.
What a model computes is kept in --work, so that an interrupted run goes on, and one method can be added later. `less`
takes the pool's gradients once for all targets.
"""

import argparse
import math
import warnings
from pathlib import Path

import numpy as np

import fastsel
from fastsel.commands.catalogue import METHODS
from fastsel.errors import FastselWarning
from fastsel.selectors import top_k


def wilson(hits, n, z=1.96):
    """The 95 % interval of a share."""
    share, damp = hits / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / damp
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / damp
    return max(0.0, middle - half), min(1.0, middle + half)


def options_of(words, work):
    """(name, options) of a method given as "name option=value ...", values as YAML."""
    import yaml

    name, *options = words.split()
    given = {key: yaml.safe_load(value) for key, _, value in (option.partition("=") for option in options)}
    if METHODS[name].runs_shards:
        model = str(given.get("encoder", given.get("model", METHODS[name].defaults.get("encoder")))).replace("/", "_")
        given |= {"store": work / f"{name}-{model}"}
    return name, given


def choose(words, pool, targets, work, budget):
    """The rows that a method chooses for each target: [rows [k], ...]."""
    name, given = options_of(words, work)
    if name == "random":
        return [fastsel.random(pool, budget=budget, **given).indices] * len(targets)
    if name == "less":
        scored = fastsel.less(pool, target=targets, budget=budget, **given)
        columns = [scored.metrics[f"infl_{Path(target).stem}"] for target in targets]
        return [top_k(column, len(scored), eligible=scored.eligible)[0] for column in columns]
    return [getattr(fastsel, name)(pool, target=target, budget=budget, **given).indices for target in targets]


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pool", required=True)
    parser.add_argument(
        "--target",
        nargs="+",
        action="append",
        required=True,
        metavar="FILE KIND",
        help="a target, and what its kind is: sources, comma-separated; several are columns",
    )
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--budget", default="10%")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", required=True)
    given = parser.parse_args()
    whole = fastsel.open_pool(given.pool)
    rows = np.sort(fastsel.random(whole, budget=given.rows, per="source").indices)
    given.work.mkdir(parents=True, exist_ok=True)
    pool = fastsel.open_pool(whole.write_rows(rows, given.work / "pool.jsonl"))
    sources = np.array(pool.sources().to_pylist())
    targets = [target for target, *_ in given.target]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastselWarning)
        chosen = [choose(words, pool, targets, given.work, given.budget) for words in given.methods]
    for number, (target, *kinds) in enumerate(given.target):
        of_kind = [np.isin(sources, kind.split(",")) for kind in kinds]
        print(f"| {Path(target).stem} | {' | '.join(kinds)} |")
        print(f"|---|{'---|' * len(kinds)}")
        print(f"| all {len(pool):,} rows | {' | '.join(f'{kind.mean():.1%}' for kind in of_kind)} |")
        for words, picks in zip(given.methods, chosen, strict=True):
            cells = []
            for kind in of_kind:
                hits, n = int(kind[picks[number]].sum()), len(picks[number])
                low, high = wilson(hits, n)
                cells.append(f"{hits / n:.1%} ({low:.1%} to {high:.1%})")
            print(f"| {words} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
