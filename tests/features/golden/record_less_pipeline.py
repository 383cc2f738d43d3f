"""Record what the authors' collect_grads writes: python record_less_pipeline.py CHECKOUT

CHECKOUT is princeton-nlp/LESS@8abf962; traker 0.3.2 must be importable. Recorded on 2026-11-27 with torch 2.13 (CPU),
transformers 5.23, peft 0.21. The model is in bfloat16, as their get_info.py loads it, and so are the features, by
TRAK's BasicProjector. prepare_batch, which moves a batch to cuda:0, is the one function that is replaced.
"""

import contextlib
import io
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")

from less.data_selection import collect_grad_reps  # noqa: E402
from less_model import K, as_batch, longer_rows, warmed_up  # noqa: E402

collect_grad_reps.prepare_batch = lambda batch: None
model, first, second = warmed_up(torch.bfloat16)
state, start = {}, 0
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        part = slice(start, start + parameter.numel())
        state[name] = {"exp_avg": first[part], "exp_avg_sq": second[part]}
        start = part.stop
recorded = {}
for kind in ("adam", "sgd"):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        batches = [as_batch(*row) for row in longer_rows()]
        collect_grad_reps.collect_grads(
            batches, model, folder, proj_dim=[K], adam_optimizer_state=state, gradient_type=kind
        )
        found = torch.load(f"{folder}/dim{K}/all_unormalized.pt", weights_only=True)
    assert found.dtype == torch.bfloat16
    recorded[kind] = [[float(f"{x:.8g}") for x in row] for row in found.tolist()]
(HERE / "less_pipeline.json").write_text(json.dumps(recorded) + "\n")
