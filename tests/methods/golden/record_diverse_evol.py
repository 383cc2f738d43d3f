"""Record what DiverseEvol's own query adds: python record_diverse_evol.py CHECKOUT (OFA-Sys/DiverseEvol@a22e952).

KCenterSampling.query runs as it is, on the CPU; only where it gets the pool's embeddings from is put in its place.
"""

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch

HERE = Path(__file__).parent


def data(copies: bool) -> np.ndarray:
    """300 rows as long as LLaMA's states; with `copies`, 40 rows more that lie next to the first ones."""
    generator = np.random.default_rng(7)
    x = 20 * generator.standard_normal((300, 32))
    near = x[:40] + 1e-4 * generator.standard_normal((40, 32))
    return np.concatenate([x, near] if copies else [x]).astype(np.float32)


def authors_sampling(checkout: str) -> type:
    """The class, without what its module imports and does not use here."""
    base, helpers = ModuleType("evol_schedule_base"), ModuleType("utils")
    base.EvolSchedule = object
    helpers.compute_kernel_bias = helpers.transform_and_normalize = None
    torch.distributed.get_rank = lambda: 0
    file = Path(checkout) / "evol_schedules" / "kcenter_sampling.py"
    spec = importlib.util.spec_from_file_location("authors_k_center", file)
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {"evol_schedule_base": base, "utils": helpers}):
        spec.loader.exec_module(module)
    return module.KCenterSampling


def main() -> None:
    """Write diverse_evol.json."""
    warnings.simplefilter("ignore")
    sampling = authors_sampling(sys.argv[1])
    found = {}
    for name, copies in (("without copies", False), ("with copies", True)):
        x = torch.from_numpy(data(copies))
        strategy = sampling.__new__(sampling)
        strategy.n_pool, strategy.whiten_n_components = len(x), -1
        strategy.labeled_idx = torch.arange(len(x)) < 25
        strategy.get_embeddings_all_data = lambda x=x, **_: list(x)
        found[name] = strategy.query(0, 50, "").tolist()
    (HERE / "diverse_evol.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
