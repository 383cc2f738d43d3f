"""Every kernel against its reference in float64, on the user's own device: error, time, and how near the machine's
limits. The limits are measured first, on the same device: a matrix product, and a copy.
"""

import importlib
import importlib.util
import logging
import pkgutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch

import fastsel.kernels
from fastsel.kernels._runtime.dispatch import BY_NAME_ONLY, refusal
from fastsel.kernels._runtime.testing import assert_as_exact
from fastsel.progress import progress_bar

# Above these a case is left to slow=True: the float64 reference would take minutes or gigabytes.
_FLOPS_LIMIT = {"cpu": 3e10, "cuda": 2e12}
_BYTES_LIMIT = {"cpu": 2e8, "cuda": 4e9}
_FLOPS_THAT_COUNT = 1e8  # below this, the time is the call's and not the kernel's
_REPEATS = 5
_LONGEST_REDUCTION = 4096  # features or keys; it sets the floor of the tolerance
logger = logging.getLogger("fastsel")


@dataclass(frozen=True)
class CheckFinding:
    """One case of one kernel, run by one implementation.

    Attributes:
        kernel, implementation, case, dtype: what ran.
        error: largest difference from the float64 reference; NaN where the kernel failed.
        problem: None when it is within the tolerance; else what is wrong.
        milliseconds: median of five runs; 0 where the kernel failed.
        gflops: floating-point operations a second, in thousand millions; None where the case is too small to tell.
        roofline_share: time that the arithmetic and the memory need at least, over the time taken; None likewise.
    """

    kernel: str
    implementation: str
    case: str
    dtype: str
    error: float
    problem: str | None
    milliseconds: float
    gflops: float | None = None
    roofline_share: float | None = None


@dataclass(frozen=True)
class KernelFinding:
    """Which implementation of one kernel runs on a device.

    Attributes:
        kernel: its name.
        chosen: what "auto" takes, or None.
        also: what could run too, by name.
        refusals: implementation -> why it cannot run.
    """

    kernel: str
    chosen: str | None
    also: list[str]
    refusals: dict[str, str]


def kernel_names() -> list[str]:
    """The folders of fastsel.kernels that hold an operation."""
    found = [module.name for module in pkgutil.iter_modules(fastsel.kernels.__path__) if module.ispkg]
    return [name for name in sorted(found) if importlib.util.find_spec(f"fastsel.kernels.{name}.cases") is not None]


def who_runs(kernel: str, device: torch.device) -> KernelFinding:
    """Ask each implementation whether it takes a small float32 input; nothing is computed."""
    cases = _part(kernel, "cases")
    inputs = cases.make_inputs(cases.CASES["tiny"], torch.float32, device)
    accepting, refusals = [], {}
    for name, module in _part(kernel, "api").IMPLEMENTATIONS.items():
        reason, _ = refusal(name, module, inputs)
        if reason is not None:
            refusals[name] = reason
        else:
            accepting.append(name)
    chosen = next((name for name in accepting if name not in BY_NAME_ONLY), None)
    return KernelFinding(kernel, chosen, [name for name in accepting if name != chosen], refusals)


def check_kernels(
    kernels: list[str], device: torch.device, *, slow: bool = False, progress: str = "auto"
) -> tuple[list[CheckFinding], dict[str, float]]:
    """Run every case of these kernels by every implementation that takes it.

    Args:
        kernels: names from kernel_names().
        device: where.
        slow: the large cases too.
        progress: see fastsel.progress.

    Returns:
        One finding a run, and the device's measured rates by name.
    """
    dtypes = [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16, torch.float16]
    rates = {f"{_short(dtype)} GEMM GFLOP/s": _gemm_gflops(dtype, device) for dtype in dtypes}
    rates["copy GB/s"] = _copy_gb_s(device)
    runs: list[tuple[CheckFinding, float, float]] = []
    jobs = [job for name in kernels for job in _jobs(name, dtypes, device, slow)]
    with progress_bar(len(jobs), unit="cases", mode=progress, description="checking kernels") as bar:
        for kernel, case, dtype in jobs:
            flops, n_bytes = _part(kernel, "cases").cost(case)
            runs += [
                (finding, flops, n_bytes * dtype.itemsize / 4) for finding in _check_case(kernel, case, dtype, device)
            ]
            if flops >= _FLOPS_THAT_COUNT:
                # Beside a busy neighbour the first measurement may be far below what the machine can do.
                gemm = f"{_short(dtype)} GEMM GFLOP/s"
                rates[gemm] = max(rates[gemm], _gemm_gflops(dtype, device))
            bar.update(1)
    return [_against_roofline(*run, rates) for run in runs], rates


def _against_roofline(finding: CheckFinding, flops: float, n_bytes: float, rates: dict[str, float]) -> CheckFinding:
    if flops < _FLOPS_THAT_COUNT or finding.milliseconds == 0:
        return finding
    seconds = finding.milliseconds / 1e3
    least = max(flops / 1e9 / rates[f"{finding.dtype} GEMM GFLOP/s"], n_bytes / 1e9 / rates["copy GB/s"])
    return replace(finding, gflops=flops / seconds / 1e9, roofline_share=least / seconds)


