"""G2IS: from a run's gradients, from the user's own, and against a transcription of its steps."""

import json

import numpy as np
import pytest
import torch

import fastsel
from fastsel.cli import main
from fastsel.errors import FastselWarning, InputError, UsageError
from fastsel.features.gradients import lora_gradients
from fastsel.features.influence import running
from fastsel.io.templates import load_template
from fastsel.kernels.lora_gradient_sketch import SketchSpec
from fastsel.models.checkpoints import open_checkpoints
from fastsel.models.loading import load_model
from fastsel.selectors import graph_walk

N = 30


def vectors(seed=0, n=N, d=16, m=6):
    generator = np.random.default_rng(seed)
    shared = generator.standard_normal(d)
    return (
        (generator.standard_normal((n, d)) + shared).astype(np.float32),
        (generator.standard_normal((m, d)) * np.linspace(3, 1, d) + shared).astype(np.float32),
    )


def test_worked_example():
    """Three rows at 0, 40 and 90 degrees, target rows at (1, 0.1) and (3, 0.1): their component is the first axis.

    Row 0 lies on it; row 1 is 40 degrees from row 0, row 2 is 90 (no conflict, but row 1 is nearer). With row 2 the sum
    of all three would lie at 42.9 degrees, where cos 42.9 = 0.732 < 0.8 cos 20 = 0.752: row 2 starts a walk of its own,
    at right angles to the component.
    """
    angles = np.deg2rad([0, 40, 90])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    rows = [{"instruction": word, "output": word} for word in ("red", "blue", "green")]
    selection = fastsel.g2is(
        rows, gradients=x, target_gradients=[[1.0, 0.1], [3.0, 0.1]], budget=3, target=None, leaks="none"
    )
    assert selection.indices.tolist() == [0, 1, 2]
    assert selection.gains == pytest.approx([1, np.cos(np.deg2rad(40)), 0], abs=1e-12)
    official = fastsel.g2is(rows, gradients=x, target_gradients=[[1.0, 0.1], [3.0, 0.1]], budget=3, official=True)
    assert official.indices.tolist() == [0, 1] and "1 row fewer than asked for" in official.notes[-1]


@pytest.mark.parametrize("official", [False, True])
def test_matches_its_steps(lora_run, official):
    """Sketches of Adam's steps at the last checkpoint, plain ones of the target, the walk."""
    model, tokenizer = lora_run["model"]
    base = load_model((model, tokenizer), device="cpu")
    with running(open_checkpoints(lora_run["checkpoints"])[-1], base) as state:
        options = {
            "forward": state.forward, "sketch": SketchSpec(128, seed=0), "max_length": 64, "progress": "none",
            "template": load_template("none", tokenizer),
        }  # fmt: skip
        of_pool = lora_gradients(lora_run["pool"], state.loaded, step="adam", moments=state.moments, **options)
        if official:
            options["template"] = load_template("less_target", tokenizer)
        of_target = lora_gradients(fastsel.open_pool(lora_run["target"]), state.loaded, step="sgd", **options)
    rows = np.flatnonzero(of_pool.has_gradient)
    expected, gains = graph_walk(
        of_pool.sketch_matrix(), 10, of_target.sketch_matrix(), rule="official" if official else "restart"
    )
    selection = fastsel.g2is(**lora_run, sketch_size=128, budget=10, official=official)
    assert selection.indices.tolist() == rows[expected].tolist()
    np.testing.assert_allclose(selection.gains[selection.indices], gains, rtol=1e-6)
    assert 7 not in rows and np.isnan(selection.scores[7])
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("kind", ["npy", "pt", "array"])
def test_the_users_own_gradients(tmp_path, lora_run, kind):
    """As LESS's all_orig.pt has them, row for row; a row that cannot be used is not chosen."""
    x, target = vectors()
    given = {"gradients": x, "target_gradients": target}
    if kind != "array":
        for name, values in given.items():
            given[name] = str(tmp_path / f"{name}.{kind}")
            np.save(given[name], values) if kind == "npy" else torch.save(torch.from_numpy(values), given[name])
    selection = fastsel.g2is(lora_run["pool"], **given, budget=29)
    usable = np.delete(np.arange(N), 7)
    expected, gains = graph_walk(x[usable], 29, target)
    assert selection.indices.tolist() == usable[expected].tolist()
    assert selection.gains[selection.indices].tolist() == gains.tolist()


