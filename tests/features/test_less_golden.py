"""Packed gradient features against numbers recorded from LESS's own functions (golden/record_less.py)."""

import importlib.util
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsel.features.gradient_rows import AdamMoments, BatchFeatures, GradientRule
from fastsel.models.loading import load_model
from fastsel.models.lora_forward import LabelledSequence, LoraForward

pytest.importorskip("peft")
GOLDEN = Path(__file__).with_name("golden")


def built():
    spec = importlib.util.spec_from_file_location("less_model", GOLDEN / "less_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("step", ["adam", "sgd"])
def test_features_are_those_of_the_authors_functions(step):
    source = built()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for what transformers deprecates
        model = source.tiny_adapter()
    forward = LoraForward(replace(load_model((model, lambda text: None), device="cpu"), model=model))
    first, second = source.moments(model)
    rule = GradientRule(step, moments=AdamMoments(first, second, 10), dense=True)
    rows = source.rows()
    features = BatchFeatures(len(rows), forward, rule, "auto")
    forward.run([[LabelledSequence(ids, range(n_prompt, len(ids)))] for ids, n_prompt in rows], features)
    recorded = torch.tensor(json.loads((GOLDEN / "less.json").read_text())[step], dtype=torch.float64)
    ours = features.dense.double()
    assert torch.nn.functional.cosine_similarity(ours, recorded).min() > 1 - 1e-8
    # Adam's division makes more of the last bits where its second moment is small.
    torch.testing.assert_close(
        ours, recorded, rtol=0, atol=(1e-4 if step == "adam" else 2e-5) * float(recorded.abs().max())
    )
