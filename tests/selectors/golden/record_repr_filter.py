"""Record what DEITA's own filter keeps: python record_repr_filter.py CHECKOUT (hkust-nlp/deita@b279f2c).

Its IterativeFilter runs as it is, one row at a time on the CPU; rows come sorted, so that its sort changes nothing.
"""

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent
CASES = [  # seed, rows, features, centres, spread, threshold, data_size
    (0, 400, 24, 40, 0.25, 0.9, -1),
    (1, 400, 24, 40, 0.6, 0.7, -1),
    (2, 300, 8, 10, 0.5, 0.95, 60),
]


def data(seed: int, rows: int, features: int, centres: int, spread: float) -> np.ndarray:
    """Clouds of rows; the test makes the same."""
    generator = np.random.default_rng(seed)
    middles = generator.standard_normal((centres, features))
    cloud = generator.integers(0, centres, rows)
    return (middles[cloud] + spread * generator.standard_normal((rows, features))).astype(np.float32)


def main() -> None:
    """Write repr_filter.json."""
    warnings.simplefilter("ignore")
    file = Path(sys.argv[1]) / "src" / "deita" / "selection" / "filter" / "base.py"
    spec = importlib.util.spec_from_file_location("deita_filter", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Sorted(module.IterativeFilter):
        def _sort(self, df):
            return df

    found = []
    for *shape, threshold, size in CASES:
        x = data(*shape)
        frame = pd.DataFrame({"row": np.arange(len(x)), "embedding": list(x)})
        authors = Sorted(threshold=threshold, data_size=size, chunk_size=100_000, batch_size=1, device="cpu")
        kept = authors.filter(frame)["row"].tolist()
        unit = x / np.linalg.norm(x.astype(np.float64), axis=1)[:, None]
        nearest = float(np.abs(unit @ unit.T - threshold).min())
        assert nearest > 1e-6, "a cosine lies too near the threshold for float32: take another seed"
        found.append({"data": shape, "threshold": threshold, "data_size": size, "kept": kept})
    (HERE / "repr_filter.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
