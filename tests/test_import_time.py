"""Importing and asking for help is quick, and needs nothing that a scoring machine needs."""

import json
import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "datasets", "pandas", "peft", "gguf", "triton", "pyarrow", "tqdm", "jinja2"}
LIMIT_CPU_SECONDS = 1.0


def run(code):
    """CPU seconds of a fresh interpreter that runs the code; a busy neighbour does not change them much."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == 0, done.stderr
    return after.children_user + after.children_system - before.children_user - before.children_system, done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import fastsel; dir(fastsel)",
        "from fastsel.cli import main; main(['--help'])",
        "from fastsel.cli import main; main(['select', 'ifd', '--help'])",
        "from fastsel.cli import main; main(['methods'])",
    ],
)
def test_within_a_second_and_without_the_heavy_packages(code):
    report = "; import sys; print('LOADED', *sorted(name for name in sys.modules if '.' not in name))"
    seconds, out = min(run(code + report) for _ in range(3))
    loaded = set(out.rpartition("LOADED")[2].split())
    assert not loaded & HEAVY
    assert seconds <= LIMIT_CPU_SECONDS


def test_the_program_without_torch_explains_what_is_missing(tmp_path):
    """A machine with the core packages only: torch and what needs it are hidden from the import system."""
    (tmp_path / "pool.jsonl").write_text('{"instruction": "a", "input": "", "output": "b", "s": 1.0}\n' * 10)
    hide = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Hide(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        hidden = name.split('.')[0] in ('torch', 'transformers', 'triton')\n"
        "        return None if hidden else PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = Hide\n"
        "from fastsel.cli import main\n"
    )
    words = ["select", "scores", "--pool", "pool.jsonl", "--score-column", "s", "-o", "ready"]
    for arguments, code, message in [
        (words, 0, "kept 1 of 10 rows"),
        (["select", "ifd", "--pool", "pool.jsonl", "-o", "out"], 2, "pip install 'fastsel[models]'"),
        (["doctor"], 0, "missing torch"),
        (["doctor", "--check"], 2, "pip install 'fastsel[models]'"),
        (["demo"], 2, "pip install 'fastsel[models]'"),
    ]:
        done = subprocess.run(
            [sys.executable, "-c", hide + f"sys.exit(main({arguments!r}))"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert message in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_the_program_lets_waiting_threads_sleep_unless_told_otherwise():
    pytest.importorskip("torch")
    words = [sys.executable, "-m", "fastsel", "doctor", "--json"]
    for given, expected in ((None, "PASSIVE"), ("active", "active")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
        found = json.loads(done.stdout)
        assert found["system"]["threads"].endswith(f"OMP_WAIT_POLICY={expected}")
        assert bool(found["hints"]) == (given == "active")
