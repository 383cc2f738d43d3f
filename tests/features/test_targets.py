"""Target files in subtasks, and target rows that the pool already holds."""

import json

import numpy as np
import pytest

from fastsel.errors import FastselWarning, InputError, MissingExtraError, UsageError
from fastsel.features import leaks as module
from fastsel.features.leaks import find_leaks, plain_words
from fastsel.features.targets import open_targets
from fastsel.io import open_pool

TASKS = [
    {"instruction": "add one and two please", "output": "3", "task": "math", "meta": {"level": 2}},
    {"instruction": "name the capital of France", "output": "Paris", "task": "places"},
    {"instruction": "add", "output": "", "task": "math"},
    {"instruction": "multiply three by two", "output": "6", "task": "math", "meta": {"level": "2"}},
    {"instruction": "no task", "output": "here"},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TASKS))
    return path


def test_one_file_is_one_subtask(file):
    (target,) = open_targets(file)
    assert (target.name, target.subtasks, target.rows.tolist()) == ("tasks", ("tasks",), [0, 1, 3, 4])
    assert target.subtask.tolist() == [0, 0, 0, 0] and len(target) == 4
    assert target.left_out == {2: "line 3: the answer (output) is empty"}
    assert target.note == "target tasks: 4 rows; 1 cannot be used (row 2: line 3: the answer (output) is empty)"
    assert [example.messages[-1].content for example in target.examples()] == ["3", "Paris", "6", "here"]


def test_a_column_names_the_subtasks(file):
    (target,) = open_targets(file, subtask_column="task")
    assert (target.subtasks, target.rows.tolist(), target.subtask.tolist()) == (
        ("math", "places"),
        [0, 1, 3],
        [0, 1, 0],
    )
    assert target.left_out[4] == "there is no subtask in task"
    assert target.note.startswith("target tasks: 3 rows in 2 subtasks of 1 to 2; 2 cannot be used (row 2: ")
    (nested,) = open_targets(file, subtask_column="meta.level")
    assert nested.subtasks == ("2",) and nested.rows.tolist() == [0, 3]


def test_rows_can_be_left_out_later(file):
    (target,) = open_targets(file, subtask_column="task")
    fewer = target.without({1: "cut"})
    assert (fewer.subtasks, fewer.rows.tolist(), fewer.subtask.tolist()) == (("math",), [0, 3], [0, 0])
    assert fewer.left_out[1] == "cut" and fewer.fingerprint != target.fingerprint
    assert target.without({}).fingerprint == target.fingerprint
    with pytest.raises(InputError, match="target tasks has no row that can be used: gone"):
        target.without({0: "gone", 1: "gone", 3: "gone"})


def test_several_targets(file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(TASKS[0]) + "\n")
    assert [target.name for target in open_targets([file, str(other)])] == ["tasks", "other"]
    named = open_targets({"a": file, "b": TASKS})
    assert [(target.name, target.subtasks) for target in named] == [("a", ("a",)), ("b", ("b",))]
    assert open_targets(TASKS)[0].rows.tolist() == [0, 1, 3, 4] and open_targets(open_pool(file))[0].name
    with pytest.raises(InputError, match="two targets are called tasks: give a mapping"):
        open_targets([file, file])


def test_refuses_targets(file, tmp_path):
    with pytest.raises(InputError, match="no target was named"):
        open_targets({})
    with pytest.raises(InputError, match="no row has a value in the column tasc; the first has: instruction, output"):
        open_targets(file, subtask_column="tasc")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"instruction": "a", "output": ""}\n')
    with pytest.raises(InputError, match="target empty has no row that can be used: line 1: the answer"):
        open_targets(empty)
    with pytest.raises(InputError):
        open_targets(tmp_path / "nowhere.jsonl")


POOL = [
    {"instruction": "Add ONE, and\n two: please!", "output": "three"},
    {"instruction": "something else entirely, a recipe", "output": "3"},
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes?"},
                  {"role": "user", "content": "Name the capital of France."}, {"role": "assistant", "content": "P"}]},
    {"instruction": "add", "output": ""},
    {"instruction": "add", "output": "sixty"},
    {"instruction": "", "input": "", "output": "name the capital of france paris"},
    {"instruction": "no", "output": "here"},
]  # fmt: skip


