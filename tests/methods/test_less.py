"""LESS: an example worked by hand, a slow transcription in float64, sketches, several targets, rows without a score."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastsel
from fastsel.errors import FastselWarning, InputError, UsageError
from fastsel.features.influence import Directions, Influence, RunState, target_directions, weights_of
from fastsel.features.targets import open_targets
from fastsel.features.training_rows import TrainingTokenizer
from fastsel.io import open_pool
from fastsel.io.templates import load_template
from fastsel.models.checkpoints import open_checkpoints
from fastsel.models.lora_forward import ModuleTokens
from fastsel.models.lora_modules import LoraModule

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

WORDS = 50
QUIET = dict(progress="none", leaks="none", template="none", max_length=24)


def tiny_pair(dtype=torch.float64):
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    vocabulary = {"<eos>": 0, "[UNK]": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="<eos>")
    return transformers.LlamaForCausalLM(config).to(dtype).eval(), tokenizer


def some_rows(n, seed, **fields):
    draw = np.random.default_rng(seed)
    sentence = lambda count: " ".join(f"w{w}" for w in draw.integers(0, WORDS, count))  # noqa: E731
    return [{"instruction": sentence(4), "output": sentence(1 + i % 7), **fields} for i in range(n)]


@pytest.fixture(scope="module")
def pool():
    return [*some_rows(14, 0), {"instruction": "w1 " * 30, "output": "w2"}]  # the last one's prompt fills the window


@pytest.fixture(scope="module")
def target():
    return [*some_rows(3, 1, task="a"), *some_rows(1, 2, task="b"), *some_rows(2, 3, task="c")]


@pytest.fixture(scope="module")
def run(tmp_path_factory, pool):
    """Two checkpoints of a run that really learns, with Adam's state and learning rates."""
    folder = tmp_path_factory.mktemp("run")
    fastsel.warmup(
        pool, output=folder / "run", model=tiny_pair(torch.float32), fraction=0.6, epochs=2, lora_r=2, rows_a_step=3,
        learning_rate=1e-2, template="none", max_length=24, target_modules=["q_proj", "v_proj"], progress="none",
    )  # fmt: skip
    return folder / "run"


def choose(pool, target, run, **options):
    options = {**QUIET, "budget": 4, "model": tiny_pair(), "subtask_column": "task", "checkpoints": run, **options}
    return fastsel.less(pool, target=target, **options)


def naive(pool, target, run, *, aggregation="official", eps_mode="inside"):
    """M[i, s] line by line: every gradient whole, by autograd, one row at a time."""
    checkpoints = open_checkpoints(run)
    weights = np.array([checkpoint.learning_rate for checkpoint in checkpoints])
    weights = weights / weights.sum()
    total = 0.0
    for checkpoint, weight in zip(checkpoints, weights, strict=True):
        model, tokenizer = tiny_pair()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.PeftModel.from_pretrained(model, str(checkpoint.folder), is_trainable=True).double().eval()
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        state = torch.load(checkpoint.folder / "optimizer.pt", weights_only=True)["state"]
        first = torch.cat([state[i]["exp_avg"].reshape(-1) for i in range(len(parameters))]).double()
        second = torch.cat([state[i]["exp_avg_sq"].reshape(-1) for i in range(len(parameters))]).double()
        t = int(state[0]["step"]) + 1
        tokenise = TrainingTokenizer(tokenizer, load_template("none"), max_length=24)

        def gradients(rows, model=model, parameters=parameters, tokenise=tokenise):
            found = {}
            rows = open_pool(rows)
            for row in tokenise(rows.examples(range(len(rows)))):
                for ids, labelled in row.sequences:
                    logits = model(input_ids=torch.tensor([ids])).logits[0]
                    places = torch.tensor(labelled)
                    loss = torch.nn.functional.cross_entropy(logits[places - 1], torch.tensor(ids)[places])
                    pieces = torch.autograd.grad(loss, list(parameters.values()))
                    found[row.row_id] = torch.cat([piece.reshape(-1) for piece in pieces])
            return found

        of_pool, of_target = gradients(pool), gradients(target)
        products = np.full((len(pool), 3), np.nan)
        for i, g in of_pool.items():
            m, v = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            if eps_mode == "inside":
                gamma = m / torch.sqrt(v + 1e-8)
            else:
                gamma = (m / (1 - 0.9**t)) / (torch.sqrt(v / (1 - 0.999**t)) + 1e-8)
            for s, task in enumerate("abc"):
                mine = [of_target[j] for j, row in enumerate(target) if row["task"] == task]
                if aggregation == "paper":
                    products[i, s] = torch.cosine_similarity(gamma, torch.stack(mine).mean(0), 0)
                else:
                    products[i, s] = np.mean([float(torch.cosine_similarity(gamma, g_j, 0)) for g_j in mine])
        total = total + weight * products
    return total


