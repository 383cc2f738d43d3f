"""What `fastsel.metrics` offers: every name resolves, is documented, and needs no torch until it is used."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from fastsel import metrics


def test_every_name_resolves_and_is_documented():
    assert metrics.__all__ == sorted(metrics._HOMES) == dir(metrics)
    for name in metrics.__all__:
        assert callable(getattr(metrics, name))
        assert inspect.getdoc(getattr(metrics, name)), f"{name} has no docstring"


def test_type_checkers_see_the_names_that_resolve():
    source = ast.parse(Path(metrics.__file__).read_text())
    (block,) = [node for node in source.body if isinstance(node, ast.If)]
    assert {alias.name: node.module for node in block.body for alias in node.names} == metrics._HOMES


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match=r"module 'fastsel\.metrics' has no attribute 'vendy'"):
        metrics.vendy  # noqa: B018


def test_lexical_metrics_need_no_torch():
    code = "import sys, fastsel; print(fastsel.metrics.ttr(['a b a']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.6666666666666666", "False"]
