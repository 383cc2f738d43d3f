"""LoRA gradients of a pool: every feature against autograd in float64, batches, stores, interruptions, flags."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastsel.errors import InputError, UsageError
from fastsel.executors.local import LocalProcesses
from fastsel.features import batches as cutting
from fastsel.features.gradient_rows import AdamMoments, GradientWorker, _whole, as_stored
from fastsel.features.gradients import lora_gradients, moments_of
from fastsel.features.training_rows import TrainingTokenizer
from fastsel.io import bundled_pool_path, open_pool
from fastsel.io.examples import SKIPPED, TRUNCATED
from fastsel.io.templates import load_template
from fastsel.kernels._runtime.rng import sjlt_map
from fastsel.kernels.lora_gradient_sketch import SketchSpec
from fastsel.models.loading import load_model
from fastsel.models.lora_batch import ModuleTokens
from fastsel.models.lora_forward import LoraForward
from fastsel.models.lora_modules import LoraModule

peft = pytest.importorskip("peft")
N_ROWS = 12
MAX_LENGTH = 300


def tiny(tokenizer, dtype=torch.float64):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=600,
    )  # fmt: skip
    torch.manual_seed(3)
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for what transformers deprecates
        model = peft.get_peft_model(LlamaForCausalLM(config), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    loaded = load_model((model.to(dtype).eval(), tokenizer), device="cpu")
    return replace(loaded, model=model)


@pytest.fixture(scope="module")
def loaded(tokenizer):
    return tiny(tokenizer)


@pytest.fixture(scope="module")
def pool():
    return open_pool(bundled_pool_path(), limit=N_ROWS)


def take(pool, loaded, **options):
    options = {
        "template": load_template("tulu", loaded.tokenizer),
        "max_length": MAX_LENGTH,
        "progress": "none",
        **options,
    }
    return lora_gradients(pool, loaded, **options)


def autograd(pool, loaded):
    """{row: (loss, gradient [p] float64)} through peft's layers, one row at a time."""
    tokenise = TrainingTokenizer(loaded.tokenizer, load_template("tulu", loaded.tokenizer), max_length=MAX_LENGTH)
    parameters = [p for name, p in loaded.model.named_parameters() if "lora_" in name]
    for parameter in parameters:
        parameter.requires_grad_(True)
    found = {}
    for row in tokenise(pool.examples(range(len(pool)))):
        if not row.sequences:
            continue
        total, count = 0.0, 0
        for ids, labelled in row.sequences:
            logits = loaded.model(input_ids=torch.tensor([ids])).logits[0].double()
            places = torch.tensor(labelled)
            total += torch.nn.functional.cross_entropy(logits[places - 1], torch.tensor(ids)[places], reduction="sum")
            count += len(labelled)
        gradients = torch.autograd.grad(total / count, parameters)
        found[row.row_id] = float(total.detach() / count), torch.cat([g.reshape(-1) for g in gradients]).double()
    return found


@pytest.fixture(scope="module")
def truth(pool, loaded):
    return autograd(pool, loaded)


def whole(gradients):
    out = {}
    for rows, block in gradients.dense():
        out |= dict(zip(rows.tolist(), torch.from_numpy(np.array(block)), strict=True))
    return out


def some_moments(p, step=7):
    generator = torch.Generator().manual_seed(1)
    return AdamMoments(
        torch.randn(p, generator=generator) * 1e-3, torch.rand(p, generator=generator) * 1e-6, step, (0.9, 0.999), 1e-8
    )


def stepped(g, step, eps_mode, m):
    """LESS's formula and Adam's, literally."""
    if step == "sgd":
        return g
    if step == "sign":
        return torch.sign(g)
    first = 0.9 * m.exp_avg.double() + 0.1 * g
    second = 0.999 * m.exp_avg_sq.double() + 0.001 * g**2
    if eps_mode == "inside":
        return first / torch.sqrt(second + 1e-8)
    return (first / (1 - 0.9 ** (m.step + 1))) / (torch.sqrt(second / (1 - 0.999 ** (m.step + 1))) + 1e-8)


