"""The command line as a newcomer meets it: exit codes, one-line messages, results on stdout and messages on stderr."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml

import fastsel
from fastsel import __version__
from fastsel.cli import main
from fastsel.commands.catalogue import METHODS

SCORED = ["--score-column", "s.ifd"]


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """40 rows; row i has the score (7 i mod 40) / 32, so that rows above 32 are above 1."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"instruction": f"Say {i}.", "input": "", "output": "x" * (i + 1), "source": "abcd"[i % 4],
         "s": {"ifd": i * 7 % 40 / 32}}
        for i in range(40)
    ]  # fmt: skip
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(capsys, *words):
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def select(capsys, *words, method="scores", out="out"):
    return run(capsys, "select", method, "--pool", "pool.jsonl", *SCORED, "-o", out, *words)


def program(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "fastsel", *words], capture_output=True, text=True, check=False, **options
    )


def test_help_names_the_commands_and_the_first_thing_to_do(capsys):
    code, out, err = run(capsys, "--help")
    assert code == 0 and err == ""
    for word in ("select", "score", "methods", "doctor", "demo", "fastsel demo", "Exit codes"):
        assert word in out
    assert max(map(len, out.splitlines())) <= 120


def test_nothing_at_all_is_bad_usage_and_shows_the_help(capsys):
    code, out, err = run(capsys)
    assert code == 2 and out == "" and "fastsel COMMAND --help" in err


@pytest.mark.parametrize("command", ["select", "score", "metrics", "methods", "doctor", "demo"])
def test_each_command_has_help(command, capsys):
    code, out, err = run(capsys, command, "--help")
    assert code == 0 and err == "" and out.startswith(f"usage: fastsel {command}")


def test_help_of_a_method_shows_its_defaults_and_only_its_flags(capsys):
    _, ifd, _ = run(capsys, "select", "ifd", "--help")
    _, random, _ = run(capsys, "select", "random", "--help")
    assert re.search(r"--template TEMPLATE .*\(default:\s+alpaca\)", ifd, re.DOTALL)
    assert "--template" not in random and "--seed" in random


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"fastsel {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slect"], "did you mean `fastsel select`?"),
        (["ifd"], "did you mean `fastsel select ifd`?"),
        (["select"], "which method? fastsel select METHOD --pool ...; METHOD is one of: ifd"),
        (["select", "idf", "--pool", "pool.jsonl", "-o", "o"], "there is no method 'idf'; did you mean ifd?"),
        (["select", "ifd", "--bugdet", "3"], "'--bugdet' is not understood; did you mean --budget?"),
        (["select", "ifd", "--budget"], "argument --budget: expected one argument"),
        (["select", "random", "pool.jsonl", "-o", "o"], "'pool.jsonl' is not understood"),
        (["select", "random", "-o", "o"], "which pool? --pool PATH names"),
        (["select", "random", "--pool", "pool.jsonl"], "where to write? -o DIR"),
        (["select", "scores", "--pool", "pool.jsonl", "-o", "o"], "name it with --score-column"),
        (["select", "random", "--pool", "missing.jsonl", "-o", "o"], "missing.jsonl"),
        (["select", "random", "--pool", "pool.jsonl", "-o", "pool.jsonl"], "pool.jsonl is a file; -o wants a folder"),
        (["select", "random", "--pool", "pool.jsonl", "-o", "o", "--budget", "0"], "asks for nothing"),
        (["select", "random", "--pool", "pool.jsonl", "-o", "o", "--template", "none"], "does not apply to random"),
        (["select", "--from", "nowhere", "-o", "o"], "--from nowhere: no finished run is there"),
        (["select", "random", "--config", "nowhere.yaml"], "--config nowhere.yaml: No such file"),
        (["metrics"], "which subset? fastsel metrics SUBSET --reference POOL"),
        (["metrics", "pool.jsonl", "--metrics", "vendy"], "there is no metric 'vendy'; the metrics are: ttr, vocd_d"),
        (["metrics", "pool.jsonl", "--metrics", "partition_entropy"], "name one with --reference POOL"),
        (["metrics", "missing.jsonl", "--metrics", "ttr"], "missing.jsonl"),
        (["doctor", "--kernel", "matmul"], "there is no kernel 'matmul'; the kernels are:"),
    ],
)
def test_bad_usage_is_one_message_and_exit_code_2(words, message, pool, capsys):
    code, out, err = run(capsys, *words)
    assert code == 2
    assert out == ""
    assert message in err and "Traceback" not in err
    assert sorted(path.name for path in pool.iterdir()) == ["pool.jsonl"], "nothing is written before all is well"


