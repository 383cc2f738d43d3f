"""What a run folder accepts, refuses, continues and replaces."""

import json
import os

import pytest

from fastsel.commands.runs import RunFolder, describe_differences, sha256_of
from fastsel.errors import InputError

REQUEST = {"method": "ifd", "budget": "10%", "columns": {"messages": "dialogs"}, "pool": "abc"}


def finish(path, request=REQUEST, **options):
    with RunFolder(path, request, **options) as folder:
        (path / "selected.jsonl").write_text("{}\n")
        (path / "manifest.json").write_text(json.dumps({"files": {"selected.jsonl": {}, "sorted.csv": {}}}))
        folder.finish()


def begin(path, request=REQUEST, **options):
    with RunFolder(path, request, **options) as folder:
        folder.features.mkdir(exist_ok=True)
        (folder.features / "index.json").write_text("{}")
        return folder.state


def test_a_new_folder_is_made_and_goes_on_until_it_is_finished(tmp_path):
    out = tmp_path / "deep" / "out"
    assert begin(out) == "new"
    assert begin(out) == "unfinished"
    finish(out)
    assert RunFolder(out, REQUEST).state == "finished"


def fail(path, request=REQUEST, shards=0):
    with pytest.raises(ZeroDivisionError), RunFolder(path, request) as folder:
        (path / "run.log").write_text("it failed\n")
        folder.features.mkdir(exist_ok=True)
        (folder.features / "index.json").write_text("{}")
        for i in range(shards):
            (folder.features / f"{i}.npy").write_bytes(b"")
        raise ZeroDivisionError


def test_a_start_that_computed_nothing_does_not_bind_the_folder(tmp_path):
    fail(tmp_path)
    assert begin(tmp_path, {**REQUEST, "budget": "5%"}) == "new"
    assert (tmp_path / "run.log").exists()


def test_a_failure_after_a_shard_keeps_it_and_goes_on(tmp_path):
    fail(tmp_path, shards=1)
    assert begin(tmp_path) == "unfinished"
    fail(tmp_path)
    assert RunFolder(tmp_path, REQUEST).state == "unfinished", "what an earlier process kept is not dropped"


def test_a_finished_run_that_lost_a_file_is_unfinished(tmp_path):
    finish(tmp_path)
    (tmp_path / "selected.jsonl").unlink()
    assert RunFolder(tmp_path, REQUEST).state == "unfinished"


@pytest.mark.parametrize("prepare", [begin, finish])
def test_another_request_is_refused_with_the_differences(tmp_path, prepare):
    prepare(tmp_path)
    other = {**REQUEST, "budget": "5%", "columns": {"messages": "chat"}, "limit": 3}
    with pytest.raises(InputError) as refused:
        RunFolder(tmp_path, other)
    text = str(refused.value)
    assert 'budget: "10%" there, "5%" now' in text
    assert 'columns.messages: "dialogs" there, "chat" now' in text
    assert "limit: null there, 3 now" in text
    assert "method" not in text and "--overwrite" in text


def test_no_resume_starts_an_unfinished_run_anew_and_leaves_a_finished_one(tmp_path):
    begin(tmp_path)
    with RunFolder(tmp_path, REQUEST, resume=False) as folder:
        assert folder.state == "new" and not folder.features.exists()
    finish(tmp_path)
    assert RunFolder(tmp_path, REQUEST, resume=False).state == "finished"


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    finish(tmp_path)
    (tmp_path / "sorted.csv").write_text("an export of the old run")
    (tmp_path / "notes.txt").write_text("mine")
    with RunFolder(tmp_path, {**REQUEST, "budget": "5%"}, overwrite=True) as folder:
        assert folder.state == "new"
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["notes.txt", "state"]


def test_overwrite_replaces_what_was_written_from_python(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {}}))
    with pytest.raises(InputError, match="holds a finished run"):
        RunFolder(tmp_path, REQUEST)
    assert RunFolder(tmp_path, REQUEST, overwrite=True).state == "new"


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"is not empty \(thesis.tex\).*--overwrite writes beside"):
        RunFolder(tmp_path, REQUEST)
    assert RunFolder(tmp_path, REQUEST, overwrite=True).state == "new"
    (tmp_path / "README.md").write_text("not fastsel's")
    with pytest.raises(InputError, match=r"\(README.md\): give a new or empty folder"):
        RunFolder(tmp_path, REQUEST, overwrite=True)


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "out"
    path.write_text("")
    with pytest.raises(InputError, match="is a file; -o wants a folder"):
        RunFolder(path, REQUEST)


def test_two_writers_are_one_too_many(tmp_path):
    with (
        RunFolder(tmp_path, REQUEST),
        pytest.raises(InputError, match=rf"{tmp_path} is in use by process {os.getpid()} on .*: wait for it"),
        RunFolder(tmp_path, REQUEST),
    ):
        pass
    assert begin(tmp_path) == "unfinished", "the lock ends with its holder"


def test_a_damaged_state_is_refused_and_can_be_overwritten(tmp_path):
    begin(tmp_path)
    (tmp_path / "state" / "request.json").write_text('{"request": ')
    with pytest.raises(InputError, match="request.json cannot be read"):
        RunFolder(tmp_path, REQUEST)
    assert begin(tmp_path, overwrite=True) == "new"


def test_differences_are_empty_for_equal_requests_and_hashes_ignore_order():
    assert describe_differences(REQUEST, dict(reversed(REQUEST.items()))) == ""
    assert sha256_of(REQUEST) == sha256_of(dict(reversed(REQUEST.items())))
    assert sha256_of(REQUEST) != sha256_of({**REQUEST, "budget": "5%"})


@pytest.mark.parametrize(("error", "is_kept"), [(InputError("wrong"), False), (KeyboardInterrupt(), True)])
def test_a_refusal_after_the_search_for_leaks_does_not_bind_the_folder(tmp_path, error, is_kept):
    with pytest.raises(type(error)), RunFolder(tmp_path, REQUEST) as folder:
        (folder.features / "leaks").mkdir(parents=True)
        (folder.features / "leaks" / "00000000-00000004.npy").write_bytes(b"x")
        raise error
    assert (tmp_path / "features" / "leaks").exists() == is_kept
    assert RunFolder(tmp_path, {**REQUEST, "budget": "5%"} if not is_kept else REQUEST).state == (
        "unfinished" if is_kept else "new"
    )
