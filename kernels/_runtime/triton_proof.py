"""What can be known about a Triton launch without a GPU: it compiles, and what its machine code holds.

    code = machine_code(compile_launch(launch, "sm_90"), "sm_90")
    assert not complaints(code, "sm_90", matrix=True)

The code is the one users get: the same kernel, arguments, constants and options, specialised by the rules of Triton's
own JIT. What this cannot show: races between warps, the rounding of the matrix units, time.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsel.kernels._runtime.triton_launch import Launch, compiler_options

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Most shared memory of one program. A program on sm_80 may have 163 KB, but its table also serves sm_86, sm_89 and
# sm_12x, where 99 KB is the most.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# What a matrix product of 16-bit inputs has to become.
MATRIX_OPCODE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32"}
TYPE_NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
# NVIDIA's:  /*0280*/   @!P0 LDGSTS.E.BYPASS.128 [R5], desc[UR14][R6.64] ;    AMD's, after a tab:  s_cbranch_scc1 .L4
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*)|^\t([a-z]\w*)(.*)")
LABEL = re.compile(r"^(\.L\w+):")
JUMP = re.compile(r"(BRA|s_cbranch_\w+|s_branch)(\.|$)")
EXITS = ("EXIT", "s_endpgm")
# HFMA2.MMA is a register move; UTCBAR and UTCATOMSWS are bookkeeping: none of them is a matrix instruction.
MATRIX_OPCODES = re.compile(r"([HIQDB]G?MMA|UTC[A-Z]*MMA)(\.|$)|v_mfma_")


class Loop(NamedTuple):
    """Instructions start:stop of the listing form a loop."""

    start: int
    stop: int


class MachineCode(NamedTuple):
    """What the binary of one launch holds; counts are of instructions in the text, not of executions."""

    registers: int  # per thread
    stack_bytes: int  # per thread, with local memory and scratch
    local_accesses: int  # LDL, STL, scratch_load, scratch_store: registers that went to memory
    shared_bytes: int  # per program
    tensor_memory_columns: int  # per program (sm_100)
    num_warps: int
    opcodes: Counter[str]
    matrix: Counter[str]  # matrix instructions
    wide_loads: int  # of 16 bytes and more
    narrow_loads: int  # copies to shared memory of less than 16 bytes, and in matrix loops loads of less than 4
    atomics: int
    precisions: frozenset[str]  # input_precision of each tt.dot, as the compiler's own text names it
    listing: str  # disassembly


def instructions_and_loops(listing: str) -> tuple[list[str], list[Loop]]:
    """Opcodes in order up to the last exit, and the loops that jumps back close, in order of their ends.

    Behind the exit lie the retries of waits, which jump back into the middle of the program and close no loop.
    """
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    loops: list[Loop] = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif found := INSTRUCTION.match(line):
            opcode, operands = (found[1], found[2]) if found[1] else (found[3], found[4])
            target = re.search(r"\.L\w+", operands)
            opcodes.append(opcode)
            if JUMP.match(opcode) and target and target[0] in labels:
                loops.append(Loop(labels[target[0]], len(opcodes)))
    end = max(i for i, opcode in enumerate(opcodes) if opcode in EXITS)
    return opcodes[: end + 1], [loop for loop in loops if loop.stop <= end]


def matrix_loops(opcodes: list[str], loops: list[Loop]) -> tuple[list[Loop], Loop | None]:
    """The innermost loops that hold matrix instructions, in the order of the listing, and the longest around them."""
    holding = [loop for loop in loops if any(map(MATRIX_OPCODES.match, opcodes[loop.start : loop.stop]))]
    innermost = [
        loop
        for loop in holding
        if not any(o != loop and o.start >= loop.start and o.stop <= loop.stop for o in holding)
    ]
    return sorted(innermost), max(holding, key=lambda loop: loop.stop - loop.start, default=None)


def signature(launch: Launch, target: GPUTarget) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, constants and hints of a launch, by the rules that Triton's JIT applies to its arguments."""
    types: dict[str, str] = {}
    constants = dict(launch.constants)
    hints: dict[tuple[int, ...], Any] = {}
    for position, name in enumerate(launch.kernel.arg_names):
        value, hint = launch.arguments.get(name), []
        if name in constants:
            types[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + TYPE_NAMES[value.dtype]
            if value.data_ptr() % 16 == 0:
                hint.append(["tt.divisibility", 16])
            if target.backend == "hip" and value.untyped_storage().size() < 2**31:
                hint.append(["tt.pointer_range", 32])
        elif isinstance(value, float):
            types[name] = "fp32"
        elif value is None or value == 1:  # the JIT turns None and 1 into constants
            types[name], constants[name] = "constexpr", value
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                hint.append(["tt.divisibility", 16])
        if hint:
            hints[(position,)] = hint
    return types, constants, hints


def compile_launch(launch: Launch, architecture: str, **more_options: Any) -> Any:
    """Compile a launch for an architecture that need not be here; returns Triton's compiled kernel.

    Raises:
        ValueError: an option that the compiler does not know (it would ignore it).
    """
    target = TARGETS[architecture]
    options = compiler_options(launch) | more_options
    known = vars(triton.compiler.make_backend(target).parse_options(dict(options)))
    if unknown := options.keys() - known.keys():
        raise ValueError(f"the compiler does not know the options {sorted(unknown)}")
    return triton.compile(ASTSource(launch.kernel, *signature(launch, target)), target=target, options=options)


def machine_code(compiled: Any, architecture: str) -> MachineCode:
    """Read the binary of a compiled kernel."""
    precisions = frozenset(re.findall(r"tt\.dot [^\n]*inputPrecision = (\w+)", compiled.asm["ttir"]))
    if "tt.dot " in compiled.asm["ttir"] and not precisions:
        precisions = frozenset({"ieee"})  # the text leaves the default out
    common = {
        "shared_bytes": compiled.metadata.shared,
        "tensor_memory_columns": getattr(compiled.metadata, "tmem_size", 0) or 0,
        "num_warps": compiled.metadata.num_warps,
        "precisions": precisions,
    }
    if architecture == "gfx942":
        return _read_amd(compiled.asm["amdgcn"], common)
    return _read_nvidia(compiled.asm["cubin"], common)


def _read_nvidia(cubin: bytes, common: dict[str, Any]) -> MachineCode:
    usage = _disassemble(triton.knobs.nvidia.cuobjdump, "-res-usage", cubin)
    registers, stack, local = (int(_first(rf"\b{key}:(\d+)", usage)) for key in ("REG", "STACK", "LOCAL"))
    return _count(
        _disassemble(triton.knobs.nvidia.nvdisasm, "-c", cubin),
        common | {"registers": registers, "stack_bytes": stack + local},
        local=r"(LDL|STL)(\.|$)",
        wide=r"(LDGSTS|LDG)\..*128|UTMALDG|UBLKCP",
        narrow_copy=r"LDGSTS(?!\..*128)",
        narrow_load=r"LDG\..*[US](8|16)(\.|$)",
        atomic=r"(ATOM|ATOMG|RED|REDG)(\.|$)",
    )


def _read_amd(assembly: str, common: dict[str, Any]) -> MachineCode:
    registers = int(_first(r"\.vgpr_count:\s+(\d+)", assembly))
    stack_bytes = int(_first(r"\.private_segment_fixed_size:\s+(\d+)", assembly))
    return _count(
        assembly,
        common | {"registers": registers, "stack_bytes": stack_bytes},
        local=r"scratch_(load|store)",
        wide=r"(global|buffer)_load_(lds_)?dwordx4",
        narrow_copy=r"(global|buffer)_load_lds_(dword$|ushort|ubyte)",
        narrow_load=r"(global|buffer)_load_(ushort|short|ubyte|sbyte)",
        atomic=r"(global|buffer|flat)_atomic",
    )


def _count(
    listing: str, known: dict[str, Any], *, local: str, wide: str, narrow_copy: str, narrow_load: str, atomic: str
) -> MachineCode:
    opcodes, loops = instructions_and_loops(listing)
    inner, _ = matrix_loops(opcodes, loops)
    in_loops = [opcode for loop in inner for opcode in opcodes[loop.start : loop.stop]]

    def count(pattern: str, among: list[str] = opcodes) -> int:
        return sum(re.match(pattern, opcode) is not None for opcode in among)

    return MachineCode(
        local_accesses=count(local),
        opcodes=Counter(opcodes),
        matrix=Counter(opcode for opcode in opcodes if MATRIX_OPCODES.match(opcode)),
        wide_loads=count(wide),
        narrow_loads=count(narrow_copy) + count(narrow_load, in_loops),
        atomics=count(atomic),
        listing=listing,
        **known,
    )


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the disassembler's report has no {pattern!r}; its format has changed")
    return found[1]


def _disassemble(tool: Any, flag: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool.path, flag, file.name], check=True, capture_output=True, text=True).stdout


