"""Each way to install gives working native kernels, and an install without a compiler says why it has none.

A fresh environment for each test; third-party packages are links to those of the environment that runs the tests, so
nothing is downloaded. What isolated builds and fresh downloads need is tried by .ci/run.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

PROBE = """
import pathlib, sys, torch, fastsel
from fastsel.kernels._runtime import native
from fastsel.kernels.linear_token_stats import linear_token_stats
torch.manual_seed(0)
inputs = torch.randn(7, 24), torch.randn(50, 24), torch.arange(7)
by_name = {name: linear_token_stats(*inputs, implementation=name).nll for name in ("native", "reference")}
torch.testing.assert_close(by_name["native"], by_name["reference"], rtol=1e-5, atol=1e-5)
assert fastsel.io.bundled_pool_path().exists() and len(fastsel.io.open_pool(fastsel.io.bundled_pool_path())) == 256
print(pathlib.Path(fastsel.__file__).resolve().parent, native.LIBRARY.resolve().parent, sep="\\n")
"""
PROBE_WITHOUT_LIBRARY = """
import torch
from fastsel.kernels.linear_token_stats import linear_token_stats
inputs = torch.ones(2, 4), torch.eye(4), torch.tensor([0, 1])
print(linear_token_stats(*inputs).nll.tolist())
try:
    linear_token_stats(*inputs, implementation="native")
except NotImplementedError as error:
    print(error)
"""


def run(*command, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=environment.pop("cwd", None),
        env={**os.environ, "PIP_NO_INDEX": "1", "PYTHONSAFEPATH": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path):
    """A copy without build outputs, as a fresh clone is."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("fastsel", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def python(tmp_path):
    """The interpreter of a new environment that holds everything but fastsel."""
    folder = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    own = next(folder.glob("lib/python*/site-packages"))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "fastsel" not in entry.name and entry.suffix != ".pth" and entry.name != "__pycache__":
            (own / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def install(python, *what, **environment):
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-build-isolation", *what, **environment)


def runs_from(python, cwd):
    package, library = run(python, "-c", PROBE, cwd=cwd).split()
    return Path(package), Path(library)


@NEEDS_COMPILER
def test_regular_install(python, checkout, tmp_path):
    install(python, checkout)
    package, library = runs_from(python, tmp_path)
    assert python.parents[1] in package.parents
    assert library == package / "kernels" / "_runtime"
    assert "select" in run(python.parent / "fastsel", "--help", cwd=tmp_path)


@NEEDS_COMPILER
def test_editable_install_sees_new_kernel_folders(python, checkout, tmp_path):
    install(python, "-e", checkout)
    assert runs_from(python, tmp_path) == (checkout / "fastsel", checkout / "kernels" / "_runtime")
    (checkout / "kernels" / "added_later").mkdir()
    (checkout / "kernels" / "added_later" / "__init__.py").write_text("VALUE = 3\n")
    print_value = "from fastsel.kernels.added_later import VALUE; print(VALUE)"
    assert run(python, "-c", print_value, cwd=tmp_path) == "3\n"


@NEEDS_COMPILER
def test_sdist_to_wheel_to_import(python, checkout, tmp_path):
    pytest.importorskip("build")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", tmp_path, checkout)
    (sdist,) = tmp_path.glob("fastsel-*.tar.gz")
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, sdist)
    (wheel,) = tmp_path.glob("fastsel-*.whl")
    # ctypes binds the library: no Python version in the tag, but a platform.
    assert "-py3-none-linux" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"fastsel/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    sources |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastsel").rglob("*.py")}
    data = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastsel" / "data").rglob("*") if path.is_file()}
    assert sources | data <= names
    assert {"fastsel/kernels/_runtime/_native.so", "fastsel/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/", "kernels/")) for name in names)
    install(python, wheel)
    package, _ = runs_from(python, tmp_path)
    assert python.parents[1] in package.parents


def test_without_a_compiler_native_refuses_with_the_reason(python, checkout, tmp_path):
    # What an earlier build left behind must not be shipped in its place.
    stale = checkout / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = stale / "fastsel" / "kernels" / "_runtime" / "_native.so"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"stale")
    install(python, checkout, CC="/bin/false", CXX="/bin/false")
    values, *reason = run(python, "-c", PROBE_WITHOUT_LIBRARY, cwd=tmp_path).splitlines()
    assert [round(float(value), 5) for value in values.strip("[]").split(",")] == [1.38629, 1.38629]  # log 4
    assert "native: the compiled library is missing" in " ".join(reason)
    assert "install g++ and reinstall" in " ".join(reason)
