"""The compiled library as a whole: what it exports, on which processors it is right, how it behaves among threads."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsel.kernels._runtime import native
from fastsel.kernels._runtime.dispatch import NoImplementationError
from fastsel.kernels.linear_token_stats import linear_token_stats
from fastsel.kernels.linear_token_stats.cases import CASES, make_inputs

KERNELS = Path(native.__file__).parents[1]  # where the sources lie: in the checkout and in an installed copy
SOURCES = sorted(KERNELS.glob("*/cpu_native.cpp"))
OPERATIONS = [path.parent.name for path in SOURCES]
SETUP = Path(__file__).parents[2] / "setup.py"
NEEDS_LIBRARY = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
NEEDS_TOOLS = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("nm")), reason="needs g++ and nm from binutils"
)


def usable_instruction_sets():
    needed, usable = set(), []
    for name, flags in native.INSTRUCTION_SETS.items():
        needed |= flags
        if needed <= native._cpu_flags():
            usable.append(name)
    return usable


def setup_constants():
    """COMMON_FLAGS and X86_INSTRUCTION_SETS as setup.py spells them."""
    tree = ast.parse(SETUP.read_text())
    return {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in tree.body
        if isinstance(statement, ast.Assign) and statement.targets[0].id in ("COMMON_FLAGS", "X86_INSTRUCTION_SETS")
    }


def run_python(code, *arguments, timeout=120, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@NEEDS_LIBRARY
def test_a_library_of_other_sources_is_refused(monkeypatch, caplog):
    """A checkout that moved on past its library: calling it would hand over the wrong arguments."""
    monkeypatch.setattr(native, "_sources_hash", lambda: "0" * 64)
    native._library.cache_clear()
    try:
        assert "of other C++ than lies here; run `python setup.py build_ext" in native.unavailable()
        assert "slower code runs until then" in caplog.text
    finally:
        monkeypatch.undo()
        native._library.cache_clear()
    assert native.unavailable() is None


def test_the_loader_and_the_build_name_the_same_instruction_sets():
    assert list(setup_constants()["X86_INSTRUCTION_SETS"]) == list(native.INSTRUCTION_SETS)


@NEEDS_LIBRARY
@NEEDS_TOOLS
def test_every_function_is_exported_once_for_each_instruction_set_and_nothing_else():
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", str(native.LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    exported = {line.split()[-1] for line in listing.splitlines()} - {"_init", "_fini"}
    names = [name for path in SOURCES for name in re.findall(r"FASTSEL_EXPORT\((\w+)\)", path.read_text())]
    assert all(any(f"{name}_".startswith(f"{operation}_") for name in names) for operation in OPERATIONS)
    functions = {f"{name}_{isa}" for name in names for isa in setup_constants()["X86_INSTRUCTION_SETS"]}
    assert exported == functions | {"fastsel_sources"}


@NEEDS_TOOLS
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_symbol_is_weak(operation, tmp_path):
    """The linker keeps one of several weak copies: it could be the AVX-512 one, and plain processors would run it."""
    constants, objects = setup_constants(), tmp_path / "kernel.o"
    subprocess.run(
        ["g++", *constants["COMMON_FLAGS"], *constants["X86_INSTRUCTION_SETS"]["avx512"], "-DFASTSEL_ISA=avx512"]
        + [f"-I{KERNELS / '_runtime' / 'native'}", "-c", str(KERNELS / operation / "cpu_native.cpp")]
        + ["-o", str(objects)],
        check=True,
    )
    listing = subprocess.run(["nm", "-C", str(objects)], capture_output=True, text=True, check=True).stdout
    symbols = re.findall(r"^([0-9a-f]{16}) (\w) (.*)$", listing, flags=re.MULTILINE)
    assert any(kind == "T" and re.match(rf"{operation}_(\w+_)?avx512$", name) for _, kind, name in symbols)
    assert [symbol for symbol in symbols if symbol[1] in "VWuvw"] == []


COMPARE = """
import importlib, sys, torch
from fastsel.kernels._runtime import native
from fastsel.kernels._runtime.dispatch import run
assert native.instruction_set() == sys.argv[1]
for operation in sys.argv[2:]:
    implementations = importlib.import_module(f"fastsel.kernels.{operation}.api").IMPLEMENTATIONS
    cases = importlib.import_module(f"fastsel.kernels.{operation}.cases")
    for case in cases.CASES.values():
        for dtype in () if case.slow else (torch.float32, torch.bfloat16, torch.float16):
            inputs = cases.make_inputs(case, dtype, "cpu")
            refused = importlib.import_module(implementations["native"]).unsupported(*inputs)
            if refused and dtype != torch.float32:
                continue
            # Some operations add to an input.
            copies = [[x.clone() if isinstance(x, torch.Tensor) else x for x in inputs] for _ in range(2)]
            got, expected = run(implementations, "native", *copies[0]), run(implementations, "reference", *copies[1])
            if isinstance(got, dict):
                got, expected = list(got.values()), list(expected.values())
            if isinstance(got, torch.Tensor):
                got, expected = [got], [expected]
            for a, b in zip(got, expected):
                if b is None:
                    continue
                tolerance = 3e-5 if b.dtype in (torch.float32, torch.float64) else 2e-2
                largest = b.double().nan_to_num(0, 0, 0).abs().amax().item() if b.numel() else 0.0
                torch.testing.assert_close(
                    a, b, rtol=tolerance, atol=tolerance * max(1.0, 0.1 * largest), msg=lambda m: f"{case.name} {m}"
                )
            print("right")
