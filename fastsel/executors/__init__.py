"""Where the shards of a feature run, given to a method as executor=: processes of this machine, or a Ray cluster.

    fastsel.ifd("pool.jsonl", executor=LocalProcesses(8))
    fastsel.ifd("pool.jsonl", executor=RayActors("auto"))

An executor has one function, map_shards(function, shards): the results, in the order of the shards, whoever is done
first. A shard's result does not depend on where it ran, so that every executor gives the same bytes.
"""

from fastsel.executors.local import LocalProcesses
from fastsel.executors.ray import RayActors

__all__ = ["LocalProcesses", "RayActors"]
