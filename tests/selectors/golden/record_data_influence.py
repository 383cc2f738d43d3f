"""Record the authors' influences: python record_data_influence.py CHECKOUT (ykwon0407/DataInf@fe9145a).

Their IFEngine (on the mean of the target rows) and IFEngineGeneration (on each) run as they are, in float32.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
SHAPES = {"q.lora_A": (3, 8), "q.lora_B": (6, 3), "v.lora_A": (3, 10)}
CASES = [("few", 0, 12, 3, 1.0), ("more", 1, 60, 5, 1.0), ("small", 2, 40, 4, 1e-3)]


def data(seed: int, n: int, m: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of rows [n, p] and of target rows [m, p], float32, the layers of SHAPES one after another."""
    generator = np.random.default_rng(seed)
    sizes = [a * b for a, b in SHAPES.values()]
    by_layer = np.repeat(np.geomspace(1, 10, len(sizes)), sizes) * scale
    shared = generator.standard_normal(sum(sizes))
    rows = (generator.standard_normal((n, sum(sizes))) + shared) * by_layer
    target = (generator.standard_normal((m, sum(sizes))) + shared) * by_layer
    return rows.astype(np.float32), target.astype(np.float32)


def as_layers(rows: np.ndarray) -> dict[int, dict[str, torch.Tensor]]:
    """What their engines take."""
    ends = np.cumsum([a * b for a, b in SHAPES.values()])[:-1]
    return {
        i: {name: torch.from_numpy(part.copy()).reshape(shape)
            for (name, shape), part in zip(SHAPES.items(), np.split(row, ends), strict=True)}
        for i, row in enumerate(rows)
    }  # fmt: skip


def main() -> None:
    """Write data_influence.json."""
    sys.path.insert(0, str(Path(sys.argv[1]) / "src"))
    from influence import IFEngine, IFEngineGeneration

    found = []
    for name, *shape in CASES:
        train, target = map(as_layers, data(*shape))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            mean, each = IFEngine(), IFEngineGeneration()
            mean.preprocess_gradients(train, target, None)
            mean.compute_hvp_proposed()
            mean.compute_IF()
            each.preprocess_gradients(train, target)
            each.compute_hvp_proposed()
            each.compute_IF()
        found.append({
            "name": name, "data": shape, "mean": mean.IF_dict["proposed"].tolist(),
            "each": each.IF_dict["proposed"].to_numpy().tolist(),
        })  # fmt: skip
    (HERE / "data_influence.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