def test_worked_by_hand():
    """Gradients (dA; dB) of one module with A = (0, 0), B = (1): dA = sum_t delta_t x_t, dB = 0.

    Target rows of subtask s: (3, 4, 0) and (0, 2, 0). As the code does it, u = ((.6, .8) + (0, 1)) / 2 = (.3, .9),
    whose length is .949; as the paper says, the mean (1.5, 3) over its length: (.447, .894).
    A pool row with feature (4, 3, 0), of length 5: .8 x .3 + .6 x .9 = .78, and .8 x .447 + .6 x .894 = .894.
    Two checkpoints with learning rates 3e-5 and 1e-5 weigh 3/4 and 1/4: products .78 and -.02 give .58.
    """
    given = {7: (3.0, 4.0), 8: (0.0, 2.0)}
    module = LoraModule(0, "layer", ("a", "b"), torch.zeros(1, 2), torch.ones(1, 1), 1.0, 0)

    def forward(examples, consumer, **_):
        x = torch.tensor([given[example[0].ids[0]] for example in examples])
        offsets = torch.arange(len(x) + 1)
        consumer(ModuleTokens(module, x, torch.ones(len(x), 1), 1.0, offsets, slice(0, len(x))))
        return torch.zeros(len(x), dtype=torch.float64)

    _, tokenizer = tiny_pair()
    loaded = SimpleNamespace(tokenizer=tokenizer, device=torch.device("cpu"), max_positions=64, dtype=torch.float32)
    state = RunState(loaded, SimpleNamespace(n_parameters=3, modules=[module], run=forward, loaded=loaded), None)
    targets = open_targets([{"instruction": "w5", "output": "w1"}, {"instruction": "w6", "output": "w1"}])
    options = dict(template=load_template("none"), max_length=24)
    official = target_directions(targets, state, **options).vectors
    paper = target_directions(targets, state, aggregation="paper", **options).vectors
    np.testing.assert_allclose(official, [[0.3, 0.9, 0]], rtol=1e-6)
    np.testing.assert_allclose(paper, [[0.4472136, 0.8944272, 0]], rtol=1e-6)
    feature = np.array([4.0, 3.0, 0]) / 5
    assert feature @ official[0].numpy() == pytest.approx(0.78)
    assert feature @ paper[0].numpy() == pytest.approx(0.8944, abs=1e-4)
    weights, note = weights_of([SimpleNamespace(learning_rate=3e-5), SimpleNamespace(learning_rate=1e-5)])
    assert weights == pytest.approx([0.75, 0.25]) and note is None
    assert weights[0] * 0.78 + weights[1] * -0.02 == pytest.approx(0.58)
    weights, note = weights_of([SimpleNamespace(learning_rate=None), SimpleNamespace(learning_rate=1e-5)])
    assert weights == [0.5, 0.5] and "count alike" in note


def test_a_row_counts_by_its_best_subtask_and_each_target_has_its_own():
    products = np.array([[0.1, 0.5, 0.2], [0.4, 0.3, 0.9], [np.nan] * 3])
    directions = Directions(torch.zeros(3, 1), ["a", "b", "c"], np.array([0, 0, 1]), [])
    np.testing.assert_array_equal(
        Influence(products, None, directions, []).by_target, [[0.5, 0.2], [0.4, 0.9], [np.nan] * 2]
    )


@pytest.mark.parametrize(
    ("aggregation", "eps_mode"), [("official", "inside"), ("official", "outside"), ("paper", "inside")]
)
def test_matches_the_transcription(pool, target, run, aggregation, eps_mode):
    expected = naive(pool, target, run, aggregation=aggregation, eps_mode=eps_mode)
    got = choose(pool, target, run, aggregation=aggregation, eps_mode=eps_mode)
    ours = np.stack([got.metrics[f"infl_{task}"] for task in "abc"], axis=1)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    best = expected.max(axis=1)
    np.testing.assert_allclose(got.scores, best, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got.indices, np.argsort(-best)[:4])  # NaN last


