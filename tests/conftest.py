"""What every test relies on: fixed seeds, poisoned fresh memory, one thread policy, no network, honest skips."""

import functools
import os
import random
import shutil
import sys
from importlib.util import find_spec

# Before torch is imported: beside a busy neighbour, OpenMP's spinning threads cost many times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest

HAS_TORCH = find_spec("torch") is not None
if HAS_TORCH:
    import torch


def pytest_collection_modifyitems(items):
    has_gpu = HAS_TORCH and torch.cuda.is_available()
    missing_browser = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))
        if item.get_closest_marker("browser") and missing_browser:
            item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing_browser)} on the PATH"))


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each byte; nothing is merged."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    if HAS_TORCH:
        torch.manual_seed(0)


def _poisoned_tensor(allocate):
    @functools.wraps(allocate)
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("fastsel"):
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).min)

    return poisoned


def _poisoned_array(allocate):
    @functools.wraps(allocate)
    def poisoned(*args, **kwargs):
        array = allocate(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("fastsel") and array.dtype.kind == "f":
            array.fill(np.nan)
        return array

    return poisoned


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory that fastsel allocates without a value holds NaN (floats) or the least integer, never lucky zeros."""
    monkeypatch.setattr(np, "empty", _poisoned_array(np.empty))
    monkeypatch.setattr(np, "empty_like", _poisoned_array(np.empty_like))
    if HAS_TORCH:
        for name in ("empty", "empty_like", "empty_strided"):
            monkeypatch.setattr(torch, name, _poisoned_tensor(getattr(torch, name)))
        monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned_tensor(torch.Tensor.new_empty))
