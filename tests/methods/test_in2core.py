"""In2Core-style selection: influences from a run's gradients against autograd's in float64, and from the user's own."""

import json

import numpy as np
import pytest
import torch

import fastsel
from fastsel.cli import main
from fastsel.errors import InputError, UsageError
from fastsel.features.influence import running
from fastsel.features.training_rows import TrainingTokenizer
from fastsel.io.templates import load_template
from fastsel.models.checkpoints import open_checkpoints
from fastsel.models.loading import load_model
from fastsel.selectors.data_influence import influences


def autograd(lora_run, rows_of):
    """({row: gradient [p] float64}, {matrix: its columns}) through peft's layers, one row at a time."""
    model, tokenizer = lora_run["model"]
    base = load_model((model, tokenizer), device="cpu")
    tokenise = TrainingTokenizer(tokenizer, load_template("none"), max_length=64)
    found = []
    with running(open_checkpoints(lora_run["checkpoints"])[-1], base) as state:
        double = state.loaded.model.double()
        named = {name: p for name, p in double.named_parameters() if "lora_" in name}
        for p in named.values():
            p.requires_grad_(True)
        for pool in rows_of:
            gradients = {}
            for row in tokenise(pool.examples(range(len(pool)))):
                if not row.sequences:
                    continue
                ((ids, labelled),) = row.sequences
                log_p = double(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                loss = -sum(log_p[at - 1, ids[at]] for at in labelled) / len(labelled)
                parts = torch.autograd.grad(loss, list(named.values()))
                gradients[row.row_id] = torch.cat([part.reshape(-1) for part in parts]).numpy()
            found.append(gradients)
        double.float()
    ends = np.cumsum([p.numel() for p in named.values()])
    columns = {name: (int(end) - p.numel(), int(end)) for (name, p), end in zip(named.items(), ends, strict=True)}
    return found, columns


@pytest.mark.parametrize("layers", [None, ["layers.1"], ["v_proj"]])
def test_matches_autograd_and_the_closed_form(lora_run, layers):
    lists = [lora_run["pool"], fastsel.open_pool(lora_run["target"])]
    (train, target), columns = autograd(lora_run, lists)
    names = [name for name in columns if layers is None or any(part in name for part in layers)]
    rows = np.array(sorted(train))
    expected = -influences(
        np.stack([train[row] for row in rows]), np.stack(list(target.values())), columns=columns, layers=names
    )
    selection = fastsel.in2core(**lora_run, layers=layers, budget=15)
    assert 7 not in rows and np.isnan(selection.scores[7])
    np.testing.assert_allclose(selection.scores[rows], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert selection.indices.tolist() == rows[np.argsort(-expected, kind="stable")][:15].tolist()


def test_worked_example():
    """The arithmetic is in tests/selectors/test_data_influence.py: rows (2, 0), (0, 2), (1, 1), target (1, 0)."""
    rows = [{"instruction": word, "output": word} for word in ("red", "blue", "green")]
    selection = fastsel.in2core(
        rows, gradients=[[2.0, 0], [0, 2], [1, 1]], target_gradients=[[1.0, 0]], damping=0.5, budget=2, leaks="none"
    )
    h = 6 / 5 * np.array([1 - (24 / 29 + 6 / 17) / 3, -6 / 17 / 3])
    assert selection.indices.tolist() == [0, 2]
    assert selection.scores == pytest.approx(np.array([[2.0, 0], [0, 2], [1, 1]]) @ h)


def test_batches_change_little_and_runs_repeat(lora_run):
    first = fastsel.in2core(**lora_run, budget=10)
    assert fastsel.in2core(**lora_run, budget=10).scores.tobytes() == first.scores.tobytes()
    other = fastsel.in2core(**lora_run, budget=10, batch_tokens=40)
    np.testing.assert_allclose(other.scores, first.scores, rtol=1e-3, atol=1e-3 * np.nanmax(np.abs(first.scores)))


def test_the_command_line(tmp_path):
    generator = np.random.default_rng(0)
    x, target = generator.standard_normal((12, 6)), generator.standard_normal((3, 6))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "t.npy", target)
    rows = [{"instruction": "a", "output": "b"}] * 12
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    arguments = ["select", "in2core", "--pool", str(tmp_path / "pool.jsonl"), "--gradients", str(tmp_path / "x.npy"),
                 "--target-gradients", str(tmp_path / "t.npy"),
                 "--budget", "50%", "-o", str(tmp_path / "out")]  # fmt: skip
    assert main(arguments) == 0
    expected = np.argsort(influences(x, target), kind="stable")[:6]
    assert np.load(tmp_path / "out" / "indices.npy").tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": None}, UsageError, "which target"),
        ({"budget": "1000tok"}, UsageError, "token"),
        ({"layers": ["layers.9"]}, UsageError, "no LoRA matrix has 'layers.9' in its name"),
        ({"damping": 0.0}, UsageError, "damping must be a number above 0"),
        ({"gradients": np.ones((3, 4)), "target_gradients": np.eye(2, 4)}, InputError, "3 rows, the pool .* has 30"),
    ],
)
def test_refuses(lora_run, options, error, message):
    run = {name: lora_run[name] for name in ("pool", "target", "leaks")} if "gradients" in options else lora_run
    with pytest.raises(error, match=message):
        fastsel.in2core(**{**run, "budget": 5, **options})


