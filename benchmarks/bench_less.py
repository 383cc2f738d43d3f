"""LESS's features against the authors' loop and a batch-of-one loop, and what reducing gradients costs beside them.

FASTSEL_BENCH_POOL names a pool (the bundled 256 rows by default), FASTSEL_BENCH_ROWS how many of its rows (64);
FASTSEL_BENCH_LESS a checkout of princeton-nlp/LESS@8abf962, which wants traker 0.3.2 beside it. Everything runs the
same float32 SmolLM2-135M with the same LoRA of rank 8 on q, k, v, o, and made-up moments of Adam.
"""

import json
import os
import sys
import warnings
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import fastsel
from fastsel.features.gradient_rows import AdamMoments, BatchFeatures, GradientRule, batches
from fastsel.features.gradients import _batch_tokens
from fastsel.features.training_rows import TrainingTokenizer
from fastsel.io import open_pool
from fastsel.io.templates import load_template
from fastsel.kernels.lora_gradient_sketch import SketchSpec
from fastsel.models.loading import load_model
from fastsel.models.lora_forward import LabelledSequence, LoraForward

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SKETCH_SIZE, N_TARGETS, MAX_LENGTH = 8192, 16, 1024
AUTHORS, ONE_BY_ONE, BARE = "LESS's collect_grads", "autograd, batch 1", "the forward and backward alone"


def bench_rows(count):
    path = os.environ.get("FASTSEL_BENCH_POOL")
    source = Path(path) if path else files("fastsel").joinpath("data/pool_small.jsonl")
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    chosen = fastsel.random(rows, budget=min(count, len(rows)), per="source", seed=0).indices
    return [rows[i] for i in sorted(chosen)], source.name


class Setting:
    """The model, its rows and what is computed of them."""

    def __init__(self, count, attention=ATTENTION):
        import peft

        loaded = load_model("bundled", device="cpu", dtype="float32")
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=attention, task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks for what transformers deprecates
            self.model = peft.get_peft_model(loaded.model, config).eval()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
        loaded = load_model((self.model, loaded.tokenizer), device="cpu")
        self.forward = LoraForward(loaded)
        rows, self.source = bench_rows(count)
        tokenise = TrainingTokenizer(loaded.tokenizer, load_template("less", loaded.tokenizer), max_length=MAX_LENGTH)
        pool = open_pool(rows)
        self.rows = [row for row in tokenise(pool.examples(range(len(pool)))) if len(row.sequences) == 1]
        self.sequences = [row.sequences[0] for row in self.rows]
        self.case = f"{len(self.rows)} rows of {self.source}, {sum(row.size for row in self.rows)} tokens"
        p = self.forward.n_parameters
        self.moments = AdamMoments(
            torch.randn(p, generator=generator) * 1e-4, torch.rand(p, generator=generator) * 1e-6, 10
        )
        self.targets = torch.nn.functional.normalize(torch.randn(N_TARGETS, p, generator=generator), dim=1)
        self.adam = GradientRule("adam", moments=self.moments)

    def run(self, rule, rows=None):
        """[rows, dots and norm | k | p] in the order of the rows; rule None: nothing is made of the gradients."""
        rows, found = self.rows if rows is None else rows, {}
        for batch in batches(rows, _batch_tokens(self.forward)):
            examples = [[LabelledSequence(*sequence) for sequence in row.sequences] for row in batch]
            features = None if rule is None else BatchFeatures(len(batch), self.forward, rule, "auto")
            self.forward.run(examples, features or (lambda part: None))
            if rule is not None and rule.targets is not None:
                kept = torch.column_stack([features.dots, features.sqnorms])
            elif rule is not None:
                kept = features.dense if rule.dense else features.sketch
            if rule is not None:
                found |= zip((row.row_id for row in batch), kept, strict=True)
        return torch.stack([found[row.row_id] for row in rows]) if found else None

    def one_by_one(self):
        """[rows, p]: as one writes it first."""
        gradients = []
        for ids, labelled in self.sequences:
            token_ids = torch.tensor([ids])
            labels = torch.full_like(token_ids, -100)
            labels[0, labelled] = token_ids[0, labelled]
            self.model(input_ids=token_ids, labels=labels).loss.backward()
            gradients.append(torch.cat([p.grad.reshape(-1) for p in self.model.parameters() if p.grad is not None]))
            self.model.zero_grad()
        return torch.stack(gradients)


