"""What `import fastsel` offers, and what it must not cost."""

import ast
import importlib
import inspect
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import fastsel

ROOT = Path(__file__).parents[1]
METHODS = sorted(path.stem for path in (ROOT / "fastsel" / "methods").glob("*.py") if path.stem != "__init__")
HEAVY = ("torch", "transformers", "triton", "datasets", "pandas", "peft", "gguf")


def test_every_public_name_resolves_and_is_documented():
    assert fastsel.__all__ == sorted(fastsel.__all__)
    assert dir(fastsel) == sorted([*fastsel.__all__, "__version__"])
    for name in fastsel.__all__:
        assert inspect.getdoc(getattr(fastsel, name)), f"fastsel.{name} has no docstring"


def test_type_checkers_see_the_names_that_resolve():
    source = ast.parse(Path(fastsel.__file__).read_text())
    (block,) = [node for node in source.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    homes = {name: seen.pop(name) for name in fastsel._HOMES}
    assert homes == fastsel._HOMES
    assert seen == dict.fromkeys(fastsel._MODULES, "fastsel")


def test_methods_are_the_ones_that_the_readme_and_the_catalogue_list():
    table = re.search(r"^## Methods$(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S).group(1)
    assert sorted(re.findall(r"^\| `(\w+)`", table, re.M)) == METHODS
    assert sorted(importlib.import_module("fastsel.commands.catalogue").METHODS) == METHODS
    for method in METHODS:
        assert getattr(fastsel, method) is getattr(importlib.import_module(f"fastsel.methods.{method}"), method)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'fastsel' has no attribute 'lesss'"):
        fastsel.lesss  # noqa: B018


@pytest.mark.parametrize("operation", sorted(path.parent.name for path in (ROOT / "kernels").glob("*/api.py")))
def test_operations_resolve_from_the_package_alone(operation, monkeypatch):
    """fastsel.kernels.<op>.<op>(...) after `import fastsel`: other tests have imported the operation, so forget it."""
    monkeypatch.delattr(fastsel.kernels, operation, raising=False)
    assert callable(getattr(getattr(fastsel.kernels, operation), operation))
    with pytest.raises(AttributeError, match="module 'fastsel.kernels' has no attribute 'lesss'"):
        fastsel.kernels.lesss  # noqa: B018


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import fastsel"],
        ["-m", "fastsel", "--help"],
        ["-m", "fastsel", "select", "ifd", "--help"],
        ["-m", "fastsel", "metrics", "--help"],
    ],
)
def test_importing_and_helping_take_under_a_second_and_no_heavy_package(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # -X importtime lists on stderr every module that is imported.
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, cwd=ROOT / "tests", check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "fastsel" in imported
    assert not imported & set(HEAVY)
    # CPU seconds: wall time on a busy machine says nothing. benchmarks/history.csv has the wall time.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