def complaints(code: MachineCode, architecture: str, *, matrix: bool = True, sixteen_bit: bool = True) -> Iterator[str]:
    """What is wrong with the machine code; nothing when all is well.

    Args:
        code: what machine_code read.
        architecture: what it was compiled for.
        matrix: the kernel is made of matrix products (else their instructions and wide loads are not asked for).
        sixteen_bit: its inputs have 16 bits, so that the products must run on that matrix instruction.
    """
    if code.stack_bytes or code.local_accesses:
        yield f"spills: {code.stack_bytes} bytes of stack, {code.local_accesses} local accesses"
    if code.shared_bytes > SHARED_LIMIT[architecture]:
        yield f"shared memory: {code.shared_bytes} bytes of {SHARED_LIMIT[architecture]}"
    if code.atomics:
        yield f"atomics: {code.atomics}"
    if programs_per_multiprocessor(code, architecture) == 0:
        yield "occupancy: not one program fits on a multiprocessor"
    if not matrix:
        return
    if not code.matrix:
        yield "matrix instructions: none"
    elif sixteen_bit and not any(opcode.startswith(MATRIX_OPCODE[architecture]) for opcode in code.matrix):
        yield f"matrix instructions: {', '.join(code.matrix)}, expected {MATRIX_OPCODE[architecture]}"
    if not code.wide_loads or code.narrow_loads:
        yield f"narrow loads: {code.narrow_loads}, of 16 bytes: {code.wide_loads}"