@pytest.mark.parametrize(
    ("step", "eps_mode"), [("sgd", "inside"), ("adam", "inside"), ("adam", "outside"), ("sign", "inside")]
)
def test_matches_the_formula_in_float64(pool, loaded, truth, step, eps_mode):
    p = LoraForward(loaded).n_parameters
    targets = torch.randn(3, p, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    spec = SketchSpec(64, seed=5)
    moments = some_moments(p) if step == "adam" else None
    got = take(pool, loaded, step=step, eps_mode=eps_mode, moments=moments, targets=targets, sketch=spec, dense=True)
    dense = whole(got)
    assert set(dense) == set(truth) and got.n_parameters == p
    assert set(got.provenance["implementations"]) == {"tree_attention", "lora_gradient_sketch"}
    map_rows, map_signs = sjlt_map(5, torch.arange(p), 64, 1)
    sketches = {int(row): sketch for rows, block in got.sketches() for row, sketch in zip(rows, block, strict=True)}
    for row, (loss, gradient) in truth.items():
        expected = stepped(gradient, step, eps_mode, moments)
        # RMSNorm drops to float32: 1e-7 of a gradient; a sign may turn where a gradient is 0 but for that.
        if step != "sign":
            torch.testing.assert_close(dense[row], expected, rtol=2e-5, atol=2e-6 * float(expected.abs().max()))
        assert got.loss[row] == pytest.approx(loss, rel=1e-6)
        gamma = dense[row]
        np.testing.assert_allclose(got.dots[row], (targets @ gamma).numpy(), rtol=1e-9, atol=1e-12)
        assert got.sqnorm[row] == pytest.approx(float(gamma @ gamma), rel=1e-12)
        projected = torch.zeros(64, dtype=torch.float64).index_add_(0, map_rows[0], gamma * map_signs[0])
        error = np.abs(sketches[row] - projected.numpy()).max()
        assert error <= 2.0**-11 * float(projected.abs().max())


@pytest.mark.parametrize("batch_tokens", [1, 700, 100_000])
def test_law_the_budget_of_a_batch_changes_nothing(pool, loaded, truth, batch_tokens):
    targets = torch.ones(1, LoraForward(loaded).n_parameters, dtype=torch.float64)
    got = take(pool, loaded, targets=targets, batch_tokens=batch_tokens)
    for row, (_, gradient) in truth.items():
        assert got.dots[row, 0] == pytest.approx(float(gradient.sum()), rel=1e-5, abs=1e-6)


def test_law_checkpointing_changes_no_bit(pool, loaded):
    plain, again = (take(pool, loaded, checkpointing=c) for c in (False, True))
    np.testing.assert_array_equal(plain.sqnorm, again.sqnorm)


def test_law_equal_rows_have_equal_bits_even_in_other_shards(loaded, monkeypatch):
    monkeypatch.setattr(cutting, "SHARD_TOKENS", 400)
    rows = [json.loads(line) for line in bundled_pool_path().read_text().splitlines()[:6]]
    pool = open_pool([*rows, *rows[::-1], rows[0]])
    targets = torch.randn(2, LoraForward(loaded).n_parameters, dtype=torch.float64)
    got = take(pool, loaded, targets=targets, batch_tokens=500)
    copies = [(i, 11 - i) for i in range(6)] + [(0, 12)]
    copies = [(a, b) for a, b in copies if got.has_gradient[a]]
    assert len(copies) > 3
    for a, b in copies:
        assert got.sqnorm[a] == got.sqnorm[b] and (got.dots[a] == got.dots[b]).all()
        assert got.first_equal[b] == a


def test_law_an_interrupted_run_ends_in_the_same_bytes(tmp_path, pool, loaded, monkeypatch):
    monkeypatch.setattr(cutting, "SHARD_TOKENS", 700)
    options = dict(sketch=SketchSpec(32), targets=torch.ones(1, LoraForward(loaded).n_parameters, dtype=torch.float64))
    expected = take(pool, loaded, store=tmp_path / "whole", **options)
    original, calls = GradientWorker.__call__, []

    def interrupted(self, shard):
        calls.append(shard)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, shard)

    monkeypatch.setattr(GradientWorker, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        take(pool, loaded, store=tmp_path / "broken", **options)
    got = take(pool, loaded, store=tmp_path / "broken", **options)
    assert len(calls) == 4  # the third again, nothing else
    np.testing.assert_array_equal(got.dots, expected.dots)
    for whole_file in (tmp_path / "whole").glob("*.npy"):
        assert whole_file.read_bytes() == (tmp_path / "broken" / whole_file.name).read_bytes()
    assert isinstance(got._shards[0][1], np.memmap)
    with pytest.raises(InputError, match="sketch"):
        take(pool, loaded, store=tmp_path / "broken", **options | {"sketch": SketchSpec(32, seed=1)})


def test_the_fingerprint_knows_the_adapters_scale(tmp_path, pool, tokenizer):
    loaded = tiny(tokenizer)
    take(pool, loaded, store=tmp_path / "store")
    loaded.model.get_base_model().model.layers[0].self_attn.q_proj.scaling["default"] = 9.0
    with pytest.raises(InputError, match="adapter"):
        take(pool, loaded, store=tmp_path / "store")


def test_rows_without_a_gradient_say_why(loaded):
    rows = [
        {"instruction": "say a", "output": "a"},
        {"instruction": "x" * 400, "output": "masked: the prompt fills the window"},
        {"instruction": "say much", "output": "b" * 400},
        {"instruction": "", "output": ""},
    ]
    got = take(open_pool(rows), loaded, step="adam", moments=some_moments(LoraForward(loaded).n_parameters))
    assert got.status[1] == SKIPPED and "leaves no answer token" in got.reasons[1]
    assert got.status[2] == TRUNCATED and got.status[3] >= SKIPPED
    assert np.isnan(got.loss[[1, 3]]).all() and np.isnan(got.sqnorm[[1, 3]]).all()
    assert np.isfinite(got.loss[[0, 2]]).all() and got.has_gradient.tolist() == [True, False, True, False]


def test_a_row_that_is_not_finite_is_flagged_and_leaves_the_others_alone(tokenizer):
    loaded = tiny(tokenizer, torch.float32)
    rows = [{"instruction": "say a", "output": "a b c"}, {"instruction": "say ~", "output": "d e ~ f"}]
    forward = LoraForward(loaded)
    expected = take(open_pool(rows), loaded, forward=forward)
    with torch.no_grad():
        loaded.model.get_base_model().model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("~")] = float("nan")
    options = dict(sketch=SketchSpec(16), targets=torch.ones(1, forward.n_parameters), forward=forward)
    got = take(open_pool(rows), loaded, **options)
    assert "not a finite number" in got.reasons[1] and got.status[1] == SKIPPED
    assert np.isnan(got.dots[1]).all() and got.sqnorm[0] == pytest.approx(expected.sqnorm[0], rel=1e-5)
    assert [rows.tolist() for rows, _ in got.sketches()] == [[0]]


