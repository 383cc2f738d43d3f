"""Predicted times of Triton launches, from their machine code; a prediction is not a measurement.

The model counts, per pass through the loops around matrix instructions, the cycles that each unit of a multiprocessor
is busy: matrix units (the tile's flops), arithmetic and exponential units, instruction issue, shared memory (the
instructions of the compiled loop) and the second-level cache (the tile's bytes). A pass takes as long as its busiest
unit. The passes of the inner loop and the work between them overlap when at least two programs are resident on a
multiprocessor, otherwise they follow each other. Left out: latency, barriers, launch, clock changes. The floor is what
the task itself needs on an ideal chip: flops, exponentials or bytes, whichever takes longest.
"""

import heapq
import re
from collections.abc import Sequence
from typing import NamedTuple

from fastsel.kernels._runtime.triton_launch import Work
from fastsel.kernels._runtime.triton_proof import (
    MATRIX_OPCODES,
    MachineCode,
    instructions_and_loops,
    matrix_loops,
    programs_per_multiprocessor,
)


class Chip(NamedTuple):
    """Data sheet figures; rates per multiprocessor and clock unless they say otherwise."""

    architecture: str
    multiprocessors: int
    clock_hz: float
    matrix_flops: dict[str, int]  # dense, by "16-bit" and "tf32"
    memory_bytes_s: float  # whole chip
    cache_bytes: float  # from the second-level cache
    fma_lanes: int
    alu_lanes: int = 64
    special_lanes: int = 16
    shared_bytes: int = 128


CHIPS = {
    "A100": Chip("sm_80", 108, 1.41e9, {"16-bit": 2048, "tf32": 1024}, 2.04e12, 5120 / 108, 64),
    "H100": Chip("sm_90", 132, 1.83e9, {"16-bit": 4096, "tf32": 2048}, 3.35e12, 5120 / 132, 128),
    "B200": Chip("sm_100", 148, 1.86e9, {"16-bit": 8192, "tf32": 4096}, 8.0e12, 10240 / 148, 128),
}
# For 32 numbers from anywhere in the 32 banks of shared memory: the mean of the fullest bank over blocks of SJLT's map.
GATHER_CYCLES = 3.4
FMA_PIPE = re.compile(r"(FADD|FMUL|FFMA|IMAD|HFMA2|FADD2|FMUL2|FFMA2)(\.|$)")
SPECIAL_PIPE = re.compile(r"(MUFU|I2F|F2I)(\.|$)")
SHARED_PIPE = re.compile(r"(LDS|STS|LDSM|STSM|LDGSTS)(\.|$)")
OTHER_PIPE = re.compile(
    r"(LDG|STG|LDTM|STTM|BRA|BAR|SYNCS|WARP\w*|DEPBAR|LDGDEPBAR|NOP|EXIT|R2UR|U[A-Z0-9]+|S2\w+|BSYNC|BSSY)(\.|$)"
)


class Prediction(NamedTuple):
    """Seconds predicted for one launch, the floor of its task, and what the busiest unit of each part is."""

    seconds: float
    floor_seconds: float
    programs_resident: int
    inner_limit: str
    outer_limit: str

    @property
    def ratio(self) -> float:
        """Predicted time in units of the floor."""
        return self.seconds / self.floor_seconds


def busy_cycles(opcodes: list[str], chip: Chip, num_warps: int) -> dict[str, float]:
    """Cycles that each unit of a multiprocessor needs when every warp of a program runs these instructions once."""
    cycles = dict.fromkeys(("issue", "fma", "alu", "special", "shared"), 0.0)
    for opcode in opcodes:
        cycles["issue"] += num_warps / 4
        if FMA_PIPE.match(opcode):
            cycles["fma"] += num_warps * 32 / chip.fma_lanes
        elif SPECIAL_PIPE.match(opcode):
            cycles["special"] += num_warps * 32 / chip.special_lanes
        elif SHARED_PIPE.match(opcode):
            cycles["shared"] += num_warps * _shared_bytes(opcode) / chip.shared_bytes
        elif not MATRIX_OPCODES.match(opcode) and not OTHER_PIPE.match(opcode):
            cycles["alu"] += num_warps * 32 / chip.alu_lanes
    return cycles


def _shared_bytes(opcode: str) -> int:
    if "LDSM" in opcode or "STSM" in opcode:
        return 32 * 4 * int(opcode.rsplit(".", 1)[-1] if opcode[-1].isdigit() and opcode[-2] == "." else 1)
    return 32 * (16 if "128" in opcode else 8 if ".64" in opcode else 4)


def predict(code: MachineCode, work: Work, chip: Chip) -> Prediction:
    """Predict the time of one launch compiled for the chip's architecture.

    Raises:
        ValueError: the compiled kernel does not have one innermost loop for each that the work counts.
    """
    opcodes, loops = instructions_and_loops(code.listing)
    inner, outer = matrix_loops(opcodes, loops)
    if outer is None:
        raise ValueError("no loop holds matrix instructions")
    if len(inner) != len(work.programs[0].inner_passes):
        raise ValueError(f"{len(inner)} loops hold matrix instructions, expected {len(work.programs[0].inner_passes)}")
    between = [
        op for i, op in enumerate(opcodes) if outer.start <= i < outer.stop and not any(a <= i < b for a, b in inner)
    ]
    inner_cycles = [busy_cycles(opcodes[loop.start : loop.stop], chip, code.num_warps) for loop in inner]
    for cycles in inner_cycles:
        cycles["matrix"] = work.flops / chip.matrix_flops[work.matrix_units]
        cycles["cache"] = work.cache_bytes / chip.cache_bytes
    outer_cycles = busy_cycles([op for op in between if not MATRIX_OPCODES.match(op)], chip, code.num_warps)
    resident = programs_per_multiprocessor(code, chip.architecture)
    costs = []
    for group in work.programs:
        parts = list(zip(group.inner_passes, inner_cycles, strict=True))
        parts.append((group.outer_passes, outer_cycles))
        if resident >= 2:  # one program computes while another waits: only the busiest unit counts
            cost = max(sum(n * cycles.get(unit, 0.0) for n, cycles in parts) for unit in inner_cycles[0])
        else:
            cost = sum(n * max(cycles.values()) for n, cycles in parts)
        costs.append((group.number, cost))
    seconds = makespan(costs, chip.multiprocessors) / chip.clock_hz
    return Prediction(
        seconds=max(seconds, work.needed_bytes / chip.memory_bytes_s),
        floor_seconds=floor_seconds(work, chip),
        programs_resident=resident,
        inner_limit=max(inner_cycles[0], key=lambda unit: inner_cycles[0][unit]),
        outer_limit=max(outer_cycles, key=lambda unit: outer_cycles[unit]),
    )