def code_of(launch: Launch, architecture: str, **more_options: Any) -> MachineCode:
    """The machine code of a launch."""
    return machine_code(compile_launch(launch, architecture, **more_options), architecture)


def assert_sound(launch: Launch, architecture: str, *, allowed: Sequence[str] = ()) -> MachineCode:
    """The machine code of a launch, after checking it: no complaint but those that begin with an allowed text, and
    products of the precision that the constant PRECISION names (a kernel without that constant holds none).
    """
    code = code_of(launch, architecture)
    sixteen_bit = next(x for x in launch.arguments.values() if isinstance(x, torch.Tensor)).element_size() == 2
    is_matrix = "PRECISION" in launch.constants
    found = list(complaints(code, architecture, matrix=is_matrix, sixteen_bit=sixteen_bit))
    assert [text for text in found if not text.startswith(tuple(allowed) or "\0")] == []
    assert code.precisions == ({launch.constants["PRECISION"]} if is_matrix else set())
    return code


def programs_per_multiprocessor(code: MachineCode, architecture: str) -> int:
    """How many programs are resident on one multiprocessor (compute unit) at a time."""
    if architecture == "gfx942":
        # Four units of 512 registers a lane and up to 8 waves each, 64 KB of shared memory.
        waves = 4 * min(8, 512 // max(8, code.registers))
        return min(waves // code.num_warps, 64 * 1024 // max(1, code.shared_bytes))
    shared_total = {"sm_80": 164, "sm_90": 228, "sm_100": 228}[architecture] * 1024
    registers_of_warp = -(-code.registers * 32 // 256) * 256  # handed out in units of 256
    return min(
        65536 // (registers_of_warp * code.num_warps),
        64 // code.num_warps,
        shared_total // (code.shared_bytes + 1024),  # 1 KB of each program is the system's
        512 // max(1, code.tensor_memory_columns),
    )
