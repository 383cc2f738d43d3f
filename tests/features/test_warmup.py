"""The warm-up: what is drawn, what is learnt, and that an interrupted run ends in the same weights."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastsel
from fastsel.errors import InputError, UsageError
from fastsel.features import warmup as module
from fastsel.features.training_rows import TrainingTokenizer
from fastsel.features.warmup import draw_rows
from fastsel.io import open_pool
from fastsel.io.templates import load_template
from fastsel.models import lora_training
from fastsel.models.labelled_loss import WeightedSequence, labelled_loss, padded_batches

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

MODULES = ("q_proj", "v_proj")
OPTIONS = dict(fraction=0.5, epochs=2, lora_r=2, rows_a_step=4, learning_rate=1e-2, max_length=24, batch_tokens=40,
               template="none", target_modules=MODULES, progress="none")  # fmt: skip


def tiny_pair(kind="llama", **changes):
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = dict(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(sizes | changes))).eval()
    else:
        sizes = dict(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                     max_position_embeddings=64)  # fmt: skip
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | changes))).eval()
    vocabulary = {"<eos>": 0, "[UNK]": 1} | {f"w{i}": i + 2 for i in range(50)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model, transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="<eos>")


@pytest.fixture
def pool(tmp_path):
    """24 short rows; row 3 has no answer, row 5 is no row, row 7's prompt leaves no room for an answer."""
    draw = np.random.default_rng(0)
    lines = []
    for i in range(24):
        answer = " ".join(f"w{w}" for w in draw.integers(0, 50, 1 + i % 6))
        question = " ".join(f"w{w}" for w in draw.integers(0, 50, 30 if i == 7 else 3))
        lines.append("no row" if i == 5 else json.dumps({"instruction": question, "output": "" if i == 3 else answer}))
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return open_pool(path, max_error_rate=0.1)


def weights(checkpoint):
    return load_file(checkpoint.folder / "adapter_model.safetensors")


def assert_equal_runs(one, other):
    assert [c.step for c in one] == [c.step for c in other]
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(weights(a)[name], tensor) for name, tensor in weights(b).items())
        moments = [torch.load(c.folder / "optimizer.pt", weights_only=True)["state"] for c in (a, b)]
        for number, state in moments[0].items():
            assert all(torch.equal(state[key], moments[1][number][key]) for key in ("exp_avg", "exp_avg_sq"))


def test_matches_a_plain_loop(pool, tmp_path):
    """One step of AdamW on the mean of each row's mean loss, clipped to norm 1, written out in float64."""
    options = OPTIONS | dict(epochs=1, rows_a_step=100, lora_dropout=0.0, warmup_ratio=0.0)
    model, tokenizer = tiny_pair()
    (checkpoint,) = fastsel.warmup(pool, model=(model, tokenizer), output=tmp_path / "run", **options)
    rows = np.load(tmp_path / "run" / "rows.npy")
    tokenised = TrainingTokenizer(tokenizer, load_template("none"), max_length=24)(pool.examples(rows))
    learnt = [row for row in tokenised if row.sequences]
    assert len(learnt) == len([row for row in rows if row != 7])

    import peft

    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=list(MODULES), task_type="CAUSAL_LM")
    fresh = tiny_pair()[0]
    torch.manual_seed(0)
    with pytest.warns(FutureWarning):
        plain = peft.get_peft_model(fresh, config).double()
    total = 0
    for row in learnt:
        ((ids, labelled),) = row.sequences
        log_p = plain(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total = total - sum(log_p[at - 1, ids[at]] for at in labelled) / len(labelled)
    (total / len(learnt)).backward()
    named = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    norm = torch.sqrt(sum((p.grad**2).sum() for p in named.values()))
    state = checkpoint.adam_state(list(named))
    assert state.step == 1 and (state.betas, state.eps) == ((0.9, 0.999), 1e-8)
    for name, parameter in named.items():
        clipped = parameter.grad / max(norm, 1.0)
        assert torch.allclose(state.moments[name][0].double(), 0.1 * clipped, rtol=1e-3, atol=1e-8)
        assert torch.allclose(state.moments[name][1].double(), 0.001 * clipped**2, rtol=2e-3, atol=1e-12)
        moved = parameter.data - 1e-2 * clipped / (clipped.abs() + 1e-8)
        kept = weights(checkpoint)[name.replace(".default", "")].double()
        large = clipped.abs() > 1e-5  # elsewhere the sign of the step is rounding's
        assert torch.allclose(kept[large], moved[large], atol=2e-4)
    assert sum("lora_B" in name for name in named) == 4


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_law_interrupted_and_resumed_equals_uninterrupted(pool, tmp_path, monkeypatch, kind):
    options = OPTIONS | dict(epochs=3, target_modules="all-linear", seed=5)
    whole = fastsel.warmup(pool, model=tiny_pair(kind), output=tmp_path / "whole", **options)
    steps = [c.step for c in whole]
    assert steps == [3, 6, 9] and [c.learning_rate for c in whole] == sorted(c.learning_rate for c in whole)[::-1]

    class Interrupted(BaseException):
        pass

    def interrupted_loss(*args):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Interrupted
        return labelled_loss(*args)

    for stop_at in (1, 5, 4):  # noqa: B007  # read above
        calls = 0
        monkeypatch.setattr(lora_training, "labelled_loss", interrupted_loss)
        with pytest.raises(Interrupted):
            fastsel.warmup(pool, model=tiny_pair(kind), output=tmp_path / "parts", **options)
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "parts").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    half = tmp_path / "parts" / "checkpoint-9"  # killed while it was written
    half.mkdir()
    (half / "optimizer.pt").write_bytes(b"PK")
    (half / "trainer_state.json").write_text('{"epo')
    parts = fastsel.warmup(pool, model=tiny_pair(kind), output=tmp_path / "parts", **options)
    assert_equal_runs(whole, parts)
    assert not torch.equal(*(torch.cat([w.flatten() for w in weights(c).values()]) for c in parts[:2]))


