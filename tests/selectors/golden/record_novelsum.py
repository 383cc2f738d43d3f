"""Record what the NovelSum authors' code computes: python record_novelsum.py CHECKOUT [novelselect.json novelsum.json]

CHECKOUT holds novelselect.py, novelsum.py and utils.py of UmeanNever/NovelSum at b594962. They are run as they are but
for what needs a GPU: faiss stays on the CPU and torch.cuda.device does nothing. For the float32 lists the two words
that ask for half precision are replaced in the text before it is run.
"""

import contextlib
import json
import platform
import sys
import types
from pathlib import Path

import faiss
import numpy as np
import torch

HERE = Path(__file__).parent
CASES = [  # n, d, k, then the authors' options
    {"name": "plain", "n": 1500, "d": 64, "k": 150, "data_seed": 0},
    {"name": "far-counts", "n": 800, "d": 24, "k": 80, "data_seed": 1, "alpha": 0.5, "beta": 0.25, "seed": 7},
    {"name": "near-counts", "n": 800, "d": 24, "k": 80, "data_seed": 2, "alpha": 2.0, "beta": 1.0, "neighbours": 5},
]
DEFAULTS = {"alpha": 1.0, "beta": 0.5, "neighbours": 10, "seed": 42}


def load(checkout: Path, name: str, *, single_precision: bool = False) -> types.ModuleType:
    """A module of the authors', with its text changed where it asks for half precision."""
    text = (checkout / f"{name}.py").read_text()
    if single_precision:
        text = text.replace(".half()", ".float()").replace("torch.float16", "torch.float32")
    module = types.ModuleType(name)
    exec(compile(text, f"{name}.py", "exec"), module.__dict__)
    module.tqdm = lambda steps, **options: steps
    return module


def rows(case: dict) -> np.ndarray:
    """The pool of a case: normal numbers of numpy's legacy generator, whose stream is frozen."""
    return np.random.RandomState(case["data_seed"]).standard_normal((case["n"], case["d"]))


def select(module: types.ModuleType, case: dict) -> list[int]:
    """The authors' list."""
    return module.novelselect(
        rows(case), case["k"], neighbors=case["neighbours"], density_power=case["beta"],
        distance_power=case["alpha"], seed=case["seed"],
    )  # fmt: skip


def measure(checkout: Path) -> dict:
    """The authors' grid of NovelSum: a set of its reference, a set outside it, and one with copies."""
    module, utils = load(checkout, "novelsum"), load(checkout, "utils")
    reference = np.random.RandomState(3).standard_normal((900, 32))
    outside = np.random.RandomState(4).standard_normal((150, 32)) + 0.3
    sets = {"inside": reference[100:300], "outside": outside, "copies": np.repeat(reference[:60], 3, axis=0)}
    index, found = utils.FaissIndex(reference, 0), {}
    for name, x in sets.items():
        distances, values = module.compute_cos_distance(x, torch.device("cpu")), {}
        for beta in (0, 0.25, 0.5):
            for neighbours in (5, 10):
                density = index.local_density(x, n_neighbors=neighbours, power=beta, regularization=1e-9)
                for alpha in (0, 1, 2):
                    key = f"neighbor_{neighbours}_density_{beta}_distance_{alpha}"
                    values[key] = float(module.novelsum(distances, density, power=alpha))
        found[name] = values | {"cos_distance": float(np.mean(distances))}
    return found


def main() -> None:
    """Write the two files."""
    checkout = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(checkout))
    faiss.StandardGpuResources = lambda: None
    faiss.index_cpu_to_gpu = lambda resources, gpu, index: index
    torch.cuda.device = lambda device: contextlib.nullcontext()
    made = {"python": platform.python_version(), "torch": torch.__version__, "faiss": faiss.__version__}
    cases = [DEFAULTS | case for case in CASES]
    single = load(checkout, "novelselect", single_precision=True)
    half = load(checkout, "novelselect")
    lists = {
        "made_with": made,
        "cases": [case | {"indices": select(single, case)} for case in cases],
        "half": [case | {"indices": select(half, case)} for case in cases[:1]],
    }
    targets = sys.argv[2:] or [HERE / "novelselect.json", HERE / "novelsum.json"]
    Path(targets[0]).write_text(json.dumps(lists) + "\n")
    Path(targets[1]).write_text(json.dumps({"made_with": made, "sets": measure(checkout)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
