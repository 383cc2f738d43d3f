"""Shards in processes of this machine."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from fastsel.errors import RunFailedError, UsageError

_function: Callable[[Any], Any] | None = None  # in a worker: what it was sent


class LocalProcesses:
    """Processes that are spawned, never forked: a forked child would inherit the record of a thread pool without its
    threads. A script that uses them keeps its own work under `if __name__ == "__main__":`, as spawning imports it.
    """

    def __init__(self, workers: int, threads: int | None = None) -> None:
        """Nothing starts yet.

        Args:
            workers: processes, each with a model of its own.
            threads: of each; None shares torch's number of threads here among them.

        Raises:
            UsageError: a number below 1.
        """
        if workers < 1 or (threads is not None and threads < 1):
            raise UsageError(f"workers={workers}, threads={threads}: each must be at least 1")
        self.workers = workers
        self.threads = threads

    def map_shards(self, function: Callable[[Any], Any], shards: Sequence[Any]) -> Iterator[Any]:
        """The function's results in the order of the shards; the processes end with the last one, or when it is left.

        Raises:
            RunFailedError: a process died (most often for want of memory). Whatever the function raises is raised.
        """
        if not shards:
            return
        import torch

        workers = min(self.workers, len(shards))
        threads = self.threads or max(1, torch.get_num_threads() // workers)
        before = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (function, threads))
        try:
            yield from pool.map(_run, shards)
        except BrokenProcessPool:
            raise RunFailedError(
                f"one of {workers} worker processes died, most often for want of memory; finished shards are kept: "
                "go on with fewer workers"
            ) from None
        finally:
            # What still runs would only be thrown away.
            for child in set(multiprocessing.active_children()) - before:
                child.terminate()
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(function: Callable[[Any], Any], threads: int) -> None:
    global _function
    import torch

    torch.set_num_threads(threads)
    _function = function


def _run(shard: Any) -> Any:
    assert _function is not None
    return _function(shard)
