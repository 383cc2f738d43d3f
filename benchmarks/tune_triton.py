"""Entries of the Triton kernels' launch tables by measured time, on the GPU that is here: python tune_triton.py

python tune_triton.py -o FILE.jsonl [--seconds S] [--processes P] [NAME ...]    cases with a NAME in them
python tune_triton.py --check sm_90 [--processes P] [NAME ...]                  needs no GPU: compiles, prints registers

Cases and inputs are those of triton_rows.py, timing is that of measure_triton.py, cases in the order of what they may
gain; launch_candidates.py has the candidates. All are compiled ahead in other processes, and each must give what
today's entry gives. A table's entries of all variants are replaced: a case meets its candidates whatever the variant
that it has.
"""

import argparse
import json
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import measure_triton
import torch
import triton_rows
from launch_candidates import CANDIDATES, TUNED, Candidate
from triton_rows import Maker, Row

from fastsel.kernels._runtime.devices import triton_architecture
from fastsel.kernels._runtime.triton_launch import Launch, compiler_options
from fastsel.kernels._runtime.triton_proof import compile_launch, machine_code

COMPILE_SECONDS, TIMED_MS, SHOWN = 40, 20.0, 6
TOLERANCE = 0.01  # of the largest number: sums of another order, rounded to bfloat16 at the end


class Case(NamedTuple):
    """A row of triton_rows.py, the module whose table is tuned, its candidates, and the kernels that are timed."""

    label: str
    made: Callable[[Maker], Row]
    module: Any
    table: str
    candidates: list[Candidate]
    timed: list[str]


class Tried(dict[Any, Candidate]):
    """A launch table whose entries begin with the candidate's; `used` is the entry that was looked up last."""

    def __init__(self, table: dict[Any, Candidate], first: Candidate) -> None:
        super().__init__(table)
        self.first, self.used = first, first

    def __getitem__(self, key: Any) -> Candidate:
        self.used = (*self.first, *super().__getitem__(key)[len(self.first) :])
        return self.used


def cases() -> list[Case]:
    """The rows of triton_rows.py, and two with less to do, that launch_candidates.py names."""
    known = {(label, kind): made for label, kind, made in triton_rows.rows()}
    known["random_projection, rademacher, a quarter", "bfloat16"] = partial(
        triton_rows.projection_row,
        dtype=torch.bfloat16, kind="rademacher", coordinates=triton_rows.COORDINATES // 4,
    )  # fmt: skip
    known["facility_location, first pass of 25,000", "float32"] = partial(
        triton_rows.gains_row, dtype=torch.float32, n=25_000, m=25_000
    )
    found = []
    for start, wanted, module, table, of, kernels in TUNED:
        for (label, kind), made in known.items():
            if label.startswith(start) and kind == wanted and not label.endswith("exp_distance"):
                label = f"{label}, {kind}" + ("" if table == "LAUNCH_TABLE" else f", {table}")
                found.append(Case(label, made, module, table, CANDIDATES[of], kernels.split()))
    return found


def launches_of(case: Case, number: int, make: Maker) -> tuple[str, list[Launch]]:
    """The entry in words and the launches with candidate `number` of a case; -1: today's."""
    candidate = case.candidates[number] if number >= 0 else ()
    also: dict[str, Any] = {name: value for x in candidate if isinstance(x, dict) for name, value in x.items()}
    tried = Tried(getattr(case.module, case.table), tuple(x for x in candidate if not isinstance(x, dict)))
    with patch.multiple(case.module, **{case.table: tried, **also}):
        launches = case.made(make).launches
    return " ".join(map(str, (*tried.used, *(f"{name}={value}" for name, value in also.items())))), launches


def name_of(launch: Launch) -> str:
    return str(launch.kernel.fn.__name__)


def compile_candidate(job: tuple[int, int, str, bool]) -> dict[str, Any]:
    """Fill Triton's cache with a candidate's kernels, or read their machine code; what went wrong is "error"."""
    index, number, architecture, is_read = job
    case, found = cases()[index], dict[str, Any]()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(COMPILE_SECONDS)
    try:
        found["entry"], launches = launches_of(case, number, Maker("meta", architecture))
        for launch in launches:
            if is_read and name_of(launch) == case.timed[0]:
                code = machine_code(compile_launch(launch, architecture), architecture)
                found |= {"registers": code.registers, "shared": code.shared_bytes, "spills": code.local_accesses}
                found |= {"matrix": sorted(code.matrix)}
            elif not is_read:
                _compiled(launch)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {str(error)[-300:]}"
    finally:
        signal.alarm(0)
    return found


def _compiled(launch: Launch) -> Any:
    return launch.kernel.warmup(**launch.arguments, **launch.constants, **compiler_options(launch), grid=launch.grid)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"compiles for more than {COMPILE_SECONDS} s")