def predict_streaming(
    code: MachineCode,
    programs: int,
    passes: int,
    needed_bytes: int,
    chip: Chip,
    *,
    flops: int = 0,
    cache_bytes: int = 0,
    outer_cache_bytes: int = 0,
    matrix_units: str = "16-bit",
    needed_flops: int = 0,
    gathered: int = 0,
) -> Prediction:
    """Predict the time of a launch whose programs go through one long loop, and do the rest of their code once.

    Args:
        code: compiled for the chip's architecture.
        programs, passes: of the launch, and through the loop of each.
        needed_bytes: that the task moves at least; with enough in flight they take the memory's rate.
        chip: one of CHIPS.
        flops, cache_bytes: of matrix products in one pass, and read from the second-level cache in it.
        outer_cache_bytes: that a program moves to and from that cache outside the loop.
        matrix_units: that the products run on.
        needed_flops: of the task.
        gathered: numbers of 4 bytes that a program takes from anywhere in shared memory in one pass.

    Raises:
        ValueError: the compiled kernel has no loop.
    """
    opcodes, loops = instructions_and_loops(code.listing)
    if not loops:
        raise ValueError("the machine code has no loop")
    loop = max(loops, key=lambda one: one.stop - one.start)
    inner = busy_cycles(opcodes[loop.start : loop.stop], chip, code.num_warps)
    outer = busy_cycles(opcodes[: loop.start] + opcodes[loop.stop :], chip, code.num_warps)
    inner |= {"matrix": flops / chip.matrix_flops[matrix_units], "cache": cache_bytes / chip.cache_bytes}
    outer |= {"matrix": 0.0, "cache": outer_cache_bytes / chip.cache_bytes}
    # The disassembly shows one cycle for 32 numbers; conflicts of the banks cost the others.
    inner["shared"] += gathered / 32 * (GATHER_CYCLES - 1)
    resident = programs_per_multiprocessor(code, chip.architecture)
    if resident >= 2:  # as in predict
        cycles = max(passes * inner[unit] + outer[unit] for unit in inner)
    else:
        cycles = passes * max(inner.values()) + max(outer.values())
    per_second = chip.matrix_flops[matrix_units] * chip.multiprocessors * chip.clock_hz
    in_memory = needed_bytes / chip.memory_bytes_s
    return Prediction(
        seconds=max(makespan([(programs, cycles)], chip.multiprocessors) / chip.clock_hz, in_memory),
        floor_seconds=max(in_memory, needed_flops / per_second),
        programs_resident=resident,
        inner_limit=max(inner, key=lambda unit: inner[unit]),
        outer_limit=max(outer, key=lambda unit: outer[unit]),
    )


def predict_straight(code: MachineCode, programs: int, needed_bytes: int, chip: Chip) -> Prediction:
    """Predict the time of a launch whose programs read, compute and write once, without a loop.

    Args:
        code: compiled for the chip's architecture.
        programs: of the launch; many more than the chip has multiprocessors.
        needed_bytes: that the task moves at least, as of predict_streaming.
        chip: one of CHIPS.

    Raises:
        ValueError: the compiled kernel has a loop.
    """
    opcodes, loops = instructions_and_loops(code.listing)
    if loops:
        raise ValueError("the machine code has a loop")
    cycles = busy_cycles(opcodes, chip, code.num_warps)
    limit = max(cycles, key=lambda unit: cycles[unit])
    in_memory = needed_bytes / chip.memory_bytes_s
    return Prediction(
        seconds=max(makespan([(programs, cycles[limit])], chip.multiprocessors) / chip.clock_hz, in_memory),
        floor_seconds=in_memory,
        programs_resident=programs_per_multiprocessor(code, chip.architecture),
        inner_limit=limit,
        outer_limit=limit,
    )


def makespan(costs: Sequence[tuple[int, float]], workers: int) -> float:
    """When the last of (number, cost) jobs ends if each goes, in order, to the worker that is free first."""
    free = [0.0] * workers
    for number, cost in costs:
        rounds, rest = divmod(number, workers)
        free = [time + rounds * cost for time in free] if rounds else free
        heapq.heapify(free)
        for _ in range(rest):
            heapq.heapreplace(free, free[0] + cost)
    return max(free)


def floor_seconds(work: Work, chip: Chip) -> float:
    """The time of the task on an ideal chip: matrix units, exponential units or memory, whichever is busiest."""
    per_second = chip.multiprocessors * chip.clock_hz
    return max(
        work.needed_flops / (chip.matrix_flops[work.matrix_units] * per_second),
        work.needed_exponentials / (chip.special_lanes * per_second),
        work.needed_bytes / chip.memory_bytes_s,
    )