def _part(kernel: str, name: str) -> Any:
    return importlib.import_module(f"fastsel.kernels.{kernel}.{name}")


def _jobs(
    kernel: str, dtypes: list[torch.dtype], device: torch.device, slow: bool
) -> Iterator[tuple[str, Any, torch.dtype]]:
    cases = _part(kernel, "cases")
    for case in cases.CASES.values():
        flops, n_bytes = cases.cost(case)
        if slow or (flops <= _FLOPS_LIMIT[device.type] and n_bytes <= _BYTES_LIMIT[device.type]):
            for dtype in dtypes:
                yield kernel, case, dtype


@torch.inference_mode()
def _check_case(kernel: str, case: Any, dtype: torch.dtype, device: torch.device) -> Iterator[CheckFinding]:
    cases, implementations = _part(kernel, "cases"), _part(kernel, "api").IMPLEMENTATIONS
    inputs = cases.make_inputs(case, dtype, device)
    reference = _part(kernel, "reference").compute
    exact_inputs = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    try:
        truth, plain = reference(*exact_inputs), reference(*_copied(inputs))
    except torch.cuda.OutOfMemoryError:  # all logits, or a whole matrix of signs, in float64
        logger.warning("%s %s: its reference does not fit into the memory of %s", kernel, case.name, device)
        torch.cuda.empty_cache()
        return
    for name, path in implementations.items():
        if name in BY_NAME_ONLY:
            continue
        reason, module = refusal(name, path, inputs)
        if module is None:
            logger.debug("%s %s %s %s: %s", kernel, name, case.name, dtype, reason)
            continue
        compute = partial(module.compute, *_copied(inputs))
        seconds = 0.0
        try:
            error, problem = compare(module.compute(*_copied(inputs)), truth, plain, dtype)
            seconds = median(_times(compute, device))
        except Exception as failure:  # the finding that a report needs most: the kernel does not run here
            error, problem = float("nan"), f"{type(failure).__name__}: {failure}"
        yield CheckFinding(kernel, name, case.name, _short(dtype), error, problem, seconds * 1e3)


def _copied(inputs: tuple[Any, ...]) -> list[Any]:
    """Some operations add to an input."""
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]


def compare(got: Any, truth: Any, plain: Any, dtype: torch.dtype) -> tuple[float, str | None]:
    """Largest error over all outputs, and what is out of tolerance for inputs of this dtype."""
    largest, problem = 0.0, None
    for name, ours, exact, same_dtype in _outputs(got, truth, plain):
        if not ours.is_floating_point():  # an index may differ where two values tie to the last bit
            differing = int((ours != exact).sum())
            if differing > max(1, ours.numel() // 100):
                problem = f"{name}: {differing} of {ours.numel()} indices differ"
            continue
        finite = torch.isfinite(ours) & torch.isfinite(exact)
        if bool(finite.any()):
            largest = max(largest, (ours.double() - exact)[finite].abs().max().item())
        if same_dtype.dtype == torch.float64:  # sums in float64 of products that the inputs' dtype rounds
            same_dtype = same_dtype.to(dtype)
        try:
            assert_as_exact(ours, exact, same_dtype, reduction_length=_LONGEST_REDUCTION, what=name)
        except AssertionError as failure:
            problem = str(failure)
    return largest, problem


def _outputs(got: Any, truth: Any, plain: Any) -> Iterator[tuple[str, Any, Any, Any]]:
    if isinstance(got, torch.Tensor):
        yield "output", got, truth, plain
        return
    fields = got.items() if isinstance(got, dict) else enumerate(got)
    for key, value in fields:
        if isinstance(value, torch.Tensor):
            yield str(key), value, truth[key], plain[key]


def _times(compute: Callable[[], Any], device: torch.device) -> list[float]:
    """Seconds of five runs, or of those that fit into ten seconds; a first, uncounted one was made before."""
    taken: list[float] = []
    for _ in range(_REPEATS):
        _wait(device)
        started = time.perf_counter()
        compute()
        _wait(device)
        taken.append(time.perf_counter() - started)
        if sum(taken) > 10:
            break
    return taken


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gemm_gflops(dtype: torch.dtype, device: torch.device) -> float:
    size = 1024 if device.type == "cpu" else 4096
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    multiply = partial(torch.matmul, a, b)
    multiply()
    return 2 * size**3 / min(_times(multiply, device)) / 1e9  # the limit, so the best and not the median


def _copy_gb_s(device: torch.device) -> float:
    source = torch.zeros(2**24 if device.type == "cpu" else 2**27, device=device)
    target = torch.zeros_like(source)
    copy = partial(target.copy_, source)
    copy()
    return 2 * source.numel() * 4 / min(_times(copy, device)) / 1e9


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
