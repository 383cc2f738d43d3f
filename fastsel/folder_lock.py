"""One process writes to a folder at a time; who is late is told who is there."""

import fcntl
import os
import socket
import time
import weakref
from pathlib import Path

from fastsel.errors import InputError


class FolderLock:
    """Held from when it is made until close(), or until the process ends, however it ends.

    The file stays, empty: removing it would let two processes lock two files of one name. On a file system without
    locks nothing is guarded.
    """

    def __init__(self, file: Path) -> None:
        """Take the lock.

        Args:
            file: the lock's own file in the folder; made when it is missing.

        Raises:
            InputError: another process has it; the message says which.
            OSError: the file cannot be written.
        """
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 300).decode(errors="replace") or "another process"
            os.close(descriptor)
            folder = file.parent.parent if file.parent.name == "state" else file.parent
            raise InputError(f"{folder} is in use by {holder}: wait for it, or give another folder") from None
        except OSError:
            pass
        os.ftruncate(descriptor, 0)
        holder = f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})"
        os.pwrite(descriptor, holder.encode(), 0)
        self._release = weakref.finalize(self, _release, descriptor, os.getpid())

    def close(self) -> None:
        """Give it back; doing so twice is no error."""
        self._release()


def _release(descriptor: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked child shares the lock, and must not give it back
        os.ftruncate(descriptor, 0)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
