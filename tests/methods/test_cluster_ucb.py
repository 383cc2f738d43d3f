"""ClusterUCB: rewards against autograd's cosines, draws against the selector's, and what official changes."""

import numpy as np
import pytest

import fastsel
from fastsel.errors import UsageError
from fastsel.features.gradients import lora_gradients
from fastsel.features.influence import running
from fastsel.io.templates import load_template
from fastsel.kernels.lora_gradient_sketch import SketchSpec
from fastsel.models.checkpoints import open_checkpoints
from fastsel.models.loading import load_model
from fastsel.selectors.bandit import bandit
from fastsel.selectors.rows import Rows
from fastsel.selectors.spherical_kmeans import spherical_kmeans

OPTIONS = {"sketch_size": 128, "clusters": 4, "draw_share": 0.6, "budget": 8}


def by_hand(lora_run, number, *, template="none", target_template="none", **options):
    """Features of the pool at a checkpoint, and whole target gradients."""
    model, tokenizer = lora_run["model"]
    base = load_model((model, tokenizer), device="cpu")
    with running(open_checkpoints(lora_run["checkpoints"])[number], base) as state:
        common = {"forward": state.forward, "max_length": 64, "progress": "none"}
        pool = lora_gradients(
            lora_run["pool"], state.loaded, step="adam", moments=state.moments,
            template=load_template(template, tokenizer), **options, **common,
        )  # fmt: skip
        target = lora_gradients(
            fastsel.open_pool(lora_run["target"]), state.loaded, step="sgd", dense=True,
            template=load_template(target_template, tokenizer), **common,
        )  # fmt: skip
        return pool, np.concatenate([block for _, block in target.dense()]).astype(np.float64)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("subtask_column", [None, "task"])
def test_matches_its_steps(lora_run, subtask_column, official):
    """Clusters of the first checkpoint's sketches; rewards: mean cosine with a subtask's target rows at the last."""
    templates = {"target_template": "less_target"} if official else {}
    seed = 42 if official else 0
    early, _ = by_hand(lora_run, 0, sketch=SketchSpec(128, seed=0), **templates)
    late, target = by_hand(lora_run, -1, dense=True, **templates)
    rows = np.flatnonzero(early.has_gradient)
    labels = np.full(30, -1)
    unit = Rows(early.sketch_matrix(), unit=True)
    labels[rows] = spherical_kmeans(unit, 4, seed=seed, official=official)[0]
    steps = np.concatenate([block for _, block in late.dense()]).astype(np.float64)
    cosines = (steps / np.linalg.norm(steps, axis=1, keepdims=True)) @ (
        target / np.linalg.norm(target, axis=1, keepdims=True)
    ).T
    tasks = np.arange(9) % 3 if subtask_column else np.zeros(9, int)
    rewards = np.full(30, np.nan)
    rewards[rows] = np.max([cosines[:, tasks == t].mean(1) for t in np.unique(tasks)], axis=0)
    expected, gains = bandit(
        labels, lambda asked: rewards[asked], 8, budget=0.6, cold_start=0.05, seed=seed,
        rule="official" if official else "shuffled",
    )  # fmt: skip
    selection = fastsel.cluster_ucb(**lora_run, **OPTIONS, subtask_column=subtask_column, official=official)
    assert selection.clusters.tolist() == labels.tolist()
    np.testing.assert_allclose(selection.scores[selection.indices], gains, atol=1e-5)
    assert selection.indices.tolist() == expected.tolist()
    is_drawn = ~np.isnan(selection.scores)
    np.testing.assert_allclose(selection.scores[is_drawn], rewards[is_drawn], atol=1e-5)
    assert is_drawn.sum() <= 0.65 * 30 and not is_drawn[7]


def test_all_drawn_is_less_at_the_last_checkpoint(lora_run):
    """With nothing saved the ranking is that of all rows, whatever the clusters and the seed."""
    found = [
        fastsel.cluster_ucb(**lora_run, **{**OPTIONS, "draw_share": 1.0, "clusters": k}, seed=k).indices.tolist()
        for k in (1, 5)
    ]
    assert found[0] == found[1]


def test_it_says_how_many_gradients_it_took(lora_run):
    selection = fastsel.cluster_ucb(**lora_run, **OPTIONS)
    drawn = int((~np.isnan(selection.scores)).sum())
    assert f"for {drawn} draws" in " ".join(selection.notes)
    assert fastsel.cluster_ucb(**lora_run, **OPTIONS).indices.tolist() == selection.indices.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": None}, "which target"),
        ({"budget": "1000tok"}, "token"),
        ({"draw_share": 1.5}, "budget must be a share|draw_share must be a share"),
        ({"cold_start": 0.9}, "cold_start=0.9 is more than the whole"),
        ({"clusters": 0}, "clusters must be a whole number"),
    ],
)
def test_refuses(lora_run, options, message):
    with pytest.raises(UsageError, match=message):
        fastsel.cluster_ucb(**{**lora_run, **OPTIONS, **options})


def test_an_interrupted_run_takes_no_gradient_again_and_ends_the_same(lora_run, tmp_path, monkeypatch):
    from fastsel.features.row_gradients import RowGradients

    options = {**lora_run, **OPTIONS, "draw_share": 0.9}
    whole = fastsel.cluster_ucb(**options)
    take, asked = RowGradients._rewards, []

    def stopped(self, rows):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(rows.tolist())
        return take(self, rows)

    monkeypatch.setattr(RowGradients, "_rewards", stopped)
    with pytest.raises(KeyboardInterrupt):
        fastsel.cluster_ucb(**options, store=tmp_path)
    before, asked = asked, []
    monkeypatch.setattr(RowGradients, "_rewards", lambda self, rows: (asked.append(rows.tolist()), take(self, rows))[1])
    again = fastsel.cluster_ucb(**options, store=tmp_path)
    assert asked and not any(batch in before for batch in asked)
    assert again.scores.tobytes() == whole.scores.tobytes()
    assert again.indices.tolist() == whole.indices.tolist()
    asked.clear()
    fastsel.cluster_ucb(**options, store=tmp_path)
    assert asked == []


def test_a_row_whose_reward_is_not_finite_stays_without_one_when_a_run_goes_on(lora_run, tmp_path, monkeypatch):
    from fastsel.features.row_gradients import RowGradients

    take = RowGradients._rewards
    monkeypatch.setattr(
        RowGradients, "_rewards", lambda self, rows: np.where(rows == 11, np.nan, take(self, rows))
    )  # fmt: skip
    options = {**lora_run, **OPTIONS, "draw_share": 1.0, "store": tmp_path}
    first = fastsel.cluster_ucb(**options)
    again = fastsel.cluster_ucb(**options)
    for selection in (first, again):
        assert np.isnan(selection.scores[11]) and "not finite" in selection.reasons[11]
    assert again.scores.tobytes() == first.scores.tobytes()


def test_it_says_when_clusters_draw_more_than_asked(lora_run):
    many = fastsel.cluster_ucb(**lora_run, **{**OPTIONS, "clusters": 29, "draw_share": 0.2})
    assert any("more than draw_share" in note for note in many.notes)
    few = fastsel.cluster_ucb(**lora_run, **OPTIONS)
    assert not any("more than draw_share" in note for note in few.notes)
