"""Packed gradient features against numbers recorded from LESS's own functions (golden/record_less.py)."""

import importlib.util
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsel.features.gradient_rows import AdamMoments, BatchFeatures, GradientRule
from fastsel.features.less_official import official_features, official_gradient, official_rows
from fastsel.features.training_rows import TrainingRow
from fastsel.models.loading import load_model
from fastsel.models.lora_forward import LabelledSequence, LoraForward

pytest.importorskip("peft")
GOLDEN = Path(__file__).with_name("golden")


cosines = torch.nn.functional.cosine_similarity


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


@pytest.fixture(scope="module")
def pipeline():
    """{step: features of LESS's collect_grads, bfloat16, by TRAK's projector}, the model's sources, rows, moments."""
    source = built()
    recorded = json.loads((GOLDEN / "less_pipeline.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        models = {dtype: source.warmed_up(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)}
    moments = AdamMoments(*models[torch.float32][1:], 10)
    # The same weights in all types: those of bfloat16.
    weights = models[torch.bfloat16][0].state_dict()
    for model, *_ in models.values():
        model.load_state_dict(weights)
    forwards = {
        dtype: LoraForward(replace(load_model((model, lambda text: None), device="cpu"), model=model))
        for dtype, (model, *_) in models.items()
    }
    rows = [TrainingRow(i, len(ids), 0, [(ids, list(range(n, len(ids))))])
            for i, (ids, n) in enumerate(source.longer_rows())]  # fmt: skip
    features = {step: torch.tensor(recorded[step], dtype=torch.float64) for step in recorded}
    return features, forwards, rows, moments


def packed(forward, rows, step, moments):
    """[n, k]: our packed gradients in the model's type, stepped; TRAK's matrix in float64."""
    found = BatchFeatures(len(rows), forward, GradientRule(step, moments=moments, dense=True), "auto")
    forward.run([[LabelledSequence(*s) for s in row.sequences] for row in rows], found)
    return official_features(found.dense.double(), 64)


@pytest.mark.parametrize("step", ["adam", "sgd"])
def test_features_are_those_of_the_authors_pipeline_from_tokens_on(pipeline, step):
    """Row cosines of at least 0.9999 (the same bits where it was recorded), and so for packed gradients of any type."""
    features, forwards, rows, moments = pipeline
    theirs = features[step]
    official = [
        f for *_, f in official_rows(forwards[torch.bfloat16], rows, 64, moments=moments if step == "adam" else None)
    ]
    assert cosines(torch.stack(official).double(), theirs).min() >= 0.9999
    for dtype in (torch.bfloat16, torch.float32):
        assert cosines(packed(forwards[dtype], rows, step, moments), theirs).min() >= 0.9999


@pytest.mark.parametrize("step", ["adam", "sgd"])
@pytest.mark.parametrize("made_up", [False, True])
def test_what_parts_float32_from_the_authors_features_is_their_bfloat16(pipeline, step, made_up):
    """Ours lie at 1e-7 from the float64 truth, theirs at up to 3e-4: with moments of a wider spread below 0.9999."""
    _, forwards, rows, moments = pipeline
    if made_up:  # a tenth of the gradient counts for more, so that its rounding shows
        generator = torch.Generator().manual_seed(0)
        spread = [torch.randn(2048, generator=generator) * 1e-6, torch.rand(2048, generator=generator) * 1e-9]
        moments = AdamMoments(*spread, 10)
    truth = packed(forwards[torch.float64], rows, step, moments)
    kept = moments if step == "adam" else None
    theirs = torch.stack([f for *_, f in official_rows(forwards[torch.bfloat16], rows, 64, moments=kept)]).double()
    ours = packed(forwards[torch.float32], rows, step, moments)
    assert 1 - cosines(ours, truth).min() < 1e-6
    assert (cosines(ours, truth) >= cosines(theirs, truth)).all()


def test_the_authors_types_err_less_than_1e_5_in_the_projection(pipeline):
    """Bfloat16 features beside the same gradients stepped and projected in float64."""
    _, forwards, rows, moments = pipeline
    gradients = torch.stack([official_gradient(forwards[torch.bfloat16], row)[1] for row in rows])
    g, m, v = gradients.double(), moments.exp_avg.double(), moments.exp_avg_sq.double()
    for step, exact in (("adam", (0.9 * m + 0.1 * g) / torch.sqrt(0.999 * v + 0.001 * g**2 + 1e-8)), ("sgd", g)):
        theirs = official_features(gradients, 512, moments=moments if step == "adam" else None)
        assert cosines(theirs.double(), exact @ signs(512)).min() >= 0.99999


def test_scores_of_float32_are_the_authors_within_5e_3(pipeline):
    """Training features of all rows beside target features of the last eight, as matching.py multiplies them."""
    features, forwards, rows, moments = pipeline
    unit = torch.nn.functional.normalize
    theirs = [unit(features[step].bfloat16(), dim=1).double() for step in ("adam", "sgd")]
    ours = [unit(packed(forwards[torch.float32], rows, step, moments), dim=1) for step in ("adam", "sgd")]
    assert ((theirs[0] @ theirs[1][-8:].T) - (ours[0] @ ours[1][-8:].T)).abs().max() <= 5e-3


def test_packed_float32_gradients_are_those_of_one_row_at_a_time(pipeline):
    """On the small model whose numbers the gate was set by: 1e-6, relative."""
    _, forwards, rows, _ = pipeline
    forward = forwards[torch.float32]
    expected = torch.stack([official_gradient(forward, row)[1] for row in rows])
    found = BatchFeatures(len(rows), forward, GradientRule("sgd", dense=True), "auto")
    forward.run([[LabelledSequence(*s) for s in row.sequences] for row in rows], found)
    assert ((found.dense - expected).norm(dim=1) / expected.norm(dim=1)).max() <= 1e-6


def signs(k):
    """TRAK's matrix [2048, k] as LESS asks for it."""
    blocks = []
    for block in range(k // 128):
        generator = torch.Generator().manual_seed(1000 * block)
        blocks.append(torch.empty(2048, 128, dtype=torch.float64).bernoulli_(0.5, generator=generator) * 2 - 1)
    return torch.cat(blocks, dim=1)
