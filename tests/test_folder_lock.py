"""One process at a time, and the other is told which."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastsel.errors import InputError
from fastsel.folder_lock import FolderLock

HOLD = """
import sys
from pathlib import Path
from fastsel.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_is_named_and_its_end_frees_the_folder(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"{tmp_path} is in use by process {other.pid} on .* \(since 20"):
            FolderLock(tmp_path / "lock")
        other.kill()  # not even a crash keeps a folder locked
        other.wait()
    FolderLock(tmp_path / "lock").close()
    assert (tmp_path / "lock").read_bytes() == b""


def test_one_thread_of_many_gets_in(tmp_path):
    def enter(_):
        try:
            return FolderLock(tmp_path / "lock")
        except InputError:
            return None

    with ThreadPoolExecutor(8) as threads:
        held = [lock for lock in threads.map(enter, range(16)) if lock is not None]
    assert len(held) == 1
    held[0].close()
    held[0].close()
    assert enter(None) is not None


def test_a_forked_child_does_not_give_the_lock_back(tmp_path):
    lock = FolderLock(tmp_path / "lock")
    child = os.fork()
    if child == 0:
        lock.close()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(InputError, match=f"process {os.getpid()} "):
        FolderLock(tmp_path / "lock")
    lock.close()
    FolderLock(tmp_path / "lock").close()
