"""Record what DEITA's filter keeps: python record_repr_filter.py CHECKOUT (hkust-nlp/deita@b279f2c).

Combined_Filter.filter runs as it is, on the CPU with its default batch_size of 1; only the helper that splits sort keys
is put in its place. Scores are whole numbers from 0 to 9, so that many are equal.
"""

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas

HERE = Path(__file__).parent


def data():
    """(vectors [160, 5], scores [160]) from numpy's legacy generator, whose stream is frozen."""
    random = np.random.RandomState(20240613)
    return random.standard_normal((160, 5)), random.randint(0, 10, 160).astype(float)


def authors_filter(checkout):
    folder = Path(checkout) / "src" / "deita" / "selection" / "filter"
    helpers = ModuleType("deita.pipeline.utils")
    helpers.sort_key_split = lambda key: key.split(",")
    modules = {"deita.pipeline.utils": helpers}
    sys.modules |= modules
    for name in ("base", "combined_filter"):
        spec = importlib.util.spec_from_file_location(f"deita.selection.filter.{name}", folder / f"{name}.py")
        modules[spec.name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[spec.name])
    return modules["deita.selection.filter.combined_filter"].Combined_Filter


def main(checkout):
    vectors, scores = data()
    kept = {}
    for threshold, size in ((0.9, 60), (0.7, -1)):
        frame = pandas.DataFrame(
            {"embedding": vectors.tolist(), "score": [[s] for s in scores], "row": np.arange(len(scores))}
        )
        options = {"threshold": threshold, "data_size": size, "sort_key": ["score"], "chunk_size": 100000}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chosen = authors_filter(checkout)(device="cpu", **options).filter(frame)
        kept[f"{threshold}"] = {"size": size, "rows": [int(row) for row in chosen["row"]]}
    (HERE / "repr_filter.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
