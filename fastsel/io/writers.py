"""The output folder of a run: everything is written aside and moved into place, the manifest last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastsel.errors import InputError, RunFailedError, UsageError
from fastsel.io.annotate import annotate_rows
from fastsel.io.dataset_card import write_card
from fastsel.io.exports import EXPORTS, export
from fastsel.io.finished_run import MANIFEST, SCHEMA_VERSION, load_selection, read_manifest
from fastsel.io.llama_factory import dataset_info
from fastsel.io.selection_table import record_batches, table_schema
from fastsel.summary import plain_quotas, summarize, summary_text

if TYPE_CHECKING:
    from fastsel.selection import Selection

__all__ = ["config_sha256", "load_selection", "save_selection"]

_ASIDE = ".writing-"
# What a run that is not finished may have left, or begun, in its folder.
_BEGUN = ("state", "features", "run.log")
_PACKAGES = ("numpy", "pyarrow", "torch", "triton", "transformers", "tokenizers", "peft", "gguf")


def save_selection(
    selection: Selection,
    folder: str | Path,
    *,
    order: str = "pool",
    also: Iterable[str] = (),
    annotate: bool = False,
    overwrite: bool = False,
    report: bool = True,
    rows: bool = True,
    config_yaml: str | None = None,
    argv: Sequence[str] | None = None,
) -> Path:
    """Write a finished run.

    selected.* (the user's own rows), selection.parquet (one line per pool row), indices.npy, scores.npy, config.yaml,
    dataset_info.json (where LLaMA-Factory can read the rows), README.md (a dataset card), report.html, report.json,
    run.log and manifest.json. The first four are the same bytes each time; times stand in manifest.json, run.log and
    the report only. manifest.json comes last: a folder that has one is finished.

    Args:
        selection: the result.
        folder: new or empty, or that of the unfinished run this result belongs to. A finished run of the same request
            is left as it is.
        order: of the rows in selected.*, "pool" or "rank".
        also: other tools' files: oda, dataflex, instructlab, less.
        annotate: add score and rank to each row of selected.* under the key "fastsel".
        overwrite: replace whatever run is there; files that are not from a run stay.
        report: write report.html and report.json.
        rows: write the chosen rows (selected.*, dataset_info.json, README.md); False for a run that only scores.
        config_yaml: text of config.yaml; selection.config stands in.
        argv: the command of the manifest; sys.argv stands in.

    Returns:
        The folder.

    Raises:
        UsageError: an unknown order or export.
        InputError: the folder holds something else.
        RunFailedError: the files could not be written.
    """
    folder, also = Path(folder), tuple(dict.fromkeys(also))
    unknown = [name for name in also if name not in EXPORTS]
    if unknown:
        raise UsageError(f"--also {unknown[0]} is not known; choose from {', '.join(EXPORTS)}")
    chosen = selection.ordered_indices(order)
    output = {"order": order, "also": list(also), "annotate": annotate}
    before = _judge_folder(selection, folder, output, overwrite)
    if before is not None and not overwrite:
        return folder
    started = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_ASIDE}*"):
            shutil.rmtree(left)
        aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=folder))
        try:
            if rows:
                _write_rows(selection, chosen, aside, annotate)
            _write_arrays(selection, aside)
            export(selection, also, aside)
            _write_texts(selection, aside, config_yaml, annotate)
            if report:
                from fastsel.report import write_report

                write_report(selection, aside / "report.html")
            # A run that was started with a state folder writes its own log, line by line as it goes.
            if not (folder / "run.log").exists() or (overwrite and not (folder / "state").exists()):
                _write_log(selection, aside / "run.log")
            manifest = _manifest(
                selection, aside, output, sys.argv if argv is None else argv, time.perf_counter() - started
            )
            _write_json(aside / MANIFEST, manifest)
            _move_into_place(aside, folder, before)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise RunFailedError(f"cannot write to {folder}: {error.strerror or error}") from error
    return folder


def config_sha256(config: Any) -> str:
    """Hash of a configuration, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _judge_folder(selection: Selection, folder: Path, output: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The manifest of the finished run that is there, or None; refuses a folder that this result must not touch."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, not a folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    try:
        before = read_manifest(folder) if MANIFEST in names else None
    except InputError:
        if not overwrite:
            raise
        before = None
    if overwrite:
        return before
    if before is not None:
        same = before["config_sha256"] == config_sha256(selection.config) and before["output"] == output
        if (
            same
            and before["method"] == selection.method
            and before["pool"]["fingerprint"] == selection.pool.fingerprint
        ):
            return before
        raise InputError(f"{folder} holds a finished run of another request: give another folder, or overwrite it")
    foreign = [name for name in names if name not in _BEGUN and not name.startswith(_ASIDE)]
    if foreign and "state" not in names:
        raise InputError(f"{folder} is not empty ({', '.join(foreign[:4])}): give a new folder, or overwrite it")
    return None


def _write_rows(selection: Selection, rows: Any, aside: Path, annotate: bool) -> None:
    written = Path(selection.pool.write_rows(rows, aside / "selected"))
    if annotate:
        annotate_rows(selection, rows, written)


def _write_arrays(selection: Selection, aside: Path) -> None:
    np.save(aside / "indices.npy", selection.indices)
    # One NaN for all, because a NaN has many bit patterns and equal runs must give equal bytes.
    np.save(aside / "scores.npy", np.where(np.isnan(selection.scores), np.nan, selection.scores))
    with pq.ParquetWriter(aside / "selection.parquet", table_schema(selection), compression="zstd") as writer:
        for batch in record_batches(selection):
            writer.write_table(pa.Table.from_batches([batch]))


def _write_texts(selection: Selection, aside: Path, config_yaml: str | None, annotated: bool) -> None:
    import yaml

    if config_yaml is None:
        config = json.loads(json.dumps({"method": selection.method, **selection.config}, default=str))
        config_yaml = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000)
    (aside / "config.yaml").write_text(config_yaml, encoding="utf-8")
    selected = next(aside.glob("selected.*"), None)
    if selected is None:
        return
    file_name = selected.name
    info = dataset_info(selection, file_name)
    if info is not None:
        _write_json(aside / "dataset_info.json", info)
    write_card(selection, aside / "README.md", file_name, has_dataset_info=info is not None, annotated=annotated)


def _write_log(selection: Selection, path: Path) -> None:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    path.write_text(
        "".join(f"{now} {line}\n" for line in summary_text(summarize(selection)).splitlines()), encoding="utf-8"
    )


def _manifest(
    selection: Selection, aside: Path, output: dict[str, Any], argv: Sequence[str], write_seconds: float
) -> dict[str, Any]:
    files = sorted(path for path in aside.iterdir())
    facts = summarize(selection)
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"fastsel": _version("fastsel"), "python": sys.version.split()[0]}
        | {name: version for name in _PACKAGES if (version := _version(name))},
        "argv": list(argv),
        "method": selection.method,
        "official": selection.official,
        "config": json.loads(json.dumps(selection.config, default=str)),
        "config_sha256": config_sha256(selection.config),
        "output": output,
        "seed": selection.seed,
        "budget": {"unit": selection.budget.unit, "amount": str(selection.budget.amount)},
        "per": plain_quotas(selection.per),
        "rule": selection.rule,
        "largest": selection.largest,
        "requested": selection.requested,
        "short": selection.short,
        "pool": {"name": selection.pool.name, "format": selection.pool.format, "rows": len(selection.scores)}
        | {"fingerprint": selection.pool.fingerprint},
        "inputs": [{"path": str(i.path), "rows": i.rows, "sha256": i.sha256} for i in selection.pool.inputs],
        **{name: selection.provenance.get(name) for name in ("model", "template", "device", "implementations")},
        "provenance": json.loads(json.dumps(selection.provenance, default=str)),
        "timings": {**facts["timings"], "write": round(write_seconds, 6)},
        "counts": facts["counts"],
        "kept": len(selection),
        "notes": list(selection.notes),
        "random_baseline": facts["random_baseline"],
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files},
    }


def _move_into_place(aside: Path, folder: Path, before: dict[str, Any] | None) -> None:
    for path in aside.iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    # Without its manifest the old run counts as unfinished while its files are replaced one by one.
    (folder / MANIFEST).unlink(missing_ok=True)
    new = sorted(path.name for path in aside.iterdir())
    for name in (before or {}).get("files", {}):
        if name not in new and name != "run.log" and Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
    for name in [*(name for name in new if name != MANIFEST), MANIFEST]:
        os.replace(aside / name, folder / name)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
