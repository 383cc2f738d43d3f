"""What the proofs of Triton kernels share: the interpreter in a process of its own, and checked addresses in it.

TRITON_INTERPRET is read when Triton is imported, so the checks of values (functions named check_*) run in a pytest
process of their own, in which every address that a kernel touches must lie in one of the tensors of its launch.
Outside that process the same checks are tests marked gpu: of the compiled kernels, on a device.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastsel.kernels._runtime.devices import triton_architecture
from fastsel.kernels._runtime.testing import TRITON_DEVICE
from fastsel.kernels._runtime.triton_launch import INTERPRETED, Launch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Outside the interpreter checks need a GPU, and faults that would touch strange memory there are not planted."""
    if INTERPRETED:
        return
    items[:] = [item for item in items if not item.name.startswith("check_planted_")]
    here = triton_architecture(torch.empty(0, device="cuda")) if torch.cuda.is_available() else None
    for item in items:
        if not item.name.startswith("check_"):
            continue
        item.add_marker(pytest.mark.gpu)
        given = item.callspec.params if hasattr(item, "callspec") else {}
        tiles_of = given.get("architecture") or given.get("key", (None,))[0]
        if here and tiles_of not in (None, here):
            item.add_marker(pytest.mark.skip(reason=f"tiles of {tiles_of}; this device takes those of {here}"))


@pytest.fixture
def spread_storage(tmp_path):
    """allocate(size, dtype): memory of so many elements where the kernels run; on a CPU a file of holes."""

    def allocate(size, dtype):
        if INTERPRETED:
            return torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=dtype)
        return torch.empty(size, dtype=dtype, device=TRITON_DEVICE)

    yield allocate
    if not INTERPRETED:
        torch.cuda.empty_cache()


@pytest.fixture
def run_under_the_interpreter(tmp_path):
    """run(file, expression): the functions check_* of a file that `-m` picks; all must pass."""

    def run(file, expression):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-o",
            "python_functions=check_*",
        ]
        # NumPy stands in for the device and warns where the device would silently make an infinity or NaN.
        command += ["-W", "ignore::RuntimeWarning", "-m", expression, file]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        child = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3000)
        assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
        assert " passed" in child.stdout

    return run


@pytest.fixture
def compiled_afresh(tmp_path, monkeypatch):
    """Nothing comes from an earlier run's cache, and the binaries hold no source paths."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "triton"))
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")


class OutOfBoundsError(Exception):
    """A kernel touched an address outside the tensors of its launch."""


@pytest.fixture(autouse=True)
def every_address_is_checked(monkeypatch):
    """The interpreter reads and writes any address; here each must lie in a tensor of the launch."""
    if not INTERPRETED:
        return
    import triton

    builder = triton.runtime.interpreter.interpreter_builder
    load, store = type(builder).create_masked_load, type(builder).create_masked_store
    spans = []

    def check(pointers, mask):
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        inside = np.zeros(addresses.shape, bool)
        for first, end, size in spans:
            inside |= (addresses >= first) & (addresses + size <= end)
        if not inside.all():
            raise OutOfBoundsError(f"{(~inside).sum()} of {inside.size} addresses")

    def checked_load(pointers, mask, *rest):
        check(pointers, mask)
        return load(builder, pointers, mask, *rest)

    def checked_store(pointers, value, mask, *rest):
        check(pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    plain_run = Launch.run

    def run(launch):
        spans[:] = [
            (t.data_ptr(), t.untyped_storage().data_ptr() + t.untyped_storage().nbytes(), t.element_size())
            for t in launch.arguments.values()
            if isinstance(t, torch.Tensor)
        ]
        plain_run(launch)

    monkeypatch.setattr(builder, "create_masked_load", checked_load, raising=False)
    monkeypatch.setattr(builder, "create_masked_store", checked_store, raising=False)
    monkeypatch.setattr(Launch, "run", run)
