"""mypy --strict, on both folders joined as in the wheel: in the checkout it is blind to fastsel.kernels."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_joined_tree_has_no_type_error(tmp_path):
    sources = shutil.ignore_patterns("__pycache__", "*.so", "data")
    shutil.copytree(ROOT / "fastsel", tmp_path / "fastsel", ignore=sources)
    shutil.copytree(ROOT / "kernels", tmp_path / "fastsel" / "kernels", ignore=sources)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "-p", "fastsel", "--config-file", str(ROOT / "pyproject.toml"),
         "--cache-dir", str(ROOT / ".mypy_cache" / "joined")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no issues found" in done.stdout