def test_a_finished_run_is_read_and_not_trained_again(pool, tmp_path, monkeypatch):
    first = fastsel.warmup(pool, model=tiny_pair(), output=tmp_path / "run", **OPTIONS)
    monkeypatch.setattr(module, "train_adapter", None)
    again = fastsel.warmup(pool, model=tiny_pair(), output=tmp_path / "run", **OPTIONS)
    assert [c.fingerprint for c in again] == [c.fingerprint for c in first]
    assert [c.fingerprint for c in fastsel.open_checkpoints(tmp_path / "run")] == [c.fingerprint for c in first]


def test_the_model_and_the_random_generators_stay_what_they_were(pool, tmp_path):
    import random

    model, tokenizer = tiny_pair()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    fastsel.warmup(pool, model=(model, tokenizer), output=tmp_path / "run", **OPTIONS)
    assert list(model.state_dict()) == list(before) and not hasattr(model, "peft_config")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_batches_change_nothing_but_rounding(pool, tmp_path):
    options = OPTIONS | dict(lora_dropout=0.0)
    wide, narrow = (
        fastsel.warmup(pool, model=tiny_pair(), output=tmp_path / str(n), **options | dict(batch_tokens=n))
        for n in (10_000, 1)
    )
    (a, b), names = (weights(run[0]) for run in (wide, narrow)), list(weights(wide[0]))
    assert all(torch.allclose(a[name], b[name], atol=2e-3) for name in names)
    m, v = (torch.load(r[0].folder / "optimizer.pt", weights_only=True)["state"][0]["exp_avg"] for r in (wide, narrow))
    assert torch.allclose(m, v, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_law_batches_that_keep_less_have_the_same_bits(pool, tmp_path, monkeypatch, kind):
    options = OPTIONS | dict(target_modules="all-linear")
    usual = fastsel.warmup(pool, model=tiny_pair(kind), output=tmp_path / "usual", **options)
    monkeypatch.setattr(lora_training, "ACTIVATION_BYTES", 0)
    model, tokenizer = tiny_pair(kind)
    layer = model.model.layers[0].self_attn if kind == "llama" else model.transformer.h[0].attn
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    layer.register_forward_hook(count)
    assert_equal_runs(usual, fastsel.warmup(pool, model=(model, tokenizer), output=tmp_path / "less", **options))
    assert calls == 2 * 2 * 3  # twice in each of two epochs of three steps


def test_what_is_drawn_is_written_down(pool, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "fastsel"):
        fastsel.warmup(pool, model=tiny_pair(), output=tmp_path / "run", **OPTIONS | dict(fraction=1.0, epochs=1))
    rows = np.load(tmp_path / "run" / "rows.npy")
    assert sorted(rows.tolist()) == [i for i in range(24) if i not in (3, 5)]
    kept = json.loads((tmp_path / "run" / "index.json").read_text())
    assert kept["plan"] == {
        "steps an epoch": 6,
        "rows trained on": 21,
        "rows left out": {"7": "the prompt fills max_length=24 and leaves no answer token"},
    }
    assert kept["fingerprint"]["lora"]["lora_alpha"] == 8
    assert "1 of 22 rows drawn cannot be learnt (row 7: the prompt fills" in caplog.text


def test_the_draw(pool):
    """Usable rows by a frozen generator; official: all rows, with numpy's seed 42, rounded down."""
    usable = np.array([i for i in range(24) if i not in (3, 5)])
    assert draw_rows(pool, 0.25, 7).tolist() == usable[np.random.RandomState(7).permutation(22)[:6]].tolist()
    np.random.seed(42)
    assert draw_rows(pool, 0.2, 42, official=True).tolist() == np.random.permutation(24)[:4].tolist()
    assert len(draw_rows(pool, 1e-9, 0)) == 1


def test_official_draws_with_42_whatever_the_seed(pool, tmp_path):
    options = OPTIONS | dict(official=True, seed=3, epochs=1, fraction=0.3)
    fastsel.warmup(pool, model=tiny_pair(), output=tmp_path / "run", **options)
    assert np.load(tmp_path / "run" / "rows.npy").tolist() == draw_rows(pool, 0.3, 42, official=True).tolist()


def test_the_first_epochs_rate_is_that_of_the_log(pool, tmp_path):
    run = fastsel.warmup(pool, model=tiny_pair(), output=tmp_path / "run", **OPTIONS | dict(warmup_ratio=0.5))
    log = json.loads((run[-1].folder / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates == pytest.approx([1e-2 * x for x in (0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)])
    assert [c.learning_rate for c in run] == pytest.approx([np.mean(rates[:3]), np.mean(rates[3:])])


def test_edges_one_row_one_step(tmp_path):
    rows = [{"instruction": "w1", "output": "w2 w3"}]
    options = OPTIONS | dict(epochs=1, rows_a_step=4)
    (checkpoint,) = fastsel.warmup(rows, model=tiny_pair(), output=tmp_path / "run", **options)
    assert checkpoint.step == 1 and checkpoint.learning_rate == pytest.approx(1e-2)  # not 0, where the rise begins
    assert any(tensor.any() for name, tensor in weights(checkpoint).items() if "lora_B" in name)


def test_refuses_a_folder_of_another_run(pool, tmp_path):
    fastsel.warmup(pool, model=tiny_pair(), output=tmp_path / "run", **OPTIONS)
    with pytest.raises(InputError, match="epochs: 2 there, 3 now\n  fraction: 0.5 there, 0.25 now"):
        fastsel.warmup(pool, model=tiny_pair(), output=tmp_path / "run", **OPTIONS | dict(epochs=3, fraction=0.25))
    with pytest.raises(InputError, match="pool: .* there, .* now"):
        fastsel.warmup(
            [{"instruction": "w1", "output": "w2"}] * 24, model=tiny_pair(), output=tmp_path / "run", **OPTIONS
        )
    with pytest.raises(InputError, match="model: .* there, .* now"):
        fastsel.warmup(pool, model=tiny_pair(tie_word_embeddings=True), output=tmp_path / "run", **OPTIONS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(fraction=0.0), "fraction=0.0 must be above 0"),
        (dict(fraction=5), "fraction=5 must be above 0 and at most 1"),
        (dict(epochs=0), "epochs=0 must be at least 1"),
        (dict(lora_r=0), "lora_r=0 must be at least 1"),
        (dict(rows_a_step=0), "rows_a_step=0 must be at least 1"),
        (dict(learning_rate=0.0), "learning_rate=0.0 must be above 0"),
        (dict(warmup_ratio=1.0), "warmup_ratio=1.0 must be from 0 to below 1"),
        (dict(max_length=65), "max_length=65 must be from 2 to 64"),
        (dict(max_length=3), "no row drawn from .* has an answer to train on: the prompt fills max_length=3"),
        (dict(target_modules=("c_attn",)), "Its modules are called: .*q_proj.*all-linear"),
    ],
)
def test_refuses(pool, tmp_path, change, words):
    with pytest.raises(UsageError, match=words):
        fastsel.warmup(pool, model=tiny_pair(), output=tmp_path / "run", **OPTIONS | change)


def test_refuses_a_loss_that_is_not_finite(pool, tmp_path):
    model, tokenizer = tiny_pair()
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(UsageError, match="the loss of the adapter is not finite; take a lower learning_rate"):
        fastsel.warmup(pool, model=(model, tokenizer), output=tmp_path / "run", **OPTIONS)


def test_training_rows_label_every_answer_and_its_end():
    """Tulu's conversation is one sequence; a template without marks says each turn anew. A cut answer has no end."""
    _, tokenizer = tiny_pair()
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    talk = [*turns, {"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4 w5"}]
    examples = open_pool([{"messages": talk}, {"messages": talk[:2]}, {"instruction": "w1", "output": ""}]).examples(
        [0, 1, 2]
    )
    whole, short = TrainingTokenizer(tokenizer, load_template("none"), max_length=60)(examples)
    assert [len(row.sequences) for row in (whole, short)] == [2, 1]
    for ids, labelled in whole.sequences:
        assert ids[-1] == tokenizer.eos_token_id and labelled == list(range(labelled[0], len(ids)))
    (ids, labelled) = short.sequences[0]
    assert tokenizer.convert_ids_to_tokens([ids[i] for i in labelled]) == ["w2", "<eos>"]
    (cut,) = TrainingTokenizer(tokenizer, load_template("none"), max_length=2)(examples[1:2])
    assert tokenizer.convert_ids_to_tokens([cut.sequences[0][0][i] for i in cut.sequences[0][1]]) == ["w2"]
    assert TrainingTokenizer(tokenizer, load_template("none"), max_length=60, turns="last")(examples)[0].size == len(
        whole.sequences[1][0]
    )


def test_labelled_loss_matches_one_row_at_a_time():
    model, _ = tiny_pair()
    draw = np.random.default_rng(1)
    sequences = []
    for n in (3, 9, 5, 17, 9):
        labelled = sorted(draw.choice(np.arange(1, n), size=min(n - 1, 3), replace=False).tolist())
        sequences.append(WeightedSequence(draw.integers(0, 60, n).tolist(), labelled, float(draw.random())))
    expected = 0
    for ids, labelled, weight in sequences:
        log_p = model.double()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).detach()
        expected -= weight * sum(float(log_p[at - 1, ids[at]]) for at in labelled)
    model.float()
    batches = list(padded_batches(sequences, 30))
    assert [[len(s.ids) for s in batch] for batch in batches] == [[3, 5, 9], [9], [17]]
    losses = [float(labelled_loss(model, torch.device("cpu"), batch).detach()) for batch in batches]
    assert sum(losses) == pytest.approx(expected, rel=1e-5)
    whole = float(labelled_loss(model, torch.device("cpu"), sequences).detach())
    assert whole == pytest.approx(expected, rel=1e-5)

    class Without(torch.nn.Module):  # a model whose head cannot be asked for some columns only
        def forward(self, input_ids):
            return model(input_ids=input_ids)

    assert float(labelled_loss(Without(), torch.device("cpu"), sequences).detach()) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_logits_of_long_rows_are_made_in_pieces(monkeypatch, softcap):
    """The same loss and gradients, and nothing as wide as the vocabulary kept; whole where the head is not plain."""
    from fastsel.models import labelled_loss as module

    model, _ = tiny_pair()
    if softcap:
        model.config.final_logit_softcapping = softcap  # as Gemma's has it
    draw = np.random.default_rng(1)
    sequences = [WeightedSequence(draw.integers(0, 60, 40).tolist(), list(range(3, 40)), 0.1) for _ in range(3)]

    def taken():
        model.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            loss = labelled_loss(model, torch.device("cpu"), sequences)
        loss.backward()
        largest = max((t.numel() for t in kept if t.ndim == 2 and t.shape[-1] == 60), default=0)
        return float(loss.detach()), model.model.layers[0].self_attn.q_proj.weight.grad.clone(), largest

    whole, gradient, largest = taken()
    assert largest == 3 * 37 * 60
    monkeypatch.setattr(module, "WHOLE_BYTES", 16 * 60 * 10)  # ten rows a piece
    in_pieces, same_gradient, largest = taken()
    assert in_pieces == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close(same_gradient, gradient, rtol=1e-4, atol=1e-7)
    assert largest == (3 * 37 * 60 if softcap else 0)
    assert "forward" not in vars(model.lm_head)


@pytest.mark.slow
def test_bundled_model_warms_up_and_is_found_again(tmp_path):
    """SmolLM2-135M on a handful of real rows; the adapter names its base, so that nothing else is needed to load it."""
    options = dict(fraction=0.03, epochs=1, lora_r=4, rows_a_step=4, max_length=128, progress="none")
    pool = open_pool(fastsel.io.bundled_pool_path())
    (checkpoint,) = fastsel.warmup(pool, output=tmp_path / "run", **options)
    config = json.loads((checkpoint.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "bundled"
    loaded = checkpoint.load()
    names = [name for name, _ in loaded.model.named_parameters() if "lora_" in name]
    assert len(names) == 30 * 4 * 2 and checkpoint.adam_state(names).step == checkpoint.step
    merged = fastsel.load_model(checkpoint.folder)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert torch.allclose(merged.model(input_ids=ids).logits, loaded.model(input_ids=ids).logits, atol=1e-2)
