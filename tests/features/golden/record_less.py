"""Record what the authors' functions make of a tiny model's gradients: python record_less.py CHECKOUT > less.json

CHECKOUT is princeton-nlp/LESS@8abf962; traker 0.3.2 must be importable. Recorded on 2026-11-27 with torch 2.13 (CPU),
transformers 5.23, peft 0.21. Only functions without a device are called: obtain_gradients_with_adam, obtain_gradients.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")

from less.data_selection.collect_grad_reps import obtain_gradients, obtain_gradients_with_adam  # noqa: E402
from less_model import moments, rows, tiny_adapter  # noqa: E402

model = tiny_adapter()
first, second = moments(model)
recorded = {"adam": [], "sgd": []}
for ids, n_prompt in rows():
    token_ids = torch.tensor([ids])
    labels = token_ids.clone()
    labels[0, :n_prompt] = -100
    batch = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids), "labels": labels}
    for kind in recorded:
        model.zero_grad()
        if kind == "adam":
            vector = obtain_gradients_with_adam(model, batch, first, second)
        else:
            vector = obtain_gradients(model, batch)
        recorded[kind].append([float(f"{x:.8g}") for x in vector.tolist()])
json.dump(recorded, sys.stdout)