def test_it_needs_no_optimizer_state(lora_run, tmp_path):
    import shutil

    copy = shutil.copytree(lora_run["checkpoints"], tmp_path / "run")
    for state in copy.glob("*/optimizer.pt"):
        state.unlink()
    found = fastsel.in2core(**{**lora_run, "checkpoints": copy}, budget=5)
    assert found.scores.tobytes() == fastsel.in2core(**lora_run, budget=5).scores.tobytes()
    with pytest.raises(InputError, match="Adam's moments are needed"):
        fastsel.less(**{**lora_run, "checkpoints": copy}, budget=5)


class Elsewhere:
    """An executor that sends the function through pickle, as another process would get it, and notes the shards."""

    def __init__(self):
        self.shards = []

    def map_shards(self, function, shards):
        import pickle

        self.shards.append(list(shards))
        sent = pickle.loads(pickle.dumps(function))
        return [sent(shard) for shard in shards]


def test_shards_run_elsewhere_and_end_in_the_same_bytes(lora_run, monkeypatch):
    from fastsel.features import batches

    monkeypatch.setattr(batches, "SHARD_TOKENS", 60)
    here, elsewhere = fastsel.in2core(**lora_run, budget=10), Elsewhere()
    there = fastsel.in2core(**lora_run, budget=10, executor=elsewhere)
    assert there.scores.tobytes() == here.scores.tobytes()
    assert [len(shards) for shards in elsewhere.shards] == [len(elsewhere.shards[0])] * 3
    assert len(elsewhere.shards[0]) > 3, "the pool is one shard, so that nothing was shown"


@pytest.mark.parametrize("stop_at", [("products", 2), ("sum", 1), ("influences", 2)])
def test_an_interrupted_run_goes_on(lora_run, tmp_path, monkeypatch, stop_at):
    from fastsel.features import batches, sharded_influence

    monkeypatch.setattr(batches, "SHARD_TOKENS", 60)
    whole = fastsel.in2core(**lora_run, budget=10)
    names = {"products": "_Products", "sum": "_Sum", "influences": "_Values"}
    kinds = {name: getattr(sharded_influence, kind) for name, kind in names.items()}
    calls = dict.fromkeys(kinds, 0)
    limit = dict([stop_at])
    for name, kind in kinds.items():

        def counted(self, shard, name=name, run=kind.__call__):
            if calls[name] == limit.get(name):
                raise KeyboardInterrupt
            calls[name] += 1
            return run(self, shard)

        monkeypatch.setattr(kind, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        fastsel.in2core(**lora_run, budget=10, store=tmp_path)
    before = dict(calls)
    limit.clear()
    again = fastsel.in2core(**lora_run, budget=10, store=tmp_path)
    assert again.scores.tobytes() == whole.scores.tobytes()
    shards = calls["influences"]  # each was taken once, before or after
    assert calls["products"] == shards and calls["sum"] == shards + (before["sum"] if stop_at[0] == "sum" else 0)
    fastsel.in2core(**lora_run, budget=10, store=tmp_path)
    assert calls["influences"] == shards


def test_a_row_that_is_not_finite_neither_counts_nor_is_chosen(lora_run, monkeypatch):
    """The same as without the row."""
    from fastsel.models.lora_forward import LoraForward

    run = LoraForward.run
    words = None

    def spoiled(self, examples, consumer, **more):
        losses = run(self, examples, consumer, **more)
        for i, example in enumerate(examples):
            if [list(s.ids) for s in example] == words:
                losses[i] = float("nan")
        return losses

    model, tokenizer = lora_run["model"]
    tokenise = TrainingTokenizer(tokenizer, load_template("none"), max_length=64)
    (row,) = tokenise(lora_run["pool"].examples([4]))
    words = [list(ids) for ids, _ in row.sequences]
    monkeypatch.setattr(LoraForward, "run", spoiled)
    found = fastsel.in2core(**lora_run, budget=1.0)
    assert np.isnan(found.scores[4]) and 4 not in found.indices and "not a finite number" in found.reasons[4]
    assert np.isfinite(np.delete(found.scores, [4, 7])).all()