def results_of(launches: list[Launch]) -> torch.Tensor:
    """What the launches wrote that no entry changes, as one float64 vector."""
    found = []
    for launch in launches:
        name, given = name_of(launch), launch.arguments
        if name in ("gains_kernel", "dots_kernel"):
            found.append(given["partial_ptr" if name == "gains_kernel" else "out_ptr"].double().sum(0))
        elif name == "gradients_kernel":
            found.append(given["norms_ptr"].double().sum(1))
        elif name in ("nearest_kernel", "tree_attention_kernel", "sum_kernel"):
            found.append(given["out_ptr"].double())
        elif name in ("decide_kernel", "merge_kernel"):
            names = ("values_ptr", "nll_ptr", "entropy_ptr", "top2_ptr")
            found += [given[x].double() for x in names if given.get(x) is not None]
    return torch.cat([x.flatten() for x in found])


def measured(
    case: Case, number: int, make: Maker, flushed: torch.Tensor, expected: list[torch.Tensor]
) -> dict[str, Any]:
    """The line of a candidate; the first one's results are what is expected of the others."""
    torch.manual_seed(0)  # the same tensors for each
    entry, launches = launches_of(case, number, make)
    found: dict[str, Any] = {"entry": entry}
    measure_triton.run_all(launches)
    results = results_of(launches)
    if not expected:
        expected.append(results)
    largest = float((results - expected[0]).abs().max() / expected[0].abs().max())
    if not largest <= TOLERANCE:
        found["error"] = f"WRONG by {largest:.1e} of the largest number"
    timed = [launch for launch in launches if name_of(launch) in case.timed]
    found["us"] = 1e3 * measure_triton.milliseconds(partial(measure_triton.run_all, timed), flushed, TIMED_MS)
    compiled = _compiled(timed[0])  # this process has it
    found |= {"registers": getattr(compiled, "n_regs", None), "spills": getattr(compiled, "n_spills", None)}
    found["shared"] = compiled.metadata.shared
    return found


def tune(chosen: list[int], output: Path, seconds: float, processes: int) -> None:
    """One case after another, its candidates as they are compiled; what comes after `seconds` is left out."""
    stop = time.perf_counter() + seconds
    architecture = triton_architecture(torch.empty(0, device="cuda"))
    make = Maker("cuda", architecture)
    flushed = torch.empty(measure_triton.FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    with get_context("spawn").Pool(processes) as workers, output.open("a") as file:
        compiling = {
            index: {
                number: workers.apply_async(compile_candidate, ((index, number, architecture, False),))
                for number in range(-1, len(cases()[index].candidates))
            }
            for index in chosen
        }
        for index in chosen:
            case, expected, lines = cases()[index], list[torch.Tensor](), []
            for number, found in _as_compiled(compiling[index], stop):
                if "error" not in found:
                    try:
                        found = measured(case, number, make, flushed, expected)
                    except Exception as error:  # a candidate that does not run is a line too
                        found["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                lines.append({"case": case.label, "today": number < 0} | found)
                file.write(json.dumps(lines[-1]) + "\n")
                file.flush()
            print(table_of(case, lines), flush=True)
            del expected
            torch.cuda.empty_cache()


def _as_compiled(waiting: dict[int, Any], stop: float) -> Iterator[tuple[int, dict[str, Any]]]:
    """Today's entry, then the others of a case as they are ready; none after the time to stop, none that hangs."""
    progress = time.perf_counter()
    while waiting and time.perf_counter() < min(stop, progress + 1.5 * COMPILE_SECONDS):
        number = next((n for n, job in waiting.items() if job.ready()), None)
        if number is None or (-1 in waiting and number >= 0):
            time.sleep(0.02)
            continue
        yield number, waiting.pop(number).get()
        progress = time.perf_counter()
    yield from ((number, {"error": "not compiled, or no time left"}) for number in waiting)


def table_of(case: Case, lines: list[dict[str, Any]]) -> str:
    """Two lines: today's entry with what went wrong in others, and the best ones."""
    good = sorted((line for line in lines if "us" in line and "error" not in line), key=lambda line: float(line["us"]))
    wrong = sum("WRONG" in line.get("error", "") for line in lines)
    failed = sum("error" in line for line in lines) - wrong
    words = [
        f"{line['us']:,.0f}: {line['entry']}" + (f" ({line['spills']} spilled)" if line["spills"] else "")
        for line in good[:SHOWN]
    ]
    today = [f"{line['us']:,.0f} us: {line['entry']}" for line in good if line["today"]] or [
        str(lines[0].get("error"))[:150]
    ]
    return f"{case.label}: {len(good)} timed, {failed} failed, {wrong} wrong; today {today[0]}\n  " + " | ".join(words)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--check", metavar="ARCHITECTURE")
    parser.add_argument("--seconds", type=float, default=140.0)
    parser.add_argument("--processes", type=int, default=14)
    given = parser.parse_args()
    every = cases()
    chosen = [i for i, case in enumerate(every) if not given.names or any(name in case.label for name in given.names)]
    if not given.check:
        tune(chosen, given.output, given.seconds, given.processes)
        return
    jobs = [(i, number, given.check, True) for i in chosen for number in range(-1, len(every[i].candidates))]
    with get_context("spawn").Pool(given.processes) as workers:
        for (i, *_), found in zip(jobs, workers.imap(compile_candidate, jobs), strict=True):
            print(every[i].label, found, flush=True)


if __name__ == "__main__":
    main()
