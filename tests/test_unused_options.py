"""Options that do nothing beside another are refused, by the flag and by the keyword."""

import numpy as np
import pytest

import fastsel
from fastsel.commands.config import resolve
from fastsel.errors import UsageError
from fastsel.unused_options import refuse_unused, unused_options

RUN = {"pool": ["p.jsonl"], "target": ["t.jsonl"], "checkpoints": ["run"]}


@pytest.mark.parametrize("method", ["less", "g2is", "cluster_ucb", "in2core"])
@pytest.mark.parametrize(
    ("option", "value"), [("warmup_fraction", "0.1"), ("epochs", "9"), ("lora_r", "64"), ("learning_rate", "1e-3")]
)
def test_warm_up_options_are_refused_with_checkpoints(method, option, value):
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} .* does nothing with --checkpoints"):
        resolve("select", method, {**RUN, option: value})
    assert resolve("select", method, {"pool": ["p.jsonl"], option: value}).values[option] is not None


def test_a_default_that_was_named_is_refused_too():
    with pytest.raises(UsageError, match="--epochs"):
        resolve("select", "less", {**RUN, "epochs": 4})
    with pytest.raises(UsageError, match="--epochs"):
        resolve("select", "less", RUN, ["epochs=4"])


def test_the_configuration_lists_only_what_counts_and_reads_back(tmp_path):
    config = resolve("select", "less", RUN)
    assert not {"epochs", "lora_r", "learning_rate", "warmup_fraction", "sketch_size"} & set(config.values)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert resolve("select", None, {}, None, str(path)).values == config.values
    path.write_text(config.to_yaml() + "epochs: 4\n")  # the default, as other printed configurations have it
    assert resolve("select", None, {}, None, str(path)).values == config.values
    path.write_text(config.to_yaml() + "epochs: 5\n")
    with pytest.raises(UsageError, match="--epochs"):
        resolve("select", None, {}, None, str(path))


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("g2is", {"gradients": "x.npy", "model": "m"}, "--model .* does nothing with --gradients"),
        ("in2core", {"gradients": "x.npy", "layers": ["layers.1"]}, "--layers .* does nothing with --gradients"),
        ("in2core", {"gradients": "x.npy", "workers": 2}, "--workers .* does nothing with --gradients"),
        ("less", {"sketch_size": 512}, "--sketch-size .* --mode sketch does"),
        ("rds", {"leaks": "none", "drop_leaks": True}, "--drop-leaks .* does nothing with --leaks none"),
    ],
)
def test_other_pairs(method, values, message):
    with pytest.raises(UsageError, match=message):
        resolve("select", method, values)


def test_what_counts_is_left_alone():
    assert resolve("select", "less", {"mode": "sketch", "sketch_size": "512"}).values["sketch_size"] == 512
    assert not unused_options(
        {"checkpoints": None, "epochs": 3, "leaks": "none", "drop_leaks": False, "mode": "sketch"}
    )
    assert unused_options({"checkpoints": ["run"], "epochs": 3, "seed": 0}).keys() == {"epochs"}


def test_python_refuses_what_differs_from_the_default(tmp_path):
    with pytest.raises(UsageError, match=r"\(lora_r=\) does nothing with --checkpoints"):
        fastsel.less(tmp_path / "none", target="none", checkpoints=tmp_path, lora_r=8)
    with pytest.raises(UsageError, match=r"\(lora_r=\)"):
        fastsel.in2core(tmp_path / "none", target="none", checkpoints=tmp_path, lora_r=128)
    with pytest.raises(UsageError, match=r"\(model=\) does nothing with --gradients"):
        fastsel.g2is(tmp_path / "none", gradients=np.eye(2), target_gradients=np.eye(2), model="bundled")

    def method(pool, *, checkpoints=None, epochs=4): ...

    refuse_unused(method, {"pool": 1, "checkpoints": "run", "epochs": 4, "lora_r": 9})