def rules(setting):
    return {
        "direct": GradientRule("adam", moments=setting.moments, targets=setting.targets),
        "sketch": GradientRule("adam", moments=setting.moments, sketch=SketchSpec(SKETCH_SIZE)),
    }


@pytest.fixture(scope="module")
def setting():
    return Setting(int(os.environ.get("FASTSEL_BENCH_ROWS", "64")))


def same_gradients(ours, theirs):
    """Up to what autograd's float32 loss errs by: 1.5e-4 at most, 7e-5 on average; ours: 1e-5 and 6e-6."""
    error = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    assert error.max() < 2e-4, f"a gradient differs by {error.max():.1e}"
    assert error.median() < 1e-4, f"half the gradients differ by {error.median():.1e}"


@pytest.mark.slow
def test_gradients_alone(compare, setting):
    whole = GradientRule("sgd", dense=True)
    compare(
        lambda: setting.run(whole), setting.one_by_one, op="less", case=f"gradients alone, {setting.case}",
        name=ONE_BY_ONE, check=same_gradients, rounds=3,
    )  # fmt: skip


@pytest.mark.gate
def test_gradients_of_a_few_rows(compare):
    few = Setting(6)
    whole = GradientRule("sgd", dense=True)
    compare(
        lambda: few.run(whole), few.one_by_one, op="less", case=f"gradients alone, {few.case}", name=ONE_BY_ONE,
        check=same_gradients, rounds=2,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["direct", "sketch"])
def test_the_whole_step_over_its_forward_and_backward(compare, peak_memory, setting, mode):
    rule = rules(setting)[mode]
    setting.run(rule)  # memory that stays is not this call's
    _, our_peak = peak_memory(lambda: setting.run(rule))
    what = f"{N_TARGETS} targets" if mode == "direct" else f"SJLT to {SKETCH_SIZE}"
    compare(
        lambda: setting.run(rule), lambda: setting.run(None), op="less", case=f"{mode}, {what}, {setting.case}",
        name=BARE, check=None, rounds=3, info={"our_peak_bytes": our_peak},
    )  # fmt: skip


