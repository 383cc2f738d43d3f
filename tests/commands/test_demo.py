"""`fastsel demo`: one command, no network, a finished page."""

import json

import numpy as np
import pytest

import fastsel.commands.run
from fastsel.cli import main
from fastsel.commands.demo import demo


@pytest.fixture
def no_model(monkeypatch, tmp_path):
    """The choice is made at random, so that only the demo itself is tried."""
    monkeypatch.chdir(tmp_path)

    def choose_at_random(config, pool, *, store, progress):
        assert config.method.name == "ifd" and config.values["model"] == "bundled"
        return fastsel.random(pool, budget=config.values["budget"])

    monkeypatch.setattr(fastsel.commands.run, "compute", choose_at_random)
    return tmp_path


def test_it_writes_a_finished_folder_and_says_what_to_open_and_do_next(no_model, capsys):
    assert main(["demo"]) == 0
    captured = capsys.readouterr()
    assert "fastsel_demo/report.html" in captured.out and "next, your own pool: fastsel select ifd" in captured.out
    assert "256 rows" in captured.err
    folder = no_model / "fastsel_demo"
    assert len((folder / "selected.jsonl").read_text().splitlines()) == 25
    assert json.loads((folder / "manifest.json").read_text())["argv"] == ["fastsel", "demo"]


def test_again_it_computes_nothing_and_overwrite_does(no_model, capsys):
    assert not demo("d", progress="none").found_finished
    first = np.load("d/indices.npy")
    again = demo("d", progress="none")
    assert again.found_finished and again.selection.indices.tolist() == first.tolist()
    assert not demo("d", progress="none", overwrite=True).found_finished


@pytest.mark.slow
def test_with_the_real_model_it_keeps_rows_below_one(tmp_path, capsys):
    pytest.importorskip("transformers")
    assert main(["demo", "-o", str(tmp_path / "d"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kept"] == 25 and result["pool"]["rows"] == 256
    assert 0.9 < result["scores"]["cut"] < result["scores"]["first"] <= 1
