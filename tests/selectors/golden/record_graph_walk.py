"""Record the authors' walks: python record_graph_walk.py CHECKOUT (zy125413/G2IS@990409b).

Their GraphWalk runs as it is on float32 rows at unit length, on components that scikit-learn's PCA finds as in their
script, and on the graph it asks for: all rows, for each row sorted by cosine. Components and their weights are
is the library's), so that the test stands without scikit-learn.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA

HERE = Path(__file__).parent
CASES = [  # name, seed, rows, features, target rows, strength of what rows share, share of rows, delta
    ("together", 0, 300, 32, 12, 1.0, 0.2, 0.8),
    ("apart", 1, 400, 48, 20, 0.0, 0.1, 0.8),
    ("strict", 2, 300, 24, 9, 0.6, 0.3, 0.99),
    ("loose", 3, 250, 40, 15, 0.6, 0.4, 0.0),
    ("800", 4, 800, 64, 20, 0.3, 0.1, 0.8),
    ("1500", 5, 1500, 128, 20, 0.3, 0.1, 0.8),
    ("3000", 6, 3000, 256, 20, 0.3, 0.1, 0.8),
]


def data(seed: int, n: int, d: int, m: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows and target rows, float32; the test makes the same."""
    generator = np.random.default_rng(seed)
    shared = strength * generator.standard_normal(d)
    rows = generator.standard_normal((n, d)) * generator.uniform(0.5, 2, (n, 1)) + shared
    target = generator.standard_normal((m, d)) * np.linspace(2, 0.1, d) + shared
    return rows.astype(np.float32), target.astype(np.float32)


def main() -> None:
    """Write graph_walk.json."""
    spec = importlib.util.spec_from_file_location("gradient_walk", Path(sys.argv[1]) / "gradient_walk.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = []
    for name, *shape, share, delta in CASES:
        rows, target = data(*shape)
        pca = PCA(n_components=0.5).fit(target)
        weights = pca.explained_variance_ratio_ / pca.explained_variance_ratio_.sum()
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        components = pca.components_ / np.linalg.norm(pca.components_, axis=1, keepdims=True)
        graph = np.argsort(-(unit @ unit.T), axis=1, kind="stable")
        nearest = np.argsort(-(components @ unit.T), axis=1, kind="stable")[:, :1000]
        walk = module.GraphWalk(unit, components, weights, graph, nearest, len(rows))
        indices = [int(row) for row in walk.graph_walk(train_k=share, way=delta)]
        found.append({
            "name": name, "data": shape, "k": int(len(rows) * share), "consistency": delta, "indices": indices,
            "weights": weights.tolist(), "largest": np.abs(pca.components_).argmax(1).tolist(),
        })  # fmt: skip
        print(name, len(weights), "components,", len(indices), "of", found[-1]["k"], file=sys.stderr)
    (HERE / "graph_walk.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