@pytest.fixture(scope="module")
def authors(setting, call_once, tmp_path_factory):
    """Their normalised features of all rows, and the time that took: minutes, so once for both tests."""
    checkout = os.environ.get("FASTSEL_BENCH_LESS")
    if not checkout:
        pytest.skip("FASTSEL_BENCH_LESS names no checkout of princeton-nlp/LESS")
    pytest.importorskip("trak", reason="needs traker 0.3.2")
    sys.path.insert(0, checkout)
    warnings.simplefilter("ignore")  # theirs
    from less.data_selection import collect_grad_reps

    collect_grad_reps.prepare_batch = lambda batch: None  # it names cuda:0
    state, first = {}, 0
    for name, p in setting.model.named_parameters():
        if p.requires_grad:
            part = slice(first, first := first + p.numel())
            state[name] = {"exp_avg": setting.moments.exp_avg[part], "exp_avg_sq": setting.moments.exp_avg_sq[part]}
    loader = []
    for ids, labelled in setting.sequences:
        token_ids = torch.tensor([ids])
        labels = torch.full_like(token_ids, -100)
        labels[0, labelled] = token_ids[0, labelled]
        loader.append({"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids), "labels": labels})
    folder = tmp_path_factory.mktemp("authors")

    def features():
        collect_grad_reps.collect_grads(
            loader, setting.model, str(folder), proj_dim=[SKETCH_SIZE], adam_optimizer_state=state
        )
        return torch.load(folder / f"dim{SKETCH_SIZE}" / "all_orig.pt", weights_only=True).double()

    return call_once(features)


def same_cosines(ours, theirs):
    """Of two projections, or of one and the truth: each errs by (1 - c^2) / sqrt(k)."""
    difference = (ours - theirs).abs().max()
    assert difference < 6 * 2**0.5 / SKETCH_SIZE**0.5, difference


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["direct", "sketch"])
def test_features_beside_the_authors(compare_all, setting, authors, mode):
    def cosines(sketch, theirs):
        unit = torch.nn.functional.normalize(sketch.double(), dim=1)
        same_cosines(unit @ unit.T, theirs @ theirs.T)

    def cosines_with_targets(kept, theirs):
        same_cosines(kept[:, :-1] / kept[:, -1:].sqrt(), theirs @ theirs[:N_TARGETS].T)

    if mode == "sketch":
        rule, what, check = rules(setting)["sketch"], "SJLT", cosines
    else:  # the first rows' own features are the targets, so that the authors' features say what to expect
        targets = setting.run(GradientRule("adam", moments=setting.moments, dense=True))[:N_TARGETS]
        targets = torch.nn.functional.normalize(targets, dim=1)
        rule, check = GradientRule("adam", moments=setting.moments, targets=targets), cosines_with_targets
        what = f"{len(targets)} targets"
    compare_all(
        lambda: setting.run(rule), [{"name": AUTHORS, "call": authors, "check": check}], op="less", rounds=3,
        case=f"features, {what}, k={SKETCH_SIZE}, {setting.case}",
    )  # fmt: skip


@pytest.mark.slow
def test_scores_beside_dattri(compare, setting, tmp_path):
    """LESS's cosines at one checkpoint; its Adam is torch's: bias-corrected, eps outside the root.

    Its loader pads nothing and stacks rows of one length only, so its batches are of one row.
    """
    dattri_llm = pytest.importorskip("dattri_llm", reason="needs dattri-llm 0.1.0")
    warnings.simplefilter("ignore")  # theirs
    n_targets = len(setting.rows) // 4
    inputs = []
    for ids, labelled in setting.sequences:
        labels = torch.full((len(ids),), -100)
        labels[labelled] = torch.tensor(ids)[labelled]
        inputs.append({"input_ids": torch.tensor(ids), "labels": labels})
    parameters = [p for p in setting.model.parameters() if p.requires_grad]
    optimizer, first = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0), 0
    for p in parameters:
        part = slice(first, first := first + p.numel())
        moments = {"exp_avg": setting.moments.exp_avg[part], "exp_avg_sq": setting.moments.exp_avg_sq[part]}
        optimizer.state[p] = {name: x.reshape(p.shape).clone() for name, x in moments.items()}
        optimizer.state[p]["step"] = torch.tensor(float(setting.moments.step))
    arguments = dattri_llm.AttributionArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, per_device_eval_batch_size=1, use_cpu=True
    )
    task = dattri_llm.AttributionTask(lambda model, batch: model(**batch).loss, setting.model)

    def theirs():
        attributor = dattri_llm.LESSAttributor(arguments, task=task, optimizers=[optimizer])
        setting.model.zero_grad()
        return attributor.attribute(inputs[n_targets:], inputs[:n_targets]).scores

    def ours():
        of_targets = setting.run(GradientRule("sgd", dense=True), setting.rows[:n_targets])
        unit = torch.nn.functional.normalize(of_targets, dim=1)
        rule = GradientRule("adam", "outside", moments=setting.moments, targets=unit)
        kept = setting.run(rule, setting.rows[n_targets:])
        return kept[:, :-1] / kept[:, -1:].sqrt()

    def same_scores(mine, other):
        assert (mine - other).abs().max() < 1e-4, (mine - other).abs().max()

    compare(
        ours, theirs, op="less", case=f"cosines with {n_targets} targets, {setting.case}",
        name="dattri-llm 0.1.0 LESSAttributor, batch 1", check=same_scores, rounds=3,
    )  # fmt: skip
