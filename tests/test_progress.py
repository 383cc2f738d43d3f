"""Progress goes to stderr, in the form that was asked for, and never too often."""

import io
import json

import pytest

from fastsel.errors import UsageError
from fastsel.progress import MODES, format_seconds, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(mode, stream, seconds_a_step, steps=10, total=1000):
    clock = Clock()
    with progress_bar(total, mode=mode, description="scoring", stream=stream, clock=clock) as bar:
        for _ in range(steps):
            clock.now += seconds_a_step
            bar.update(100)
    return bar


def test_plain_lines_come_at_most_every_ten_seconds():
    stream = io.StringIO()
    run("plain", stream, seconds_a_step=5.0)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "scoring: 200 of 1,000 tok (20%), 20 tok/s, 40.0 s left"
    assert [line.split()[1] for line in lines] == ["200", "400", "600", "800", "1,000"]


def test_a_short_step_writes_no_plain_line():
    stream = io.StringIO()
    run("plain", stream, seconds_a_step=0.1)
    assert stream.getvalue() == ""


def test_the_end_of_a_long_step_is_said_once():
    stream = io.StringIO()
    run("plain", stream, seconds_a_step=4.0)
    lines = stream.getvalue().splitlines()
    assert lines[-1].startswith("scoring: 1,000 of 1,000 tok (100%)")
    assert len(lines) == len(set(lines))


def test_without_a_total_there_is_no_percentage():
    stream = io.StringIO()
    run("plain", stream, seconds_a_step=10.0, steps=1, total=None)
    assert stream.getvalue() == "scoring: 100 tok, 10 tok/s\n"


def test_what_an_earlier_run_finished_does_not_count_for_the_speed():
    stream, terminal, clock = io.StringIO(), Terminal(), Clock()
    for mode, where in (("plain", stream), ("bar", terminal)):
        with progress_bar(1000, mode=mode, description="scoring", stream=where, clock=clock) as bar:
            bar.skip(600)
            clock.now += 10
            bar.update(100)
    assert stream.getvalue() == "scoring: 700 of 1,000 tok (70%), 10 tok/s, 30.0 s left\n"
    assert "60%" in terminal.getvalue()


def test_json_lines_can_be_read_by_a_program():
    stream = io.StringIO()
    run("json", stream, seconds_a_step=1.0)
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert records[0] == {
        "event": "progress", "step": "scoring", "done": 0, "total": 1000, "unit": "tok", "elapsed_s": 0.0,
    }  # fmt: skip
    assert records[-1]["done"] == 1000
    assert all(a["done"] <= b["done"] for a, b in zip(records, records[1:], strict=False))


def test_none_writes_nothing_and_still_counts():
    stream = io.StringIO()
    assert run("none", stream, seconds_a_step=20.0).done == 1000
    assert stream.getvalue() == ""


def test_auto_draws_a_bar_only_on_a_terminal():
    terminal, log = Terminal(), io.StringIO()
    run("auto", terminal, seconds_a_step=20.0)
    run("auto", log, seconds_a_step=20.0)
    assert "\r" in terminal.getvalue() and "scoring" in terminal.getvalue()
    assert "\r" not in log.getvalue() and "scoring: 100 of 1,000" in log.getvalue()


def test_stderr_is_the_default_and_stdout_stays_empty(capsys):
    with progress_bar(2, mode="json") as bar:
        bar.update(2)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 2


def test_refuses_an_unknown_mode_and_names_the_known_ones():
    with pytest.raises(UsageError, match="progress='fancy' is not known; it is one of: " + ", ".join(MODES)):
        progress_bar(1, mode="fancy")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (8.44, "8.4 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min 0 s"),
        (60, "1 min 0 s"),
        (723, "12 min 3 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_read_well(seconds, text):
    assert format_seconds(seconds) == text
