"""Measured times of the Triton kernels on the GPU that is here, beside their predictions and plain torch.

python measure_triton.py -o FILE.jsonl [--predictions FILE.json] [--seconds S] [NAME ...]    rows with a NAME in them
python measure_triton.py --predict FILE.json --chip H100                                     needs no GPU
python measure_triton.py --compile PROCESSES                                                 fills Triton's cache

Inputs are random; the second-level cache is emptied before each call; times are medians between device events. Ours is
the kernel's launches without the call's checks; torch is the obvious way of the same on the same tensors. The rows are
those of triton_rows.py.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from triton_rows import Maker, rows

from fastsel.kernels._runtime.devices import triton_architecture
from fastsel.kernels._runtime.triton_launch import Launch, compiler_options
from fastsel.kernels._runtime.triton_predict import CHIPS, Chip

FLUSHED_BYTES = 256 << 20  # written before each call: more than any second-level cache
LEAST_MS, MOST_REPEATS = 60.0, 40


def milliseconds(run: Callable[[], Any], flushed: torch.Tensor, least_ms: float = LEAST_MS) -> float:
    """Median between device events, the second-level cache emptied before each call."""
    run()
    taken: list[float] = []
    while not taken or (len(taken) < MOST_REPEATS and sum(taken) < least_ms):
        flushed.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return median(taken)


def ceilings() -> Iterator[tuple[str, float]]:
    """What the device reaches: matrix products of 8,192 x 8,192 x 8,192 in TFLOP/s, a copy of 4 GB in GB/s."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    for name, dtype, tf32 in (("bfloat16", torch.bfloat16, False), ("tf32", torch.float32, True),
                              ("float32", torch.float32, False)):  # fmt: skip
        a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        yield f"matrix product, {name}, TFLOP/s", 2 * 8192**3 / milliseconds(partial(torch.matmul, a, b), flushed) / 1e9
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    yield "copy, GB/s", 2 * source.nbytes / milliseconds(partial(target.copy_, source), flushed) / 1e6


def measure(wanted: list[str], output: Path, predictions: dict[str, list[float]], seconds: float) -> None:
    """Print and write one row after another; what fails is a row too, and what comes after `seconds` is left out."""
    started = time.perf_counter()
    make = Maker("cuda", _here())
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    with output.open("a") as file:

        def put(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        put({"device": torch.cuda.get_device_name(), "torch": torch.__version__})
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        for name, value in ceilings():
            put({"ceiling": name, "value": value})
            print(f"{name}: {value:,.1f}", flush=True)
        print("| case | dtype | predicted us | measured us | floor us | of floor | of predicted | torch us | times |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for label, kind, made in rows():
            if wanted and not any(name in label for name in wanted):
                continue
            if time.perf_counter() - started > seconds:
                put({"case": label, "dtype": kind, "error": "no time left"})
                continue
            found: dict[str, Any] = {"case": label, "dtype": kind}
            predicted, floor = predictions.get(f"{label}, {kind}", [float("nan")] * 2)
            found |= {"predicted_us": 1e6 * predicted, "floor_us": 1e6 * floor}
            row = None
            try:
                row = made(make)
                found["measured_us"] = 1e3 * milliseconds(partial(run_all, row.launches), flushed)
                if row.plain is not None:
                    found |= {"torch_us": 1e3 * milliseconds(row.plain, flushed) / row.share, "torch_share": row.share}
            except Exception as error:  # a kernel that does not run is what the table is for
                found["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            del row
            torch.cuda.empty_cache()
            put(found)
            print(_line(found), flush=True)


def run_all(launches: list[Launch]) -> None:
    """One launch after the other."""
    for launch in launches:
        launch.run()


def _line(row: dict[str, Any]) -> str:
    ours, plain = row.get("measured_us", float("nan")), row.get("torch_us", float("nan"))
    numbers = (
        f"{row['predicted_us']:,.0f} | {ours:,.0f} | {row['floor_us']:,.0f} | {ours / row['floor_us']:.2f} "
        f"| {ours / row['predicted_us']:.2f} | {plain:,.0f} | {plain / ours:.1f}"
    )
    return f"| {row['case']} | {row['dtype']} | {numbers} | {row.get('error', '')}"


def compile_row(index: int) -> str:
    """Compile the launches of a row, so that later processes find them in Triton's cache; what went wrong, or ""."""
    label, kind, made = list(rows())[index]
    try:
        for launch in made(Maker("meta", _here())).launches:
            options = compiler_options(launch)
            launch.kernel.warmup(**launch.arguments, **launch.constants, **options, grid=launch.grid)
    except Exception as error:
        return f"{label}, {kind}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def _here() -> str:
    return triton_architecture(torch.empty(0, device="cuda"))


def predict_all(chip: Chip) -> dict[str, list[float]]:
    """Label and dtype -> predicted seconds and floor."""
    found = {}
    for label, kind, made in rows():
        found[f"{label}, {kind}"] = list(made(Maker("meta", chip.architecture)).predict(chip))
        print(label, kind, found[f"{label}, {kind}"], flush=True)
    return found


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--predictions", type=Path)
    parser.add_argument("--predict", type=Path)
    parser.add_argument("--chip", choices=CHIPS, default="H100")
    parser.add_argument("--compile", type=int, metavar="PROCESSES")
    parser.add_argument("--seconds", type=float, default=100.0)
    given = parser.parse_args()
    if given.predict:
        given.predict.write_text(json.dumps(predict_all(CHIPS[given.chip]), indent=1) + "\n")
    elif given.compile:
        with ProcessPoolExecutor(given.compile, mp_context=get_context("spawn")) as workers:
            for problem in workers.map(compile_row, range(len(list(rows())))):
                if problem:
                    print(problem, flush=True)
    else:
        predictions = json.loads(given.predictions.read_text()) if given.predictions else {}
        measure(given.names, given.output, predictions, given.seconds)


if __name__ == "__main__":
    main()