def test_words_that_no_file_could_record_are_bad_usage(pool, capsys):
    code, _, err = run(capsys, "select", "length", "--pool", "pool.jsonl", "-o", os.fsdecode(b"caf\xe9"))
    assert code == 2 and r"b'caf\xe9' is not UTF-8" in err and sorted(os.listdir(pool)) == ["pool.jsonl"]


def test_verbose_shows_the_traceback_of_an_expected_error(pool, capsys):
    _, _, err = run(capsys, "select", "random", "-o", "o", "-v")
    assert "Traceback" in err and "UsageError" in err


def test_select_writes_the_folder_and_says_what_to_open(pool, capsys):
    code, out, err = select(capsys, "--budget", "4")
    assert code == 0
    assert "kept 4 of 40 rows" in out and "out/selected.jsonl" in out and "out/report.html" in out
    assert "pool: pool.jsonl, 40 rows" in err
    assert np.load("out/indices.npy").tolist() == [17, 34, 11, 28]
    lines = (pool / "pool.jsonl").read_text().splitlines()
    assert (pool / "out/selected.jsonl").read_text().splitlines() == [lines[i] for i in (11, 17, 28, 34)]
    log = (pool / "out/run.log").read_text()
    assert "select scores --pool pool.jsonl" in log and "done in" in log


def test_quiet_leaves_stderr_empty_and_json_is_one_object(pool, capsys):
    code, out, err = select(capsys, "--budget", "10%", "-q", "--json")
    result = json.loads(out)
    assert code == 0 and err == ""
    assert (result["status"], result["exit_code"], result["kept"]) == ("done", 0, 4)
    assert result["folder"] == "out" and "selected.jsonl" in result["files"]


def test_quiet_leaves_the_progress_that_was_asked_for(pool, capsys):
    _, _, err = select(capsys, "-q", "--progress", "json")
    lines = [json.loads(line) for line in err.splitlines()]
    assert lines and all(line["event"] == "progress" for line in lines)


def test_json_of_a_failure_carries_message_and_exit_code(pool, capsys):
    code, out, err = run(capsys, "select", "random", "--pool", "missing.jsonl", "-o", "o", "--json")
    result = json.loads(out)
    assert code == result["exit_code"] == 2 and result["status"] == "error"
    assert "missing.jsonl" in result["message"] and "missing.jsonl" in err


def test_the_same_request_again_does_nothing(pool, capsys):
    select(capsys, "--budget", "10%")
    before = {path.name: path.stat().st_mtime_ns for path in (pool / "out").iterdir() if path.name != "run.log"}
    code, out, err = select(capsys, "--budget", "0.1")
    assert code == 0 and "finished already" in err and "nothing was computed again" in out
    assert before == {path.name: path.stat().st_mtime_ns for path in (pool / "out").iterdir() if path.name != "run.log"}


def test_another_request_is_refused_with_a_diff_and_overwrite_replaces(pool, capsys):
    select(capsys, "--budget", "10%", "--also", "instructlab")
    code, _, err = select(capsys, "--budget", "5%")
    assert code == 2 and 'budget: "10%" there, "5%" now' in err
    code, out, _ = select(capsys, "--budget", "5%", "--overwrite")
    assert code == 0 and "kept 2 of 40" in out
    manifest = json.loads((pool / "out/manifest.json").read_text())
    assert manifest["kept"] == 2
    written = {path.name for path in (pool / "out").iterdir()} - {"state", "run.log", "manifest.json"}
    assert written == set(manifest["files"]) - {"run.log"}, "exports of the old run are gone"


def test_a_changed_pool_is_another_request(pool, capsys):
    select(capsys)
    with open(pool / "pool.jsonl", "a") as stream:
        stream.write('{"instruction": "a", "input": "", "output": "b", "s": {"ifd": 0.5}}\n')
    code, _, err = select(capsys)
    assert code == 2 and "rows: 40 there, 41 now" in err


def test_short_of_budget_is_exit_code_3_and_the_rows_are_written(pool, capsys):
    code, out, _ = select(capsys, "--budget", "100%", "--json", method="ifd")
    result = json.loads(out)
    assert code == 3 and result["status"] == "short of budget"
    assert result["short_by"] == 7 and result["kept"] == 33
    assert len((pool / "out/selected.jsonl").read_text().splitlines()) == 33


def test_ifd_with_ready_scores_drops_those_above_one_and_needs_no_model(pool, capsys):
    code, _, err = select(capsys, "--budget", "2", method="ifd")
    assert code == 0 and "model" not in err
    assert json.loads((pool / "out/manifest.json").read_text())["method"] == "ifd"
    assert np.load("out/indices.npy").tolist() == [16, 33], "scores 32/32 and 31/32"


