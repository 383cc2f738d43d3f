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


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


@pytest.fixture
def compare(benchmark):
    """compare(ours, peer, op=, case=, name=, check=) -> Comparison, and one row for record.py.

    Args:
        ours, peer: functions without arguments; called alternately, each round one call of both.
        op, case, name: the operation or method, the shape, the peer: the key of the row in history.csv.
        check: called with both results before the clock starts; raises when they disagree, and then nothing is timed.
            None only where the peer computes something else (a bare matrix product).
        rounds: pairs of calls. A peer whose first call takes over a minute is not called again.
        cpu_clock: process-CPU seconds of the peer, where it runs in a process of its own.
        info: further columns of the row, such as our_peak_bytes, peer_peak_bytes, note.
    """

    def run(ours, peer, *, op, case, name, check, rounds=5, info=None, cpu_clock=time.process_time):
        peer_wall, peer_cpu, ours_cpu = [], [], []

        def call_peer():
            wall, cpu = time.perf_counter(), cpu_clock()
            result = peer()
            peer_wall.append(time.perf_counter() - wall)
            peer_cpu.append(cpu_clock() - cpu)
            return result

        our_result, peer_result = ours(), call_peer()  # also the warm-up
        if check is not None:
            check(our_result, peer_result)
        del our_result, peer_result
        peer_is_slow = peer_wall[0] > 60
        if not peer_is_slow:
            peer_wall.clear(), peer_cpu.clear()

        def timed_peer():
            if not peer_is_slow:
                call_peer()

        def timed_ours():
            cpu = time.process_time()
            ours()
            ours_cpu.append(time.process_time() - cpu)

        benchmark.group = f"{op}: {case}"
        # pytest-benchmark runs setup before every round and does not time it: that is where the peer has its turn.
        benchmark.pedantic(timed_ours, setup=timed_peer, rounds=rounds, iterations=1)
        median = statistics.median
        found = Comparison(benchmark.stats.stats.median, median(peer_wall), median(ours_cpu), median(peer_cpu))
        benchmark.extra_info.update(
            op=op, case=case, peer=name, threads=torch.get_num_threads(), load=round(os.getloadavg()[0], 1),
            peer_s=found.peer, our_cpu_s=found.ours_cpu, peer_cpu_s=found.peer_cpu, **(info or {}),
        )  # fmt: skip
        return found

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
