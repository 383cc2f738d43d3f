"""Draw how time and memory grow, from the rows of history.csv whose case begins with "growth": docs/growth.svg.

Prints the same numbers as a table for docs/growth.md.

python benchmarks/curves.py            # after record.py; needs matplotlib (the extra "report")

A row counts where it is the latest of its operation and case. Rows of one operation and kind (what the case says beside
n and k) are a curve where they share k and n differs, and where they share n and k differs; two points are the least.
"""

import csv
import re
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
PANELS = [("n", "our_s", "seconds"), ("k", "our_s", "seconds"), ("n", "our_peak_bytes", "MB above the data"),
          ("k", "our_peak_bytes", "MB above the data")]  # fmt: skip


def measured() -> dict[str, dict[tuple[int, int], dict[str, float]]]:
    """Kind -> (n, k) -> columns, of the latest row of each."""
    found: dict[str, dict[tuple[int, int], dict[str, float]]] = defaultdict(dict)
    with open(HERE / "history.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if not row["case"].startswith("growth"):
                continue
            sizes = {name: int(re.search(rf"\b{name}=([\d,]+\d)", row["case"])[1].replace(",", "")) for name in "nk"}
            rest = re.sub(r"\b[nkd]=[\d,]+\d", "", row["case"].removeprefix("growth"))
            kind = " ".join([row["op"].removeprefix("selectors.").removeprefix("select "), *re.findall(r"\w+", rest)])
            found[kind][sizes["n"], sizes["k"]] = {
                name: float(row[name]) for name in ("our_s", "our_peak_bytes", "row") if row[name]
            }
    return found


def curves(points: dict[tuple[int, int], dict[str, float]], along: str, column: str) -> list[tuple[str, list, list]]:
    """(what is fixed, sizes, values) of every line that these points make."""
    place = "nk".index(along)
    lines = defaultdict(list)
    for sizes, columns in points.items():
        if column in columns:
            lines[sizes[1 - place]].append((sizes[place], columns[column]))
    other = "kn"[place]
    return [
        (f"{other}={fixed:,}", *map(list, zip(*sorted(line), strict=True)))
        for fixed, line in sorted(lines.items())
        if len(line) > 1
    ]


def main() -> None:
    """Draw the four panels, print the table."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "fastsel", "font.size": 8}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    colours = {kind: f"C{i}" for i, kind in enumerate(sorted(measured()))}
    for axis, (along, column, unit) in zip(axes.flat, PANELS, strict=True):
        for kind, points in sorted(measured().items()):
            for fixed, sizes, values in curves(points, along, column):
                scaled = [value / 1e6 for value in values] if unit.startswith("MB") else values
                axis.plot(sizes, scaled, "o-", color=colours[kind], markersize=3, label=f"{kind}, {fixed}")
        axis.set(xscale="log", yscale="log", xlabel=along, ylabel=unit)
        axis.set_title(f"{unit.split()[0]} as {along} grows", fontsize=9)
        axis.grid(visible=True, which="both", alpha=0.2)
        axis.legend(fontsize=6)
    figure.savefig(HERE.parent / "docs" / "growth.svg", metadata={"Date": None})
    print("| what | n | k | seconds | MB | row |\n| --- | --- | --- | --- | --- | --- |")
    for kind, points in sorted(measured().items()):
        for (n, k), columns in sorted(points.items()):
            megabytes = columns["our_peak_bytes"] / 1e6
            print(f"| {kind} | {n:,} | {k:,} | {columns['our_s']:.3g} | {megabytes:.0f} | {columns['row']:.0f} |")


if __name__ == "__main__":
    main()