def test_keep_lowest(pool, capsys):
    select(capsys, "--budget", "3", "--keep", "lowest")
    assert np.load("out/indices.npy").tolist() == [0, 23, 6]


def test_score_then_choose_twice_without_computing(pool, capsys):
    code, out, _ = run(capsys, "score", "scores", "--pool", "pool.jsonl", *SCORED, "-o", "run")
    assert code == 0 and "fastsel select --from run" in out
    assert not (pool / "run/selected.jsonl").exists() and (pool / "run/scores.npy").exists()
    code, _, err = run(capsys, "select", "--from", "run", "--budget", "4", "-o", "four")
    assert code == 0 and "no model runs" in err
    select(capsys, "--budget", "4", out="direct")
    for name in ("selected.jsonl", "indices.npy", "scores.npy", "selection.parquet"):
        assert (pool / "four" / name).read_bytes() == (pool / "direct" / name).read_bytes()
    code, _, _ = run(capsys, "select", "--from", "four", "--budget", "50%", "--per", "source", "-o", "half")
    assert code == 0
    chosen = np.load("half/indices.npy")
    assert np.bincount(chosen % 4).tolist() == [5, 5, 5, 5]


def test_from_a_run_refuses_what_would_need_another_pass(pool, capsys):
    select(capsys)
    for words, message in [
        (["--keep", "lowest"], "--keep was 'highest' in out and cannot be 'lowest' without scoring again"),
        (["-o", "out"], "name the same folder"),
        (["--config", "x.yaml"], "leave --config out"),
    ]:
        code, _, err = run(capsys, "select", "--from", "out", "-o", "again", *words)
        assert code == 2 and message in err
    code, _, err = run(capsys, "select", "ifd", "--from", "out", "-o", "again")
    assert code == 2 and "out was scored by scores, not by ifd" in err
    run(capsys, "select", "random", "--pool", "pool.jsonl", "-o", "drawn")
    code, _, err = run(capsys, "select", "--from", "drawn", "--seed", "5", "-o", "again")
    assert code == 2 and "--seed was 0 in drawn and cannot be 5" in err


def test_from_a_run_whose_pool_changed_is_refused(pool, capsys):
    select(capsys)
    (pool / "pool.jsonl").write_text((pool / "pool.jsonl").read_text().replace("Say 3.", "Say three."))
    code, _, err = run(capsys, "select", "--from", "out", "-o", "again", "--budget", "2")
    assert code == 2 and "made from another pool" in err


def test_from_a_run_whose_pool_moved_takes_the_new_place(pool, capsys):
    select(capsys)
    (pool / "pool.jsonl").rename(pool / "moved.jsonl")
    code, _, err = run(capsys, "select", "--from", "out", "-o", "again", "--budget", "2")
    assert code == 2 and "out was made from it; --pool says where it is now" in err
    code, out, _ = run(capsys, "select", "--from", "out", "-o", "again", "--budget", "2", "--pool", "moved.jsonl")
    assert code == 0 and "kept 2 of 40" in out


def test_from_a_run_saved_in_python(pool, capsys):
    fastsel.length("pool.jsonl", budget=5).save("saved")
    code, out, _ = run(capsys, "select", "--from", "saved", "-o", "again", "--budget", "2", "--pool", "pool.jsonl")
    assert code == 0 and np.load("again/indices.npy").tolist() == [39, 38]


def test_a_score_column_that_no_row_has_is_a_misspelt_one(pool, capsys):
    code, _, err = run(capsys, "select", "ifd", "--pool", "pool.jsonl", "--score-column", "s.idf", "-o", "out")
    assert code == 2 and "no row of pool.jsonl has a number in s.idf" in err


def test_rows_can_be_ranked_annotated_and_exported(pool, capsys):
    code, _, _ = select(capsys, "--budget", "3", "--order", "rank", "--annotate", "--also", "oda,less", "--no-report")
    assert code == 0
    written = [json.loads(line) for line in (pool / "out/selected.jsonl").read_text().splitlines()]
    assert [row["instruction"] for row in written] == ["Say 17.", "Say 34.", "Say 11."]
    assert [row["fastsel"]["score"] for row in written] == [39 / 32, 38 / 32, 37 / 32]
    names = {path.name for path in (pool / "out").iterdir()}
    assert {"oda.jsonl", "sorted.csv"} <= names and "report.html" not in names


def test_configuration_in_a_file_gives_the_same_run(pool, capsys):
    select(capsys, "--budget", "3", "--per", "source")
    code, out, _ = run(capsys, "select", "--config", "out/config.yaml", "-o", "again")
    assert code == 0
    assert (pool / "again/indices.npy").read_bytes() == (pool / "out/indices.npy").read_bytes()
    code, out, _ = run(capsys, "select", "--config", "out/config.yaml", "--set", "budget=7", "--print-config")
    assert code == 0 and yaml.safe_load(out)["budget"] == "7" and yaml.safe_load(out)["per"] == "source"


