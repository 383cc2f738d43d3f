"""How everything here is timed: a gate first, then both sides alternating in one process; what is kept is a ratio."""

import ctypes
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

# Before torch is imported: beside a busy neighbour, OpenMP's spinning threads cost many times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


class Comparison(NamedTuple):
    """Medians in seconds; process-CPU seconds hardly change when other programs run beside."""

    ours: float
    peer: float
    ours_cpu: float
    peer_cpu: float

    @property
    def ratio(self) -> float:
        """How many times as fast as the peer, by wall time."""
        return self.peer / self.ours

    @property
    def ratio_cpu(self) -> float:
        """The same by process-CPU time."""
        return self.peer_cpu / self.ours_cpu


class Earlier(NamedTuple):
    """A call made before, in this process: what a peer of many minutes gives for `call`, so that two tests share it."""

    result: object
    wall: float
    cpu: float

    @classmethod
    def of(cls, call):
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        return cls(result, time.perf_counter() - wall, time.process_time() - cpu)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


class _Peer:
    """One competitor: what it is called, how it is called, and how long it took."""

    def __init__(self, name, call, check, cpu_clock=time.process_time, info=None):
        self.name, self._call, self._check, self._cpu_clock = name, call, check, cpu_clock
        self._info = {} if info is None else info
        self._wall, self._cpu = [], []
        self._earlier = call if isinstance(call, Earlier) else None

    def timed(self):
        wall, cpu = time.perf_counter(), self._cpu_clock()
        result = self._call()
        self._wall.append(time.perf_counter() - wall)
        self._cpu.append(self._cpu_clock() - cpu)
        return result

    def agree(self, our_result):
        """The gate, and the warm-up: a peer that takes over a minute is not called again."""
        if self._earlier is not None:
            self._wall, self._cpu = [self._earlier.wall], [self._earlier.cpu]
            result = self._earlier.result
        else:
            result = self.timed()
        if self._check is not None:
            self._check(our_result, result)
        self.is_slow = self._earlier is not None or self._wall[0] > 60
        if not self.is_slow:
            self._wall.clear(), self._cpu.clear()

    def row(self):
        median = statistics.median
        return {"peer": self.name, "peer_s": median(self._wall), "peer_cpu_s": median(self._cpu), **self._info}


@pytest.fixture
def compare_all(benchmark):
    """compare_all(ours, peers, op=, case=) -> {peer's name: Comparison}; one row of record.py for each peer.

    Args:
        ours: function without arguments.
        peers: list of dicts: name; call, a function without arguments, or what one gave call_once; check, called with
            both results before the clock starts, which raises when they disagree, and then nothing is timed (None only
            where the peer computes something else, such as a bare matrix product); cpu_clock, process-CPU seconds of a
            peer that runs in a process of its own; info, further columns of its row, such as peer_peak_bytes.
        op, case: the operation or method and the shape: with the peer's name the key of a row in history.csv.
        rounds: each round calls every peer and then ours. A peer whose first call takes over a minute is called once.
        info: further columns for all rows, such as our_peak_bytes, note.
    """

    def run(ours, peers, *, op, case, rounds=5, info=None):
        competitors = [_Peer(**peer) for peer in peers]
        result = ours()
        for peer in competitors:
            peer.agree(result)
        del result
        ours_cpu = []

        def every_peer():
            for peer in competitors:
                if not peer.is_slow:
                    peer.timed()

        def timed_ours():
            cpu = time.process_time()
            ours()
            ours_cpu.append(time.process_time() - cpu)

        benchmark.group = f"{op}: {case}"
        # pytest-benchmark runs setup before every round and does not time it: that is where the peers have their turn.
        benchmark.pedantic(timed_ours, setup=every_peer, rounds=rounds, iterations=1)
        ours_s, our_cpu_s = benchmark.stats.stats.median, statistics.median(ours_cpu)
        rows = [peer.row() for peer in competitors]
        benchmark.extra_info.update(
            op=op, case=case, threads=torch.get_num_threads(), load=round(os.getloadavg()[0], 1),
            our_cpu_s=our_cpu_s, peers=rows, **(info or {}),
        )  # fmt: skip
        return {row["peer"]: Comparison(ours_s, row["peer_s"], our_cpu_s, row["peer_cpu_s"]) for row in rows}

    return run


@pytest.fixture(scope="session")
def call_once():
    """call_once(function) -> Earlier, the `call` of a peer that several tests share."""
    return Earlier.of


@pytest.fixture
def compare(compare_all):
    """compare(ours, peer, op=, case=, name=, check=) -> Comparison: compare_all with one peer."""

    def run(ours, peer, *, op, case, name, check, rounds=5, info=None):
        peers = [{"name": name, "call": peer, "check": check}]
        return compare_all(ours, peers, op=op, case=case, rounds=rounds, info=info)[name]

    return run


@pytest.fixture
def peak_memory():
    """peak_memory(function) -> (result, bytes): how far the resident memory of this process rose above its start."""

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

    def run(function):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
        before = status("VmRSS")
        result = function()
        return result, max(0, status("VmHWM") - before)

    return run
