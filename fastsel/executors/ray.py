"""Shards on a Ray cluster."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastsel.errors import MissingExtraError, RunFailedError, UsageError


class RayActors:
    """One actor a worker holds the function, and with it the model; shards go to whichever is free.

    Every machine of the cluster needs fastsel, and reads the pool and a model's files under the same paths.
    """

    def __init__(self, address: str | None = None, workers: int | None = None, *, num_gpus: float = 0) -> None:
        """Nothing starts yet.

        Args:
            address: of a running cluster, "auto" for the one of this machine; None starts one here for the run.
            workers: actors; None: as many as the cluster has room for, each with as many CPUs as torch uses threads
                here, or with num_gpus.
            num_gpus: that each actor asks for.

        Raises:
            UsageError: a number below 1.
        """
        if workers is not None and workers < 1:
            raise UsageError(f"workers={workers} must be at least 1")
        self.address = address
        self.workers = workers
        self.num_gpus = num_gpus

    def map_shards(self, function: Callable[[Any], Any], shards: Sequence[Any]) -> Iterator[Any]:
        """The function's results in the order of the shards; the actors end with the last one, or when it is left.

        Raises:
            MissingExtraError: ray is not installed.
            RunFailedError: no cluster at the address, or an actor died. Whatever the function raises is raised.
        """
        if not shards:
            return
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("running on a Ray cluster", "ray", "ray") from error
        import torch

        ours = not ray.is_initialized()
        if ours:
            try:
                ray.init(address=self.address, log_to_driver=False, include_dashboard=False, logging_level="warning")
            except ConnectionError as error:
                raise RunFailedError(f"no Ray cluster answers at {self.address}: {error}") from None
        actors: list[Any] = []
        try:
            threads = torch.get_num_threads()
            room = ray.cluster_resources()
            most = room.get("GPU", 0) / self.num_gpus if self.num_gpus else room.get("CPU", 1) / threads
            workers = min(self.workers or max(1, int(most)), len(shards))
            cpus = threads if self.workers is None and not self.num_gpus else 0  # a named number starts in any case
            actor = ray.remote(num_cpus=cpus, num_gpus=self.num_gpus)(_Worker)
            sent = ray.put(function)
            actors = [actor.remote(sent, threads, os.getcwd()) for _ in range(workers)]
            yield from _in_order(ray, actors, shards)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except ray.exceptions.RayActorError as error:
            raise RunFailedError(f"a Ray actor died; finished shards are kept: {error}") from None
        finally:
            for worker in actors:
                ray.kill(worker)
            if ours:
                ray.shutdown()


class _Worker:
    """In the actor's process."""

    def __init__(self, function: Callable[[Any], Any], threads: int, folder: str) -> None:
        import torch

        if os.path.isdir(folder):  # relative paths of the pool mean what they mean to the one that asks
            os.chdir(folder)
        torch.set_num_threads(threads)
        self._function = function

    def run(self, shard: Any) -> Any:
        return self._function(shard)


def _in_order(ray: Any, actors: Sequence[Any], shards: Sequence[Any]) -> Iterator[Any]:
    """Keep every actor busy; at most two shards an actor wait for an earlier one."""
    free = list(actors)
    running: dict[Any, tuple[int, Any]] = {}
    done: dict[int, Any] = {}
    begun = given = 0
    while given < len(shards):
        while free and begun < min(len(shards), given + 2 * len(actors)):
            worker = free.pop()
            running[worker.run.remote(shards[begun])] = begun, worker
            begun += 1
        (first,), _ = ray.wait(list(running), num_returns=1)
        position, worker = running.pop(first)
        done[position] = ray.get(first)
        free.append(worker)
        while given in done:
            yield done.pop(given)
            given += 1
