"""Maps kernels/ to fastsel.kernels and compiles kernels/*/cpu_native.cpp into one library of plain C functions.

Each .cpp is compiled once per instruction set (FASTSEL_ISA becomes the suffix of its exported functions); which one
runs is decided when the library is loaded. Nothing here needs torch, so an isolated build works and no torch
version has to match afterwards. Without a compiler the install succeeds and "native" refuses with a reason.
"""

import hashlib
import os
import platform
import shlex
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

COMMON_FLAGS = [
    "-std=c++17", "-O3", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti",
    "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wno-psabi",
]  # fmt: skip
X86_INSTRUCTION_SETS = {
    "plain": ["-march=x86-64"],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512vnni": ["-march=x86-64-v4", "-mavx512vnni"],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = X86_INSTRUCTION_SETS if IS_X86 else {"plain": []}


def sources_hash() -> str:
    """Names the C++ that a library is built from; kernels/_runtime/native.py asks the library for it."""
    digest = hashlib.sha256()
    for path in [
        *sorted(Path("kernels").glob("*/cpu_native.cpp")),
        *sorted(Path("kernels").glob("*/*.h")),
        *sorted(Path("kernels/_runtime/native").glob("*.h")),
    ]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


class BuildNative(build_ext):
    """Compiles every source for every instruction set and links the objects into one shared library."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python ABI tag: ctypes loads it, any Python will do

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # there is no PyInit function

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # What an earlier build left must not be shipped when this one finds no compiler.
        target.unlink(missing_ok=True)
        # Objects lie in a folder of their own, so that two builds in one checkout do not link each other's halves.
        with tempfile.TemporaryDirectory() as objects_folder, ThreadPoolExecutor(os.cpu_count()) as workers:

            def compile_one(job: tuple[str, str]) -> list[str]:
                source, name = job
                objects: list[str] = self.compiler.compile(
                    [source],
                    output_dir=os.path.join(objects_folder, name),
                    include_dirs=["kernels/_runtime/native"],
                    macros=[("FASTSEL_ISA", name)],
                    extra_postargs=COMMON_FLAGS
                    + INSTRUCTION_SETS[name]
                    + shlex.split(os.environ.get("FASTSEL_CXXFLAGS", "")),
                    depends=ext.depends,
                )
                return objects

            jobs = [(source, name) for source in ext.sources for name in INSTRUCTION_SETS]
            objects = [path for paths in workers.map(compile_one, jobs) for path in paths]
            stamp = Path(objects_folder, "stamp.cpp")
            visible = '__attribute__((visibility("default"))) extern const char fastsel_sources[]'
            stamp.write_text(f'extern "C" {{ {visible}; const char fastsel_sources[] = "{sources_hash()}"; }}\n')
            objects += self.compiler.compile([str(stamp)], output_dir="/", extra_postargs=["-fPIC"])
            self.compiler.link_shared_object(objects, str(target), extra_postargs=["-fopenmp"], target_lang="c++")

    def copy_extensions_to_source(self) -> None:
        """For --inplace and editable installs: kernels/ is not where the dotted name says it is."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            if built.exists():
                # Copied aside and renamed: a process that has the old library mapped keeps it whole.
                with tempfile.TemporaryDirectory(dir="kernels/_runtime") as folder:
                    part = Path(folder) / built.name
                    self.copy_file(str(built), str(part))
                    part.replace(Path("kernels/_runtime") / built.name)


class PythonIndependentWheel(bdist_wheel):
    """The library is bound by ctypes: one wheel serves every Python of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


sources = sorted(str(path) for path in Path(".").glob("kernels/*/cpu_native.cpp"))
setup(
    package_dir={"fastsel.kernels": "kernels"},
    packages=find_packages(include=["fastsel*"])
    + ["fastsel.kernels"]
    + ["fastsel.kernels." + name for name in find_packages("kernels")],
    ext_modules=[
        Extension(
            "fastsel.kernels._runtime._native",
            sources,
            depends=sorted(
                str(path) for pattern in ("*/*.h", "_runtime/native/*.h") for path in Path("kernels").glob(pattern)
            ),
            optional=True,
        )
    ]
    if sources
    else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PythonIndependentWheel},
)