"""


@NEEDS_LIBRARY
@pytest.mark.parametrize("isa", usable_instruction_sets())
def test_every_instruction_set_of_this_processor_gives_right_values(isa):
    assert len(run_python(COMPARE, isa, *OPERATIONS, FASTSEL_ISA=isa)) > 5 * len(OPERATIONS)


@NEEDS_LIBRARY
def test_refuses_an_instruction_set_that_cannot_run_here(monkeypatch):
    native.instruction_set.cache_clear()
    try:
        monkeypatch.setenv("FASTSEL_ISA", "avx1024")
        with pytest.raises(ValueError, match="FASTSEL_ISA=avx1024 cannot run here; this processor has: plain"):
            native.instruction_set()
    finally:
        native.instruction_set.cache_clear()


PREPARE = """
import os, sys, torch
from fastsel.kernels.linear_token_stats import linear_token_stats
from fastsel.kernels.linear_token_stats.cases import CASES, make_inputs
inputs = make_inputs(CASES["odd"], torch.float32, "cpu")
def compute():
    return linear_token_stats(*inputs, implementation="native").nll
"""
FORK = (
    PREPARE
    + """
torch.set_num_threads(2)
expected = compute()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(compute(), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
)


@NEEDS_LIBRARY
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_and_does_not_hang():
    """It inherits OpenMP's record of a pool of threads, but not the threads."""
    assert run_python(FORK, timeout=60) == ["0"]


THREADS = (
    PREPARE
    + """
def started_by(function):
    before = len(os.listdir("/proc/self/task"))
    function()
    return len(os.listdir("/proc/self/task")) - before
for threads in (1, 3, 2):
    torch.set_num_threads(threads)
    print(started_by(compute))
print(started_by(lambda: torch.randn(2_000_000).exp()))
print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
"""
)


@NEEDS_LIBRARY
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_threads_are_torchs_own():
    """As many as torch.get_num_threads() says, and torch's operations then use the same ones: one OpenMP library."""
    with_one, with_three, with_two, in_torch, libraries = map(int, run_python(THREADS, OMP_NUM_THREADS="1"))
    assert (with_one, with_three, libraries) == (0, 2, 1)
    assert with_two <= 0 and in_torch <= 0


@pytest.fixture
def without_library(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
    native._library.cache_clear()
    yield tmp_path / "_native.so"
    native._library.cache_clear()


def test_refuses_without_the_library(without_library):
    """By name with the reason; "auto" goes on with the next implementation."""
    inputs = make_inputs(CASES["tiny"], torch.float32, "cpu")
    with pytest.raises(NoImplementationError, match=r"native: the compiled library is missing .* install g\+\+"):
        linear_token_stats(*inputs, implementation="native")
    torch.testing.assert_close(linear_token_stats(*inputs), linear_token_stats(*inputs, implementation="torch"))


def test_refuses_a_library_that_does_not_load(without_library):
    without_library.write_bytes(b"no library")
    assert re.match("the compiled library does not load: .*_native.so", native.unavailable())
