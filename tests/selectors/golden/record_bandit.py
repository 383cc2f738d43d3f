"""Record the authors' draws: python record_bandit.py CHECKOUT (ZigeW/ClusterUCB@8cbd9f0).

Their UCB_Beta, Cluster and ucb_selection run as they are; get_training_gradients is replaced by ready-made rows, and
the task is one whose target rows are one subtask. trak is not needed for that: an empty module stands in for it.
"""

import json
import random
import sys
import types
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

HERE = Path(__file__).parent
CASES = [  # name, seed, rows, clusters, features, cold start, budget, beta
    ("cold-start", 0, 600, 12, 16, 0.05, 0.25, 1.0),
    ("no-cold-start", 1, 500, 15, 16, 0.0, 0.2, 1.0),
    ("greedy", 2, 400, 8, 16, 0.1, 0.3, 0.0),
    ("bold", 3, 400, 20, 16, 0.02, 0.3, 3.0),
    ("3000", 4, 3000, 20, 32, 0.05, 0.2, 1.0),
]


def data(seed: int, n: int, clusters: int, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels [n], unit rows [n, d] and unit target rows [5, d], float64; the test makes the same."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((clusters, d))
    labels = generator.integers(0, clusters, n)
    rows = centres[labels] + generator.standard_normal((n, d))
    target = centres[:1] + 0.5 * generator.standard_normal((5, d))
    return labels, *(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, target))


class Rows:
    """As much of a dataset as their code asks for."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def select(self, places: list[int]) -> "Rows":
        return Rows(self.rows[places])


def main() -> None:
    """Write bandit.json."""
    for name in ("trak", "trak.projectors"):
        stub = sys.modules[name] = types.ModuleType(name)
        stub.BasicProjector = stub.CudaProjector = stub.ProjectionType = None
    sys.path.insert(0, sys.argv[1])
    module = import_module("data_selection.cluster_ucb_select_data")
    module.get_training_gradients = lambda dataset, *rest: torch.from_numpy(dataset.rows)
    module.args = SimpleNamespace(task="gsm")
    found = []
    for name, seed, n, k, d, cold_start, budget, beta in CASES:
        labels, rows, target = data(seed, n, k, d)
        members = [np.flatnonzero(labels == arm) for arm in range(k)]
        clusters = [module.Cluster(part, Rows(rows[part])) for part in members]
        random.seed(42)
        horizon = int(n * (budget - cold_start))
        _, arms, rewards, _ = module.ucb_selection(
            clusters, horizon, None, None, None, torch.from_numpy(target), method="ucb_beta", beta=beta,
            cold_start_p=cold_start,
        )  # fmt: skip
        drawn = sorted(int(row) for cluster in clusters for row in cluster.selected_subset()[0])
        found.append({
            "name": name, "data": [seed, n, k, d], "cold_start": cold_start, "budget": budget, "beta": beta,
            "arms": [int(arm) for arm in arms], "rewards": [float(reward) for reward in rewards], "drawn": drawn,
        })  # fmt: skip
    (HERE / "bandit.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
