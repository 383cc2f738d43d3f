"""What methods on gradients begin with: the model that the checkpoints name, warnings about another, and the record."""

import json
import shutil
from types import SimpleNamespace

import pytest

import fastsel
from fastsel.errors import FastselWarning, InputError
from fastsel.features import gradient_setup, target_setup
from fastsel.features.gradient_setup import base_model
from fastsel.models.checkpoints import open_checkpoints

pytest.importorskip("peft")


@pytest.fixture
def loads(monkeypatch):
    """Names that load_model was asked for; folders called "missing" cannot be loaded."""
    asked = []

    def load_model(model, **_):
        asked.append(model)
        if "missing" in str(model):
            raise InputError(f"model {model}: there is no such folder")
        return SimpleNamespace(name=str(model), origin={"model": str(model)})

    monkeypatch.setattr(gradient_setup, "load_model", load_model)
    return asked


def checkpoint(base):
    return SimpleNamespace(folder="run/checkpoint-8", base=base)


def test_the_checkpoints_say_which_model_they_are_of(loads):
    assert base_model(None, [checkpoint("org/model")]).name == "org/model"
    assert base_model(None, None).name == "bundled"
    assert base_model("other", None).name == "other"
    assert loads == ["org/model", "bundled", "other"]


@pytest.mark.parametrize(
    ("named", "trained_on"),
    [("org/model", "org/model"), ("/data/model", "org/model"), ("bundled", "bundled"), ("any", "LlamaForCausalLM")],
)
def test_names_that_may_be_of_one_model_are_taken(loads, named, trained_on):
    assert base_model(named, [checkpoint(trained_on)]).name == named


@pytest.mark.parametrize(("named", "trained_on"), [("org/chat", "org/model"), ("org/model", "bundled")])
def test_another_model_is_warned_about(loads, named, trained_on):
    with pytest.warns(FastselWarning, match=f"was trained on {trained_on}, and gradients are taken with {named}"):
        base_model(named, [checkpoint(trained_on)])


def test_refuses_with_what_to_name(loads):
    with pytest.raises(InputError, match="(?s)trained on /gone/missing, which cannot be loaded.*says where it is"):
        base_model(None, [checkpoint("/gone/missing")])
    with pytest.raises(InputError, match="does not say what it was trained on: --model"):
        base_model(None, [checkpoint(None)])


def test_the_adapter_has_a_name_of_its_own(lora_run, tmp_path):
    """What a finished run is compared by: the weights, not the folder and not the large file beside them."""
    original = open_checkpoints(lora_run["checkpoints"])[-1].folder
    named = json.loads((original / "adapter_config.json").read_text())["base_model_name_or_path"]
    (before,) = open_checkpoints(original)
    assert before.base == named and named
    copy = shutil.copytree(original, tmp_path / original.name)
    (copy / "optimizer.pt").write_bytes(b"other")
    (moved,) = open_checkpoints(copy)
    assert moved.adapter == before.adapter and moved.fingerprint != before.fingerprint
    weights = bytearray((copy / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "adapter_model.safetensors").write_bytes(weights)
    assert open_checkpoints(copy)[0].adapter != before.adapter


def test_what_cannot_be_used_is_said_before_anything_is_computed(lora_run, monkeypatch):
    monkeypatch.setattr(target_setup, "find_leaks", lambda *_, **__: pytest.fail("leaks were looked for"))
    options = {**lora_run, "leaks": "near", "budget": 4}
    with pytest.raises(InputError, match="there is no such folder"):
        fastsel.less(**{**options, "checkpoints": "nowhere"})
    with pytest.raises(InputError, match="no row has a value in the column part"):
        fastsel.less(**options, subtask_column="part")


def test_the_record_says_what_the_selection_was_made_for(lora_run):
    selection = fastsel.less(**lora_run, subtask_column="task", budget=4)
    record = selection.provenance
    assert [target["subtasks"] for target in record["targets"]] == [{"t0": 3, "t1": 3, "t2": 3}]
    steps = [c.step for c in open_checkpoints(lora_run["checkpoints"])]
    assert [c["step"] for c in record["checkpoints"]] == steps
    weights = [float(c["used"].removeprefix("weight ")) for c in record["checkpoints"]]
    assert sum(weights) == pytest.approx(1, abs=2e-3) and weights[0] > weights[1]
    assert record["leaks"] == {"looked_for": "none", "pool_rows": 0, "equal": 0, "dropped": False, "first": []}
    assert any("checkpoints in" in note and f"{steps[0]} (weight" in note for note in selection.notes)
    json.dumps(record)


@pytest.mark.parametrize(
    ("method", "uses"),
    [("g2is", {-1: "gradients"}), ("in2core", {-1: "influence"}), ("cluster_ucb", {0: "clusters", -1: "rewards"})],
)
def test_other_methods_say_which_checkpoints_they_used(lora_run, method, uses):
    options = {"draw_share": 0.5, "clusters": 3} if method == "cluster_ucb" else {}
    selection = getattr(fastsel, method)(**lora_run, budget=4, **options)
    used = [c["used"] for c in selection.provenance["checkpoints"]]
    expected = [None, None]
    for place, use in uses.items():
        expected[place] = use
    assert used == expected
    assert selection.provenance["model"]["name"].endswith(str(open_checkpoints(lora_run["checkpoints"])[-1].step))


def test_set_up_takes_one_target_where_a_method_does(lora_run):
    with pytest.raises(fastsel.errors.UsageError, match="cluster_ucb chooses for one target"):
        fastsel.cluster_ucb(**{**lora_run, "target": {"a": lora_run["target"], "b": lora_run["target"][:3]}}, budget=4)
