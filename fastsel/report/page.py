"""From the content to the page: one HTML file that needs no network and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsel import __version__
from fastsel.errors import UsageError
from fastsel.report.content import report_content
from fastsel.summary import number, random_text

if TYPE_CHECKING:
    from fastsel.selection import Selection

_ABOUT = {
    "ifd": (
        "IFD divides the answer's loss with the instruction by its loss without it. Low: the instruction nearly gives "
        "the answer away. Close to 1: the instruction hardly helps, so there is something to learn. Above 1: the "
        "instruction makes the answer less likely, often because the two do not belong together; those are kept out."
    ),
    "superfiltering": (
        "A small model stands in for the large one: the answer's perplexity with the instruction is divided by its "
        "perplexity without it. The nearer to 1, the less the instruction gives away; rows above 1 are kept out."
    ),
    "perplexity": "How surprised the model is by the answer, given the instruction. A baseline: noise ranks high too.",
    "length": "The longest answers. A baseline that is hard to beat.",
    "facility_location": (
        "Rows that stand for all others: each pick is the row that raises most what every row has as its most similar "
        "chosen row. Dense regions come first; the first picks are the most typical rows of the pool."
    ),
    "k_center": (
        "Each pick is the row farthest from all rows chosen before. No row is far from a chosen one; what is unlike "
        "everything, garbage included, is chosen early, so look at the first rows."
    ),
    "kmeans": "Rows from every cluster of the pool. A score is minus the squared distance to the cluster's centre.",
    "qdit": (
        "Rows that stand for many others and are good by the quality given: each pick adds most to the weighted sum. "
        "Scores are the quality alone, so that a row with a low score may be kept for what it stands for."
    ),
    "repr_filter": (
        "Best rows first, each kept unless it is too similar to one kept before. Rows above the last kept one that are "
        "not kept have a near-copy that is."
    ),
    "less": (
        "A score is the cosine of the step that Adam would take on a row with the gradients of the subtask that it "
        "serves best, over the checkpoints of a short LoRA run. High: training on the row moves the model as training "
        "on the target would."
    ),
    "g2is": (
        "Walks through the pool's gradients, one along each direction in which the target's gradients differ. A gain "
        "is the cosine with the pick before; no two rows of a walk have gradients that conflict."
    ),
    "cluster_ucb": (
        "Scores are LESS's at the last checkpoint, for the rows that a bandit drew from clusters of gradients; the "
        "others have none. A cluster whose rows scored high was drawn from more often."
    ),
    "in2core": (
        "How far one more step on a row would lower the target's loss, by DataInf's influence functions. Not a cosine: "
        "rows with large gradients, short and hard ones, score high."
    ),
    "bm25": "Rows that share rare words with the target's. A baseline without a model that is hard to beat.",
    "rds": "Rows nearest to a row of the target by what a language model makes of them; target rows take turns.",
    "random": "A uniform draw. What every other method has to beat.",
}


def write_report(selection: Selection, path: str | Path) -> Path:
    """Write the page and, beside it, the same content as JSON.

    Args:
        selection: a result with its pool (rows are shown with their texts).
        path: the HTML file, its folder made when missing; the JSON gets the same name with .json.

    Returns:
        The path of the page.

    Raises:
        UsageError: path ends in .json.
    """
    path = Path(path)
    if path.suffix == ".json":
        raise UsageError(f"{path} is where the JSON goes: name the page .html")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = report_content(selection)
    content["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    content["fastsel"] = __version__
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, default=str)
    path.write_text(render(json.loads(text)), encoding="utf-8")
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return path


def render(content: dict[str, Any]) -> str:
    """The page's HTML.

    Args:
        content: what report_content() returned, with "created" and "fastsel".
    """
    import jinja2
    from markupsafe import Markup

    files = resources.files("fastsel.report")
    script = files.joinpath("page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    environment.filters["percent"] = _percent
    environment.filters["seconds"] = _seconds
    environment.filters["plain"] = _plain
    template = environment.from_string(files.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        **content,
        random_text=random_text(content["summary"]),
        about=_ABOUT.get(content["summary"]["method"]),
        chart=content["histogram"] and _chart(content["histogram"]),
        style=Markup(files.joinpath("page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        # The page allows exactly this script, by its hash: text of a row cannot run even if escaping failed.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        sample_json=Markup(_script_safe(content["sample"])),
    )


def _script_safe(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _chart(histogram: dict[str, Any]) -> dict[str, Any]:
    """Geometry of the histogram: bars one unit wide and up to 100 high, the random draw's outline, ticks in percent."""
    start, stop = histogram["start"], histogram["stop"]
    bars = []
    totals = [sum(parts) for parts in zip(*(histogram[name] for name in ("kept", "dropped", "refused")), strict=True)]
    top = max(1, *totals)
    step = (stop - start) / len(totals)
    for i in range(len(totals)):
        y = 100.0
        for name in ("kept", "dropped", "refused"):
            height = 100 * histogram[name][i] / top
            if height:
                y -= height
                bars.append({"x": i, "y": round(y, 3), "height": round(height, 3), "name": name})
    heights = [round(100 - 100 * count / top, 3) for count in histogram["random"]]
    outline = "M0,100 " + " ".join(f"V{height} H{i + 1}" for i, height in enumerate(heights)) + " V100"
    hints = [
        f"{number(start + i * step)} to {number(start + (i + 1) * step)}: "
        + ", ".join(f"{histogram[name][i]:,} {name}" for name in ("kept", "dropped", "refused") if histogram[name][i])
        for i in range(len(totals))
    ]
    ticks = [
        {"at": round(100 * (tick - start) / (stop - start), 3), "text": number(tick)} for tick in _ticks(start, stop)
    ]
    cut = histogram["cut"]
    at = None if cut is None else round(min(100.0, max(0.0, 100 * (cut - start) / (stop - start))), 3)
    return {
        "bars": bars,
        "width": len(totals),
        "outline": outline,
        "hints": hints,
        "ticks": ticks,
        "cut": cut,
        "at": at,
        "top": top,
    }


def _ticks(start: float, stop: float) -> list[float]:
    """About five round numbers between start and stop."""
    rough = (stop - start) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(start / step)
    return [round(i * step, 12) for i in range(first, math.floor(stop / step) + 1)]


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{share:.0%}" if share == 0 or share >= 0.1 else f"{share:.1%}"


def _seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1000:.0f} ms"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _plain(value: Any) -> str:
    """A configured value as a person would write it; what is not set inside it is left out."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_plain(item)}" for name, item in value.items() if item is not None)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