def test_equal_words_are_leaks_whatever_the_case_and_the_punctuation(file):
    targets = open_targets(file)
    leaks = find_leaks(open_pool(POOL), targets, how="equal")
    assert [(leak.row, leak.target, leak.target_row, leak.is_equal) for leak in leaks.found] == [
        (0, "tasks", 0, True),
        (2, "tasks", 1, True),
        (5, "tasks", 1, True),
    ]
    assert leaks.mask(7).tolist() == [True, False, True, False, False, True, False]
    assert leaks.note == (
        "leaks: 3 pool rows hold 2 of 4 target rows (3 equal, 0 near); pool row 0 holds row 0 of tasks"
    )
    with pytest.warns(FastselWarning, match="3 pool rows hold .*--drop-leaks leaves them out"):
        leaks.warn(dropped=False)
    with pytest.warns(FastselWarning, match="they are left out"):
        leaks.warn(dropped=True)


def test_short_questions_alone_are_no_leaks():
    target = open_targets([{"instruction": "Continue.", "output": "one two three"}])
    pool = open_pool(
        [{"instruction": "continue", "output": "four"}, {"instruction": "continue", "output": "One two three"}]
    )
    assert [leak.row for leak in find_leaks(pool, target, how="equal").found] == [1]


def test_plain_words():
    assert plain_words("  \uff21dd\tONE,two!! ") == "add one two"


class Letters:
    """An encoder whose vector counts letters."""

    name, revision, fingerprint, device, dtype = "letters", None, "0" * 32, "cpu", "float32"
    path, pooling, max_length, d, notes, is_normalised = "table", "mean", 512, 26, [], False

    def tokenise(self, texts):
        return [[ord(c) - 97 for c in text.lower() if "a" <= c <= "z"] for text in texts]

    def sequence(self, tokens, *, ended=False):
        return list(tokens), False

    def embed(self, sequences):
        return np.stack([np.bincount(sequence, minlength=26) for sequence in sequences]).astype(np.float32)


def test_near_ones_by_the_cosine_of_their_questions(file, tmp_path):
    pool = open_pool([*POOL, {"instruction": "name the capitals of France", "output": "?"}])
    targets = open_targets(file)
    leaks = find_leaks(pool, targets, encoder=Letters(), store=tmp_path / "store")
    assert [(leak.row, leak.target_row, leak.is_equal) for leak in leaks.found] == [
        (0, 0, True), (2, 1, True), (5, 1, True), (7, 1, False),
    ]  # fmt: skip
    a, b = (
        Letters().embed(Letters().tokenise(["name the capitals of France", "name the capital of France"])).astype(float)
    )
    assert leaks.found[-1].cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
    assert find_leaks(pool, targets, encoder=Letters(), similarity=0.999).found[-1].row == 5
    assert (tmp_path / "store" / "index.json").exists()


def test_without_an_encoder_only_equal_rows_are_looked_for(file, monkeypatch):
    def missing(*args, **kwargs):
        raise MissingExtraError("the bundled encoder", "some-package", "embed")

    monkeypatch.setattr(module, "_near", missing)
    with pytest.warns(FastselWarning, match="only equal rows are looked for: .*fastsel.embed."):
        leaks = find_leaks(open_pool(POOL), open_targets(file))
    assert leaks.looked_for == "equal" and len(leaks.found) == 3


def test_nothing_is_looked_for_when_asked_so(file):
    leaks = find_leaks(open_pool(POOL), open_targets(file), how="none")
    assert leaks.found == [] and leaks.note == "leaks: not looked for"
    leaks.warn(dropped=False)
    with pytest.raises(UsageError, match="leaks='all' is not known; it is one of: near, equal, none"):
        find_leaks(open_pool(POOL), open_targets(file), how="all")


def test_subtasks_that_lose_all_rows_are_named(file):
    (target,) = open_targets(file, subtask_column="task")
    first = target.subtasks[0]
    rest = target.without({int(row): "no gradient" for row in target.rows[target.subtask == 0]})
    assert first not in rest.subtasks and f"no usable row of the subtasks {first}" in rest.note
    assert rest.record["lost"] == [first] and "no usable row" not in target.note