def test_limit_reads_the_first_rows_only(pool, capsys):
    _, out, _ = select(capsys, "--limit", "10", "--budget", "100%", "--json")
    assert json.loads(out)["pool"]["rows"] == 10


def test_lines_that_cannot_be_read_stop_the_run_beyond_the_rate(pool, capsys):
    with open(pool / "pool.jsonl", "a") as stream:
        stream.write("{broken\n")
    code, _, err = select(capsys)
    assert code == 1 and "max_error_rate" in err.replace("-", "_")
    code, _, err = select(capsys, "--max-error-rate", "0.1")
    assert code == 0 and "1 error" in err and "line 41" in err
    code, _, err = select(capsys, "--on-error", "fail", out="strict")
    assert code == 1 and "line 41" in err


def test_dry_run_writes_nothing(pool, capsys):
    code, out, _ = select(capsys, "--dry-run", "--json")
    expected = json.loads(out)
    assert code == 0 and expected["rows"] == expected["usable_rows"] == 40
    assert expected["seconds"] > 0 and expected["memory_bytes"] > 1e6 and expected["disk_bytes"] > 0
    code, out, _ = select(capsys, "--dry-run")
    assert code == 0 and "nothing was written" in out
    assert sorted(path.name for path in pool.iterdir()) == ["pool.jsonl"]


def test_dry_run_reads_the_trial_as_the_pool_was_read(pool, capsys):
    rows = "".join(json.dumps({"q": "ask", "a": "answer", "origin": "web"}) + "\n" for _ in range(3))
    (pool / "rows.jsonl").write_text(rows)
    entry = {"file_name": "rows.jsonl", "columns": {"prompt": "q", "response": "a"}}
    (pool / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    words = ["select", "length", "--pool", "dataset_info.json#mine", "--budget", "1", "--dry-run"]
    code, out, _ = run(capsys, *words)
    assert code == 0 and "3 rows, 3 of them usable" in out


def test_dry_run_refuses_what_the_run_would(pool, capsys):
    code, _, err = select(capsys, "--dry-run", "--budget", "2Mtok")
    assert code == 2 and "this method counts none" in err
    code, _, err = select(capsys, "--dry-run", "--per", "source=typo:1")
    assert code == 2 and "the pool has no source 'typo'" in err


def test_names_of_sources_cannot_break_the_summary(tmp_path, capsys):
    rows = [{"instruction": "a", "output": "b", "source": name} for name in ("new\nline", "\x1b[31mred", "plain")]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = run(capsys, "select", "random", "--pool", str(tmp_path / "pool.jsonl"), "-o", str(tmp_path / "o"))
    assert code == 0 and "new\N{REPLACEMENT CHARACTER}line" in out and "\x1b" not in out


def test_methods_prints_a_row_for_each_method(capsys):
    code, out, _ = run(capsys, "methods")
    assert code == 0
    for name in METHODS:
        assert re.search(rf"^{name} ", out, re.MULTILINE)
    for heading in ("venue", "task type", "representation", "diversity", "quality", "status"):
        assert heading in out
    _, out, _ = run(capsys, "methods", "--json")
    assert [row["name"] for row in json.loads(out)] == list(METHODS)


def test_offline_forbids_the_hub(pool, capsys, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    assert select(capsys, "--offline")[0] == 0
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"


def test_the_program_ends_with_the_code_and_prints_no_traceback(pool):
    done = program("select", "scores", "--pool", "pool.jsonl", "-o", "o")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") <= 2 and done.stderr.startswith(("pool:", "error:"))
    assert program("--version").stdout == f"fastsel {__version__}\n"


def test_a_reader_that_leaves_is_no_error(tmp_path):
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "fastsel", "methods"], stdout=writes, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writes)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 1, "a smaller --batch-tokens needs less"),
        (OSError(28, "No space left on device"), 1, "No space left on device; finished parts are kept"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "pip install 'fastsel[models]'"),
        (KeyboardInterrupt(), 130, "To go on: fastsel select scores"),
        (ZeroDivisionError("oops"), 1, "this is a bug in fastsel"),
    ],
)
def test_what_else_may_happen_has_a_message_and_a_code(error, code, message, pool, capsys, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("fastsel.commands.run.compute", fail)
    found, out, err = select(capsys)
    assert found == code and message in err and out == ""
    assert ("Traceback" in err) == ("bug" in message)
    log = (pool / "out/run.log").read_text()
    assert message.split(" ")[-1] in log