def test_rows_without_a_score_are_excluded_and_reported(pool, target, run):
    got = choose(pool, target, run, budget=1.0)
    assert len(got.indices) == 14 and 14 not in got.indices
    assert np.isnan(got.scores[14]) and "leaves no answer token" in got.reasons[14]
    masked = {"instruction": "w1 " * 30, "output": "w2", "task": "a"}
    without = choose(pool, [*target, masked], run)
    np.testing.assert_array_equal(without.scores, got.scores)
    assert any("1 cannot be used" in note for note in without.notes)
    with pytest.raises(InputError, match="no row that can be used"):
        choose(pool, [masked], run)


def test_law_sketches_err_as_projections_of_their_size_do(pool, target, run):
    """Over seeds, (1 - c^2) / sqrt(k) for the cosine with one target row; 256 coordinates are four blocks of 64, within
    which none meet, so that a quarter of the pairs does not err.
    """
    one, size, n_seeds = target[:1], 64, 24
    last = open_checkpoints(run)[-1].folder
    exact = choose(pool, one, last).scores[:14]
    found = np.stack(
        [choose(pool, one, last, mode="sketch", sketch_size=size, seed=seed).scores[:14] for seed in range(n_seeds)]
    )
    errors = (found - exact) / ((1 - exact**2) / size**0.5)
    assert 0.75**0.5 * 0.75 < np.sqrt(np.mean(errors**2)) < 0.75**0.5 * 1.35
    assert np.abs(errors.mean(axis=0)).max() < 4 / n_seeds**0.5
    # All checkpoints and subtasks: nearer to the exact scores, since cosines are averaged.
    whole = choose(pool, target, run)
    got = choose(pool, target, run, mode="sketch", sketch_size=4096)
    np.testing.assert_allclose(got.scores, whole.scores, atol=0.02)


def test_a_store_of_sketches_serves_another_target(tmp_path, pool, target, run, monkeypatch):
    from fastsel.features.gradient_rows import GradientWorker

    first = choose(pool, target, run, mode="sketch", sketch_size=64, store=tmp_path)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert len(folders) == 2 and all(name.startswith("checkpoint-") for name in folders)
    fresh = choose(pool, target[:3], run, mode="sketch", sketch_size=64)
    monkeypatch.setattr(GradientWorker, "__call__", lambda *_: pytest.fail("a pool row went through the model again"))
    again = choose(pool, target[:3], run, mode="sketch", sketch_size=64, store=tmp_path)
    np.testing.assert_array_equal(again.scores, fresh.scores)
    assert not np.array_equal(again.scores, first.scores)
    with pytest.raises(InputError, match="another computation"):
        choose(pool, target, run, mode="sketch", sketch_size=32, store=tmp_path)


def test_several_targets_take_turns_or_take_a_budget_each(pool, target, run):
    targets = {"first": target[:3], "second": target[3:]}
    both = choose(pool, targets, run, subtask_column=None)
    scores = np.stack([both.metrics["infl_first"], both.metrics["infl_second"]], axis=1)[:14]
    first, second = (np.argsort(-scores[:, t], kind="stable") for t in (0, 1))
    assert both.indices[0] == first[0]
    assert both.indices[1] == next(row for row in second if row != first[0])
    np.testing.assert_array_equal(both.scores[:14], scores.max(axis=1))
    union = choose(pool, targets, run, subtask_column=None, combine="union")
    assert set(union.indices) == set(first[:4]) | set(second[:4])
    alone = choose(pool, targets["second"], run, subtask_column=None)
    np.testing.assert_allclose(alone.scores, both.metrics["infl_second"], rtol=1e-12)


def test_it_warms_up_by_itself_and_goes_on(tmp_path, pool, target):
    options = dict(checkpoints=None, model=tiny_pair(torch.float32), epochs=2, lora_r=2, learning_rate=1e-2,
                   warmup_fraction=0.5)  # fmt: skip
    got = choose(pool, target, None, store=tmp_path, **options)
    assert sorted(p.name for p in tmp_path.iterdir())[-1] == "warmup"
    assert np.isfinite(got.scores[:14]).all()
    again = choose(pool, target, tmp_path / "warmup", model=tiny_pair(torch.float32))
    np.testing.assert_array_equal(again.scores, got.scores)
    without_a_place = choose(pool, target, None, **options)
    np.testing.assert_array_equal(without_a_place.scores, got.scores)


