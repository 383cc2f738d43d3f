"""One run from a resolved configuration: open the pool, compute, choose, write. What `fastsel select` calls."""

import dataclasses
import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsel import __version__
from fastsel.commands.config import Config, resolve
from fastsel.commands.options import CHOICE, ENGINE, OPTIONS, OUTPUT
from fastsel.commands.runs import RunFolder, sha256_of
from fastsel.errors import InputError, UsageError
from fastsel.progress import format_seconds
from fastsel.unused_options import mode_of

if TYPE_CHECKING:
    from fastsel.io import Pool
    from fastsel.selection import Selection

logger = logging.getLogger("fastsel")
_OF_PRODUCTS = ("target", "subtask_column", "aggregation")  # what less multiplies gradients with


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        selection: the result.
        folder: where it was written.
        command: "select" or "score".
        found_finished: True when the folder held this very result already and nothing was done.
        seconds: wall time of this process's share.
    """

    selection: "Selection"
    folder: Path
    command: str
    found_finished: bool
    seconds: float

    @property
    def short_by(self) -> int:
        """Rows or tokens missing from the budget."""
        return self.selection.short_by if self.command == "select" else 0

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "status": "short of budget" if self.short_by else "done",
            "exit_code": 3 if self.short_by else 0,
            "command": self.command,
            "folder": str(self.folder),
            "found_finished": self.found_finished,
            "files": sorted(path.name for path in self.folder.iterdir() if path.is_file()),
            **self.selection.summary(),
        }

    def text(self) -> str:
        """The result for people: the summary, then what to open."""
        lines = [self.selection.summary_text().rstrip(), ""] if self.command == "select" else []
        if self.command == "score":
            scored = int((self.selection.scores == self.selection.scores).sum())  # NaN is not equal to itself
            lines.append(
                f"{scored:,} of {len(self.selection.scores):,} rows have a score: {self.folder / 'scores.npy'}"
            )
            lines.append(f"choose from them: fastsel select --from {shlex.quote(str(self.folder))} --budget 10% -o DIR")
        if self.command == "select":
            lines += [f"  {label:<14}{path}" for label, path in self._to_open()]
        if self.found_finished:
            lines.append("this folder was finished before; nothing was computed again (--overwrite does it anew)")
        return "\n".join(lines)

    def _to_open(self) -> list[tuple[str, Path]]:
        chosen = [path for path in (self.folder / "selected.jsonl", self.folder / "selected.parquet") if path.exists()]
        listed = [("chosen rows", path) for path in chosen]
        listed.append(("every row", self.folder / "selection.parquet"))
        if (self.folder / "report.html").exists():
            listed.append(("look at it", self.folder / "report.html"))
        return listed


def run(
    config: Config,
    *,
    from_run: str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    progress: str = "auto",
    argv: Sequence[str] = (),
    on_folder: Callable[[Path], None] = lambda folder: None,
) -> Outcome:
    """Do what a configuration asks for, in its folder.

    Args:
        config: from fastsel.commands.config.resolve, or from resolve_again together with from_run.
        from_run: choose from this finished run's scores instead of computing any.
        resume: go on with an unfinished run of the same request.
        overwrite: replace the run that is in the folder.
        progress: see fastsel.progress.
        argv: the command line, for the record.
        on_folder: called with the folder as soon as it may be written to.

    Raises:
        UsageError: no pool or no folder was named.
        InputError: the pool cannot be used, or the folder holds something else.
        RunFailedError: a gate such as max_error_rate failed.
    """
    started = time.perf_counter()
    output = config.values.get("output")
    if output is None:
        raise UsageError("where to write? -o DIR names a new or empty folder")
    if from_run is not None and Path(from_run).resolve() == Path(output).resolve():
        raise UsageError(f"--from and -o name the same folder ({output}); choose again into another one")
    try:
        pool = open_configured_pool(config, progress)
    except InputError as error:
        if from_run is None or config.given.get("pool") == "flags":
            raise
        raise InputError(f"{error}\n{from_run} was made from it; --pool says where it is now") from None
    request = {
        **config.shaping(),
        "pool": pool.fingerprint,
        "rows": len(pool),
        "scores_from": None if from_run is None else sha256_of(_scores_digest(from_run)),
        "fastsel": __version__,
    }
    if config.values.get("target"):
        from fastsel.features.targets import open_targets

        targets = open_targets(config.values["target"], subtask_column=config.values.get("subtask_column"))
        request["target"] = [target.fingerprint for target in targets]
    if config.values.get("checkpoints"):
        from fastsel.models.checkpoints import open_checkpoints

        request["checkpoints"] = [checkpoint.adapter for checkpoint in open_checkpoints(config.values["checkpoints"])]
    with RunFolder(output, request, resume=resume, overwrite=overwrite) as folder:
        on_folder(folder.path)
        if folder.state == "finished":
            logger.info("%s: this request is finished already", folder.path)
            selection = _load(folder.path, pool)
        else:
            if folder.state == "unfinished":
                logger.info("%s: going on with the unfinished run", folder.path)
            if from_run is None:
                selection = _compute(config, pool, folder, progress)
            elif config.method.in_turn:
                selection = _choose_anew(Path(from_run), config, pool, progress)
            else:
                selection = _choose_again(from_run, config, pool)
            _save(selection, config, folder, argv)
            folder.finish()
        seconds = time.perf_counter() - started
        logger.info("done in %s", format_seconds(seconds))
        return Outcome(selection, folder.path, config.command, folder.state == "finished", seconds)


def open_configured_pool(config: Config, progress: str) -> "Pool":
    """The pool that a configuration names, with a line about what is in it.

    Raises:
        UsageError: none is named.
    """
    from fastsel.io import STATUS, open_pool

    paths = config.values.get("pool")
    if not paths:
        raise UsageError("which pool? --pool PATH names a file, a folder or a quoted glob")
    options = config.pool_options()
    if config.method.name == "scores" and "score_column" not in options:
        raise UsageError("`scores` ranks by a column of the pool: name it with --score-column")
    pool = open_pool(paths[0] if len(paths) == 1 else paths, **options, progress=progress)
    counts = {name: int((pool.status == code).sum()) for code, name in enumerate(STATUS)}
    unusable = [f"{counts[name]:,} {name}" for name in ("skipped", "error") if counts[name]]
    logger.info("pool: %s, %s rows%s", pool.name, f"{len(pool):,}", f" ({', '.join(unusable)})" if unusable else "")
    for row, reason in islice(pool.reasons.items(), 3):
        logger.info("  row %d: %s", row, reason)
    if len(pool.reasons) > 3:
        logger.info("  and %s more; selection.parquet has the reason of each", f"{len(pool.reasons) - 3:,}")
    if pool.scores is not None and not (pool.scores == pool.scores).any():  # NaN is not equal to itself
        raise InputError(
            f"no row of {pool.name} has a number in {options['score_column']}: check the name of the column "
            f"(nested ones with dots, as processed_scores.IFD)"
        )
    return pool


def announce_model(config: Config) -> None:
    """Say which model will run, and that nobody named it; loading it takes a while."""
    for name in ("model", "encoder"):
        if config.values.get(name) is not None:
            named = "" if name in config.given else f" (none was named; --{name} names another)"
            logger.info("%s: %s%s", name, config.values[name], named)
    if "model" in config.values and config.values["model"] is None and "checkpoints" in config.values:
        taken = "what the checkpoints were trained on" if config.values["checkpoints"] else "bundled (none was named)"
        logger.info("model: %s; --model names another", taken)


def compute(config: Config, pool: "Pool", *, store: Path | None, progress: str) -> "Selection":
    """Call the method: one call of the Python API.

    Args:
        config: the options.
        pool: what to choose from.
        store: folder for what the model computes, or None to keep nothing.
        progress: see fastsel.progress.
    """
    method = config.method
    options = config.method_options()
    if config.command == "select":
        options["budget"] = config.values["budget"]
    else:
        options |= {"budget": 1.0}  # choosing is undone below; all rows are scored whatever the budget
        options.pop("per", None)
    if method.ready_scores == "instead" and config.values.get("score_column") is not None:
        from fastsel.methods.scores import scores

        options["keep"] = "highest" if method.largest else "lowest"
        options["drop_above"] = 1.0 if method.ratio_above_one_is_dropped else None
        return dataclasses.replace(scores(pool, **options), method=method.name)
    if method.runs_shards:
        options |= {"store": store, "progress": progress, "executor": _executor(config)}
    function = method.load()
    selection: Selection = function(pool, **options)
    return selection


def _executor(config: Config) -> Any:
    """Where shards run; None: in this process.

    Raises:
        UsageError: an address without the engine that has one.
    """
    engine, workers, address = (config.values.get(name) for name in ENGINE)
    if engine == "ray":
        import torch

        from fastsel.executors import RayActors

        on_gpu = torch.cuda.is_available() and config.values["device"] != "cpu"
        return RayActors(address, workers, num_gpus=1 if on_gpu else 0)
    if address is not None:
        raise UsageError("--ray-address goes with --engine ray")
    if workers is None or workers == 1:
        return None
    from fastsel.executors import LocalProcesses

    return LocalProcesses(workers)


def resolve_again(
    run_folder: str,
    method: str | None,
    flags: Mapping[str, Any],
    sets: list[str] | None = None,
    config_path: str | None = None,
) -> Config:
    """The configuration of choosing again from a finished run: the run's own, with another budget, quotas or output.

    Args:
        run_folder: the finished run.
        method, flags, sets: as in fastsel.commands.config.resolve.
        config_path: not taken here.

    Raises:
        InputError: the folder is not a finished run.
        UsageError: an option that would need another forward pass.
    """
    recorded = Path(run_folder) / "config.yaml"
    if config_path is not None:
        raise UsageError("--from takes its options from the run; leave --config out")
    if not (Path(run_folder) / "manifest.json").exists() or not recorded.exists():
        raise InputError(f"--from {run_folder}: no finished run is there (no manifest.json or config.yaml)")
    config = resolve("select", None, flags, sets, str(recorded), only_known=True)
    if method not in (None, config.method.name):
        raise UsageError(f"{run_folder} was scored by {config.method.name}, not by {method}; leave the method out")
    before = resolve("select", None, {}, None, str(recorded), only_known=True)
    for name, value in config.values.items():
        free = OPTIONS[name].group == OUTPUT or name in ("budget", "per", "seed", "pool")
        free |= config.method.in_turn and OPTIONS[name].group == CHOICE
        if name == "seed" and (config.method.name == "random" or "checkpoints" in config.method.defaults):
            free = False  # its scores are the draw itself; gradients were projected with it
        keeps_products = "mode" in config.values and mode_of(config.values) == "direct" and name in _OF_PRODUCTS
        if value != before.values.get(name) and (keeps_products or not free):
            why = "leave it or --from out"
            if keeps_products:
                why = "mode direct kept products with its own target; a run with --mode sketch serves any target"
            raise UsageError(
                f"{OPTIONS[name].flag} was {before.values.get(name)!r} in {run_folder} and cannot be {value!r} "
                f"without scoring again; {why}"
            )
    if "output" not in flags:
        config.values["output"] = None  # the run's own folder is not ours
    return config


def _choose_again(from_run: str, config: Config, pool: "Pool") -> "Selection":
    before = _load(Path(from_run), pool)
    logger.info("scores: those of %s; no model runs", from_run)
    again = before.choose_again(config.values["budget"], per=config.values["per"])
    return dataclasses.replace(again, seed=config.values["seed"])


def _choose_anew(from_run: Path, config: Config, pool: "Pool", progress: str) -> "Selection":
    """Another greedy run over the vectors that the run kept."""
    kept = from_run / "features"
    if not str(config.values.get("encoder")).endswith(".npy") and not any(kept.rglob("*.npy")):
        raise InputError(f"{from_run} kept no vectors to choose from again; leave --from out")
    if "checkpoints" in config.method.defaults:
        logger.info("gradients: those of %s; only rows of the target go through the model", from_run)
    else:
        logger.info("vectors: those of %s; no model runs", from_run)
    return compute(config, pool, store=kept, progress=progress)


def _compute(config: Config, pool: "Pool", folder: RunFolder, progress: str) -> "Selection":
    announce_model(config)
    selection = compute(config, pool, store=folder.features, progress=progress)
    if config.command == "select":
        return selection
    import numpy as np

    return dataclasses.replace(selection, indices=np.zeros(0, np.int64), requested=0, short={})


def _save(selection: "Selection", config: Config, folder: RunFolder, argv: Sequence[str]) -> None:
    from fastsel.io.writers import save_selection

    choosing = config.command == "select"
    selection.config = {"method": config.method.name, **config.values, **selection.config}
    save_selection(
        selection,
        folder.path,
        order=config.values.get("order") or "pool",
        also=config.values.get("also") or (),
        annotate=bool(config.values.get("annotate")),
        overwrite=True,  # the rules of the folder were applied when it was opened
        report=bool(config.values["report"]) and choosing,
        rows=choosing,
        config_yaml=config.to_yaml(),
        argv=argv,
    )


def _load(folder: Path, pool: "Pool") -> "Selection":
    from fastsel.selection import Selection

    return Selection.load(folder, pool)


def _scores_digest(from_run: str) -> str:
    import hashlib

    return hashlib.sha256((Path(from_run) / "scores.npy").read_bytes()).hexdigest()