def test_conversations_learn_every_answer(loaded):
    """The gradient of a conversation weighs each labelled token alike, whichever answer it is of."""
    turns = [("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "the second answer")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    got = take(open_pool([row]), loaded, dense=True)
    tokenise = TrainingTokenizer(loaded.tokenizer, load_template("tulu", loaded.tokenizer), max_length=MAX_LENGTH)
    ((ids, labelled),) = tokenise(open_pool([row]).examples([0]))[0].sequences
    assert len(labelled) == len("first") + len("the second answer") + 2  # and two ends of text
    expected = autograd(open_pool([row]), loaded)[0][1]
    torch.testing.assert_close(whole(got)[0], expected, rtol=2e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.slow
def test_other_processes_take_the_same_gradients(pool, loaded, monkeypatch):
    monkeypatch.setattr(cutting, "SHARD_TOKENS", 1500)
    targets = torch.ones(1, LoraForward(loaded).n_parameters, dtype=torch.float64)
    here = take(pool, loaded, targets=targets)
    there = take(pool, loaded, targets=targets, executor=LocalProcesses(1))
    np.testing.assert_array_equal(here.dots, there.dots)


def test_stored_sketches_do_not_underflow():
    sketch = torch.tensor([[1e-30, -3e-31, 0.0], [7e8, -1.0, 60000.0], [0.0, 0.0, 0.0], [2.0**-126, 1.0, -1.0]])
    stored, exponent, norm = as_stored(sketch)
    assert np.isfinite(stored).all()
    back = np.ldexp(stored.astype(np.float64), exponent.astype(int)[:, None])
    np.testing.assert_allclose(back[:, 0], sketch[:, 0].double().numpy(), rtol=2.0**-11, atol=1e-7)
    np.testing.assert_allclose(back[0], sketch[0].double().numpy(), rtol=2.0**-11)
    np.testing.assert_allclose(norm[1], np.linalg.norm(sketch[1].double().numpy()), rtol=1e-7)
    assert (np.abs(stored).max(1)[[0, 1, 3]] >= 2**14).all()


def test_moments_follow_the_order_of_coordinates(loaded):
    class State:
        step, betas, eps = 3, (0.8, 0.9), 1e-6
        moments = {
            name: (p.detach() * 2, p.detach() ** 2) for name, p in loaded.model.named_parameters() if "lora_" in name
        }

    modules = LoraForward(loaded).modules
    moments = moments_of(State, modules)
    expected = torch.cat([p.detach().reshape(-1) for name, p in loaded.model.named_parameters() if "lora_" in name])
    assert torch.equal(moments.exp_avg, expected * 2) and torch.equal(moments.exp_avg_sq, expected**2)
    assert moments[2:] == (3, (0.8, 0.9), 1e-6)


def test_edges_nan_has_no_sign():
    """A = (1, 1), B = (1, 1), x = (NaN, 1), delta = (1, 1): dA = (NaN, 2), dB = (NaN, NaN)."""
    module = LoraModule(0, "q", ("a", "b"), torch.ones(1, 2), torch.ones(2, 1), 1.0, 0)
    x = torch.tensor([[float("nan"), 1.0]])
    part = ModuleTokens(module, x, torch.ones(1, 2), 1.0, torch.tensor([0, 1]), slice(0, 1))
    assert _whole(part, None, "sign", torch.float64)[0].tolist()[1] == 1
    assert _whole(part, None, "sign", torch.float64)[0].isnan().tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(step="adagrad"), "step='adagrad' is not known; it is one of: adam, sgd, sign"),
        (dict(step="adam"), "needs Adam's moments"),
        (dict(step="adam", moments=some_moments(5)), "5 coordinates, the adapter"),
        (dict(targets=torch.ones(2, 3)), r"want \[s, "),
        (dict(eps_mode="beside"), "eps_mode='beside'"),
        (dict(batch_tokens=0), "batch_tokens=0 must be at least 1"),
        (dict(overflow="wrap"), "overflow='wrap'"),
    ],
)  # fmt: skip
def test_refuses_options(pool, loaded, options, message):
    with pytest.raises(UsageError, match=message):
        take(pool, loaded, **options)