def test_leaks_are_dropped_when_asked(pool, target, run):
    leaking = [*pool[:5], {k: target[0][k] for k in ("instruction", "output")}, *pool[5:]]
    with pytest.warns(FastselWarning, match="1 pool rows hold 1"):
        got = choose(leaking, target, run, leaks="equal", drop_leaks=True, budget=1.0)
    assert 5 not in got.indices and np.isfinite(got.scores[5])


def test_the_model_is_left_as_it_was(pool, target, run):
    model, tokenizer = tiny_pair()
    before = {name: p.clone() for name, p in model.named_parameters()}
    choose(pool, target, run, model=(model, tokenizer))
    assert list(before) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_official_asks_as_the_code_does(pool, target, run):
    """The start token, the newline that is learnt, target answers without an end."""
    _, tokenizer = tiny_pair()
    row = open_pool([{"messages": [
        {"role": "user", "content": "w1"}, {"role": "assistant", "content": " w2 "},
        {"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"},
    ]}]).examples([0])[0]  # fmt: skip
    turns = load_template("less", tokenizer).turns(row)
    assert [turn.answer for turn in turns] == ["w2<eos>\n", "w4<eos>\n"]
    assert turns[1].prompt == "<|user|>\nw1\n<|assistant|>\nw2<eos>\n<|user|>\nw3\n<|assistant|>\n"
    assert [turn.answer for turn in load_template("less_target", tokenizer).turns(row)] == ["w2", "w4"]
    got = choose(pool, target, run, template="less", official=True)
    other = choose(pool, target, run, template="less")
    assert got.official and not np.array_equal(got.scores, other.scores)


