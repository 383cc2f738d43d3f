"""Writes trak_basic_projector.json from TRAK itself: pip install --no-deps traker==0.3.2, then python record_trak.py"""

import json
from pathlib import Path

import torch
from trak.projectors import BasicProjector

CASES = {
    "one_block": ({"grad_dim": 20, "proj_dim": 6, "seed": 0, "proj_type": "rademacher", "block_size": 100}, 0),
    "blocks_with_a_tail": ({"grad_dim": 33, "proj_dim": 10, "seed": 7, "proj_type": "rademacher", "block_size": 4}, 0),
    "another_model": ({"grad_dim": 33, "proj_dim": 10, "seed": 7, "proj_type": "rademacher", "block_size": 4}, 2),
    "normal": ({"grad_dim": 20, "proj_dim": 6, "seed": 1, "proj_type": "normal", "block_size": 4}, 1),
}


def whole_numbers(b: int, p: int) -> torch.Tensor:
    return (torch.arange(b * p).reshape(b, p) * 7919 % 13 - 6).float()


cases = {}
for name, (options, model_id) in CASES.items():
    projected = BasicProjector(**options, device="cpu").project(whole_numbers(3, options["grad_dim"]), model_id)
    cases[name] = {"options": options, "project_model_id": model_id, "projected": projected.tolist()}
bits = torch.empty(64).bernoulli_(0.5, generator=torch.Generator().manual_seed(0)).tolist()
result = {"trak": "0.3.2", "torch": torch.__version__, "bits_of_seed_0": bits, "cases": cases}
Path(__file__).with_name("trak_basic_projector.json").write_text(json.dumps(result, indent=1) + "\n")
