"""The folder of one run: whether it is new, goes on, is finished already, or belongs to something else.

    out/state/request.json    what was asked for (options, pool content, version), and whether it is finished
    out/state/lock            held while a process writes here
    out/run.log               what was said, with times
    out/features/             shards of what the model computed; a run that goes on reads them back

An unfinished folder goes on when the request is the same to the last option; a finished one with the same request is
left as it is. Everything else is refused with the differences, because a folder that mixes two requests would
describe neither.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from fastsel.errors import FastselError, InputError, UsageError
from fastsel.folder_lock import FolderLock

if TYPE_CHECKING:
    from typing_extensions import Self

State = Literal["new", "unfinished", "finished"]
# With what manifest.json lists, all that a run writes; --overwrite removes these and nothing else.
WRITTEN = (
    "selected.jsonl", "selected.parquet", "selection.parquet", "indices.npy", "scores.npy", "dataset_info.json",
    "README.md", "report.html", "report.json", "run.log", "config.yaml", "manifest.json", "features", "state",
)  # fmt: skip


class RunFolder:
    """The folder a run writes to; use it as a context manager, which holds the lock.

    Attributes:
        path: the folder.
        state: "new" (nothing here yet), "unfinished" (the same request was begun) or "finished" (it is done).
    """

    def __init__(self, path: str | Path, request: Mapping[str, Any], *, resume: bool = True, overwrite: bool = False):
        """Look at the folder and decide; nothing is written until __enter__.

        Args:
            path: the folder; made when it is missing.
            request: what is asked for, as JSON values.
            resume: go on with an unfinished run; False starts it anew.
            overwrite: drop whatever run is there.

        Raises:
            InputError: the folder holds another request, or files that are not from a run.
        """
        self.path = Path(path)
        self.request = json.loads(json.dumps(request))
        self.state: State = "new"
        self._start_anew = overwrite
        self._lock: FolderLock | None = None
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; -o wants a folder")
        before = self._read_json("state/request.json")
        if before is None:
            self._judge_without_request()
            return
        if overwrite:
            return
        finished = bool(before.get("finished"))
        differences = describe_differences(before.get("request", {}), self.request)
        if differences:
            raise InputError(
                f"{self.path} holds {'a finished' if finished else 'an unfinished'} run of another request:\n"
                f"{differences}\nGive another folder with -o, or --overwrite to replace that run."
            )
        if finished and all((self.path / name).exists() for name in before.get("files", [])):
            self.state = "finished"
        elif resume:
            self.state = "unfinished"
        else:
            self._start_anew = True

    @property
    def features(self) -> Path:
        """Where what the model computes is kept."""
        return self.path / "features"

    def finish(self) -> None:
        """Say that everything is written; before this the run counts as unfinished."""
        files = sorted(path.name for path in self.path.iterdir() if path.is_file())
        self._write_request({"request": self.request, "finished": True, "files": files})

    def _read_json(self, name: str) -> dict[str, Any] | None:
        try:
            loaded = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            if self._start_anew:
                return {}
            raise InputError(f"{self.path / name} cannot be read ({error}): give another folder") from None
        return loaded if isinstance(loaded, dict) else {}

    def _judge_without_request(self) -> None:
        """A folder without a request: empty, of a failed start, written from Python, or not ours."""
        entries = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
        if set(entries) <= {"state", "run.log"} or (self._start_anew and "manifest.json" in entries):
            return
        if "manifest.json" in entries:
            raise InputError(
                f"{self.path} holds a finished run: give another folder with -o, or --overwrite to replace it"
            )
        ours = [name for name in entries if name in WRITTEN]
        if ours or not self._start_anew:
            shown = ", ".join((ours or entries)[:4]) + (", ..." if len(ours or entries) > 4 else "")
            advice = "" if ours else "; --overwrite writes beside what is there"
            raise InputError(f"{self.path} is not empty ({shown}): give a new or empty folder with -o{advice}")

    def _write_request(self, content: dict[str, Any]) -> None:
        target = self.path / "state" / "request.json"
        part = target.with_suffix(".part")
        with open(part, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1, ensure_ascii=False)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, target)

    def __enter__(self) -> "Self":
        try:
            (self.path / "state").mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path / "state" / "lock")
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror}") from None
        if self._start_anew:
            self._remove_run()
        if self.state != "finished":
            self._write_request({"request": self.request, "finished": False})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.state == "new" and not self._worth_keeping(error):
            # Nothing was computed, so a corrected command must not be refused as another request.
            shutil.rmtree(self.features, ignore_errors=True)
            (self.path / "state" / "request.json").unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()

    def _worth_keeping(self, error: BaseException) -> bool:
        """Whether anything was computed; after a wrong option or input, the search for leaks does not count."""
        is_refusal = isinstance(error, FastselError) and error.exit_code == UsageError.exit_code
        found = [path.relative_to(self.features) for path in self.features.rglob("*.npy")]
        return any(not is_refusal or path.parts[0] != "leaks" for path in found)

    def _remove_run(self) -> None:
        listed = (self._read_json("manifest.json") or {}).get("files", {})
        for name in [*WRITTEN, *(name for name in listed if Path(name).name == name)]:
            path = self.path / name
            if name == "state":
                (path / "request.json").unlink(missing_ok=True)  # the lock in it is ours
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def sha256_of(value: Any) -> str:
    """Hash of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """One line for each key that differs, nested keys with dots; "" when nothing does."""
    old, new = _flat(before), _flat(now)
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        there, here = old.get(key), new.get(key)
        if there != here:
            lines.append(
                f"  {key}: {json.dumps(there, ensure_ascii=False)} there, {json.dumps(here, ensure_ascii=False)} now"
            )
    return "\n".join(lines)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat
