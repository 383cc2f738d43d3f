"""Append the latest benchmark run to history.csv: python benchmarks/record.py [FILE.json ...] [--note TEXT].

Rows are never edited. A number in the README or in docs/measured.md names its row.
"""

import argparse
import csv
import json
from pathlib import Path

HERE = Path(__file__).parent
HISTORY = HERE / "history.csv"
COLUMNS = (
    "row", "date", "commit", "machine", "threads", "load", "op", "case", "peer", "ratio", "ratio_cpu", "rounds",
    "our_s", "peer_s", "our_cpu_s", "peer_cpu_s", "our_peak_bytes", "peer_peak_bytes", "note",
)  # fmt: skip


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


def latest_run() -> Path:
    """The newest file that --benchmark-autosave wrote."""
    files = sorted((HERE.parent / ".benchmarks").rglob("*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise SystemExit("no run to record: pytest benchmarks/bench_<what>.py --benchmark-autosave")
    return files[-1]


def rows(run: dict, first: int, note: str) -> list[dict]:
    """One row for each benchmark that says what it measures; those without a peer leave its columns empty."""
    commit, cpu = run["commit_info"], run["machine_info"]["cpu"]
    found = []
    for benchmark in run["benchmarks"]:
        info, ours = dict(benchmark["extra_info"]), benchmark["stats"]["median"]
        if "op" not in info:
            continue
        for peer in info.pop("peers", [{}]):
            row = info | peer
            text = [row.get("note", ""), *(f"{key} {_short(row[key])}" for key in row if key not in COLUMNS), note]
            row |= {
                "row": first + len(found),
                "date": run["datetime"][:16],
                "commit": str(commit.get("id", "unknown"))[:9] + ("+" if commit.get("dirty") else ""),
                "machine": f"{cpu.get('brand_raw', 'unknown')} x{cpu.get('count', '?')}",
                "rounds": benchmark["stats"]["rounds"],
                "our_s": ours,
                "note": "; ".join(filter(None, text)),
            }
            if "peer_s" in row:
                row["ratio"] = row["peer_s"] / ours
                row["ratio_cpu"] = row["peer_cpu_s"] / row["our_cpu_s"]
            found.append({key: _short(row[key]) for key in COLUMNS if key in row})
    return found


def main() -> None:
    """Read the runs, append their rows, say which."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="JSON of pytest-benchmark; the newest autosave by default")
    parser.add_argument("--note", default="", help="what a reader must know, such as what else was running")
    arguments = parser.parse_args()
    history = HISTORY.read_text().splitlines() if HISTORY.exists() else []
    written = max(0, len(history) - 1)
    with HISTORY.open("a", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not history:
            table.writeheader()
        for path in arguments.files or [latest_run()]:
            for row in rows(json.loads(path.read_text()), written + 1, arguments.note):
                table.writerow(row)
                written += 1
                peer = f" / {row['peer']}: {row['ratio']} times as fast" if "peer" in row else ""
                print(f"row {row['row']}: {row['op']} / {row['case']}{peer}")


if __name__ == "__main__":
    main()
