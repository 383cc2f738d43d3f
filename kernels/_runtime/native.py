"""The compiled library of plain C functions, bound by ctypes; or the reason why there is none.

Every exported function ends in the instruction set it was compiled for. The set is chosen once, from what this
processor reports; FASTSEL_ISA names a lesser one (for tests and for timing).
"""

import ctypes
import hashlib
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch  # before the library: its libgomp.so.1 is then the one that the library's OpenMP calls resolve to

LIBRARY = Path(__file__).with_name("_native.so")
KERNELS = Path(__file__).parents[1]
logger = logging.getLogger("fastsel.kernels")
INSTRUCTION_SETS = {  # from the least to the most; flags as Linux names them
    "plain": frozenset[str](),
    "avx2": frozenset({"avx2", "fma", "bmi2", "f16c", "movbe", "abm"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    "avx512vnni": frozenset({"avx512_vnni"}),
}
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


# A forked child inherits libgomp's record of a thread pool, but not the threads: a parallel region would wait for
# them for ever. One thread needs no pool.
os.register_at_fork(after_in_child=_note_fork)


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in text.splitlines() if line.startswith("flags")), "").split())


@cache
def instruction_set() -> str:
    """The most capable instruction set that this processor has, or the one FASTSEL_ISA names."""
    usable, needed = [], set[str]()
    for name, flags in INSTRUCTION_SETS.items():
        needed |= flags
        if needed <= _cpu_flags():
            usable.append(name)
    wanted = os.environ.get("FASTSEL_ISA")
    if wanted is None:
        return usable[-1]
    if wanted not in usable:
        raise ValueError(f"FASTSEL_ISA={wanted} cannot run here; this processor has: {', '.join(usable)}")
    return wanted


@cache
def _library() -> ctypes.CDLL | str:
    if not LIBRARY.exists():
        return (
            "the compiled library is missing (no C++ compiler when fastsel was installed); "
            "install g++ and reinstall fastsel, or run `python setup.py build_ext --inplace` in a checkout"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"the compiled library does not load: {error}"
    if _built_from(library) != _sources_hash():
        # Its functions may take other arguments than these files hand over: that would crash, not fail.
        reason = "the compiled library is of other C++ than lies here; run `python setup.py build_ext --inplace`"
        logger.warning("%s (slower code runs until then)", reason)
        return reason
    return library


def _sources_hash() -> str:
    """As setup.py computes it, of the C++ that is installed beside this file."""
    digest = hashlib.sha256()
    patterns = ("*/cpu_native.cpp", "*/*.h", "_runtime/native/*.h")
    for path in (path for pattern in patterns for path in sorted(KERNELS.glob(pattern))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _built_from(library: ctypes.CDLL) -> str:
    try:
        return (ctypes.c_char * 64).in_dll(library, "fastsel_sources").raw.decode()
    except ValueError:
        return "nothing that it names"


def unavailable() -> str | None:
    """Why no native kernel can run here, or None."""
    library = _library()
    return library if isinstance(library, str) else None


@cache
def function(name: str, *argtypes: Any) -> Any:
    """The C function `name`, compiled for this processor's instruction set; it returns nothing."""
    library = _library()
    assert not isinstance(library, str), library
    bound = getattr(library, f"{name}_{instruction_set()}")
    bound.argtypes, bound.restype = argtypes, None
    return bound


def num_threads() -> int:
    """Threads for a parallel region: torch's own number, 1 in a forked child."""
    return 1 if _forked else torch.get_num_threads()