def test_given_rows_of_zeros_or_nan_are_left_out(lora_run):
    x, target = vectors()
    x[3], x[5, 2], target[1] = 0, np.nan, 0
    selection = fastsel.g2is(lora_run["pool"], gradients=x, target_gradients=target, budget=1.0)
    assert sorted(selection.indices.tolist()) == sorted(set(range(N)) - {3, 5, 7})
    assert "all zeros" in selection.reasons[3] and "NaN" in selection.reasons[5]
    assert "1 rows do not count (row 1" in selection.notes[0]


def test_quotas_and_leaks(lora_run):
    x, target = vectors()
    selection = fastsel.g2is(lora_run["pool"], gradients=x, target_gradients=target, budget=10, per="source")
    assert np.bincount(selection.indices % 2).tolist() == [5, 5]
    rows = [{"instruction": f"name number {i} of the rivers", "output": "b"} for i in range(6)]
    with pytest.warns(FastselWarning, match="leaks: 1 pool rows hold 1 of 1 target rows"):
        selection = fastsel.g2is(
            rows, target=rows[2:3], gradients=x[:6], target_gradients=target, budget=6, leaks="equal", drop_leaks=True
        )
    assert sorted(selection.indices.tolist()) == [0, 1, 3, 4, 5]


def test_a_store_goes_on_and_the_command_line_agrees(tmp_path, lora_run):
    x, target = vectors()
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "t.npy", target)
    rows = [{"instruction": "a", "output": "b"}] * N
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    arguments = ["select", "g2is", "--pool", str(tmp_path / "pool.jsonl"), "--gradients", str(tmp_path / "x.npy"),
                 "--target-gradients", str(tmp_path / "t.npy"),
                 "--budget", "8", "-o", str(tmp_path / "out")]  # fmt: skip
    assert main(arguments) == 0
    expected = fastsel.g2is(rows, gradients=x, target_gradients=target, budget=8)
    assert np.load(tmp_path / "out" / "indices.npy").tolist() == expected.indices.tolist()
    first = fastsel.g2is(**lora_run, sketch_size=64, budget=5, store=tmp_path / "store")
    again = fastsel.g2is(**lora_run, sketch_size=64, budget=5, store=tmp_path / "store")
    assert first.indices.tolist() == again.indices.tolist()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": None}, UsageError, "which target"),
        ({"budget": "1000tok"}, UsageError, "token"),
        ({"gradients": np.ones((3, 4))}, UsageError, "gradients= and target_gradients= go together"),
        ({"gradients": np.ones((3, 4)), "target_gradients": np.eye(2, 4)}, InputError, "3 rows, the pool .* has 30"),
        ({"gradients": np.ones((30, 4)), "target_gradients": np.eye(2, 5)}, InputError, "4 columns, .* has 5"),
        ({"gradients": np.ones(30), "target_gradients": np.eye(2, 5)}, InputError, "must be a matrix"),
        ({"gradients": "nothing.pt", "target_gradients": np.eye(2, 5)}, InputError, "nothing.pt cannot be read"),
        ({"variance": 2.0}, UsageError, "variance must be a share"),
    ],
)
def test_refuses(lora_run, options, error, message):
    run = {**lora_run, "sketch_size": 64}
    if "gradients" in options:
        run = {name: lora_run[name] for name in ("pool", "target", "leaks")}
    with pytest.raises(error, match=message):
        fastsel.g2is(**{**run, "budget": 5, **options})