def authors_scores(pool, target, run, k):
    """{checkpoint step: (pool features, target features)} unnormalised, and scores: the code's steps one after another.

    collect_grads (see tests/features/test_less_official.py for its projection), its normalisation, matching.py.
    """
    checkpoints = open_checkpoints(run)
    weights = [checkpoint.learning_rate for checkpoint in checkpoints]
    weights = [weight / sum(weights) for weight in weights]
    features, matched = {}, 0
    for checkpoint, weight in zip(checkpoints, weights, strict=True):
        model, tokenizer = tiny_pair(torch.bfloat16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.PeftModel.from_pretrained(model, str(checkpoint.folder), is_trainable=True).bfloat16().eval()
        state = torch.load(checkpoint.folder / "optimizer.pt", weights_only=True)["state"]
        first, second = (torch.cat([state[i][m].view(-1) for i in sorted(state)]) for m in ("exp_avg", "exp_avg_sq"))

        def collected(rows, template, adam, model=model, first=first, second=second, tokenizer=tokenizer):
            tokenise = TrainingTokenizer(tokenizer, load_template(template, tokenizer), max_length=24)
            opened, projected, waiting = open_pool(rows), [], []
            kept = [row for row in tokenise(opened.examples(range(len(opened)))) if row.sequences]
            for count, row in enumerate(kept, 1):
                ((ids, labelled),) = row.sequences
                ids = torch.tensor([ids])
                labels = torch.full_like(ids, -100)
                labels[0, labelled] = ids[0, labelled]
                model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
                g = torch.cat([p.grad.view(-1) for p in model.parameters() if p.grad is not None])
                if adam:
                    avg = 0.9 * first + (1 - 0.9) * g
                    avg_sq = 0.999 * second + (1 - 0.999) * g**2
                    g = avg / torch.sqrt(avg_sq + 1e-08)
                waiting.append(g)
                model.zero_grad()
                if count % 16 == 0 or count == len(kept):
                    x, waiting = torch.stack(waiting).to(torch.float16).to(torch.bfloat16), []
                    blocks = []
                    for index in range(-(-k // 128)):
                        generator = torch.Generator().manual_seed(1000 * index)
                        block = torch.empty(x.shape[1], min(k, 128), dtype=x.dtype)
                        blocks.append(x @ (block.bernoulli_(p=0.5, generator=generator) * 2.0 - 1.0))
                    projected.append(torch.cat(blocks, 1)[:, :k])
            return torch.cat(projected)

        of_pool, of_target = collected(pool, "less", True), collected(target, "less_target", False)
        features[checkpoint.step] = of_pool, of_target
        training, validation = (torch.nn.functional.normalize(x, dim=1).float() for x in (of_pool, of_target))
        matched = matched + weight * torch.matmul(training, validation.transpose(0, 1))
    return features, matched


def test_official_is_the_codes_pipeline_from_rows_to_scores(tmp_path, run):
    """Twenty rows are two groups of the projection; two subtasks of three rows, as the code needs them."""
    pool = some_rows(20, 5)
    target = [*some_rows(3, 6, task="a"), *some_rows(3, 7, task="b")]
    k = 160
    features, matched = authors_scores(pool, target, run, k)
    expected = matched.reshape(20, 2, -1).mean(-1).max(-1)[0]
    got = choose(
        pool, target, run, template="less", official=True, sketch_size=k, model=tiny_pair(torch.bfloat16),
        store=tmp_path,
    )  # fmt: skip
    for step, (of_pool, _) in features.items():
        (file,) = (tmp_path / f"checkpoint-{step}").glob("*.npy")
        stored = np.load(file)["trak"]
        np.testing.assert_array_equal(stored, of_pool.float().numpy())
    np.testing.assert_allclose(got.scores, expected.numpy(), rtol=0, atol=1e-6)
    assert got.indices.tolist() == torch.sort(expected, descending=True)[1][:4].tolist()
    assert got.config["mode"] == "trak" and got.provenance["dtype"] == "bfloat16"
    # What it estimates, and what the code's bfloat16 does to it: whole gradients in bfloat16 rank much alike.
    whole = choose(pool, target, run, template="less", official=True, mode="direct", model=tiny_pair(torch.float32))
    assert np.corrcoef(got.scores, whole.scores)[0, 1] > 0.8


def test_official_marks_rows_without_a_score_and_keeps_equal_rows_equal(run, target):
    rows = some_rows(5, 0)
    pool = [*rows, {"instruction": "w1 " * 30, "output": "w2"}, rows[0]]
    got = choose(pool, target, run, mode="trak", sketch_size=64, budget=1.0)
    assert np.isnan(got.scores[5]) and "leaves no answer token" in got.reasons[5]
    assert got.scores[6] == got.scores[0] and 5 not in got.indices
    paper = choose(pool, target, run, mode="trak", sketch_size=64, budget=1.0, aggregation="paper")
    assert not np.array_equal(paper.scores[:5], got.scores[:5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="trak", eps_mode="outside"), "trak= gives LESS's own features, whose eps is inside the root"),
        (dict(mode="both"), "mode='both' is not known; it is one of: direct, sketch, trak"),
        (dict(aggregation="sum"), "aggregation='sum' is not known"),
        (dict(combine="sum"), "combine='sum' is not known"),
        (dict(eps_mode="none"), "eps_mode='none' is not known"),
    ],
)
def test_refuses_options(pool, target, run, options, message):
    with pytest.raises(UsageError, match=message):
        choose(pool, target, run, **options)


def test_refuses_a_missing_target(pool, run):
    with pytest.raises((InputError, UsageError)):
        choose(pool, None, run)


@pytest.mark.slow
def test_the_command_line_takes_it(tmp_path, pool, target, run):
    from fastsel.cli import main

    model, tokenizer = tiny_pair(torch.float32)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, rows in (("pool", pool), ("target", target)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["select", "less", "--pool", str(tmp_path / "pool.jsonl"), "--target", str(tmp_path / "target.jsonl"),
             "--subtask-column", "task", "--checkpoints", str(run), "--model", str(tmp_path / "model"), "--budget", "4",
             "--template", "none", "--max-length", "24", "--leaks", "none", "-o", str(tmp_path / "out")]  # fmt: skip
    assert main([*words, "--mode", "sketch", "--sketch-size", "64"]) == 0
    rows = (tmp_path / "out" / "selected.jsonl").read_text().splitlines()
    assert len(rows) == 4
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in target[3:]))
    again = ["select", "--from", str(tmp_path / "out"), "--target", str(other), "-o", str(tmp_path / "again")]
    assert main(again) == 0
    fresh = choose(pool, target[3:], run, mode="sketch", sketch_size=64, model=tiny_pair(torch.float32))
    chosen = [json.loads(line) for line in (tmp_path / "again" / "selected.jsonl").read_text().splitlines()]
    assert chosen == [pool[i] for i in sorted(fresh.indices)]
