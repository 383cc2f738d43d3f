"""LLaMA-Factory's dataset_info.json: `FOLDER/dataset_info.json#NAME` is a pool with its columns and tags."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsel.errors import FastselWarning, InputError

_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "sharegpt"}
_ELSEWHERE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_NOT_TEXT = ("images", "videos", "audios")
_USED_COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools")


@dataclass(frozen=True)
class DatasetEntry:
    """One entry: where the rows are and how they are laid out."""

    name: str
    path: Path
    format: str
    columns: Mapping[str, str]
    tags: Mapping[str, str]

    def paths(self) -> Path | list[Path]:
        """The entry's file, or, as LLaMA-Factory does, every file of its folder."""
        if self.path.is_dir() and not (self.path / "state.json").exists():
            return sorted(path for path in self.path.iterdir() if path.is_file())
        return self.path


def names_entry(source: object) -> bool:
    """Whether the source reads as FILE.json#NAME, with or without the prefix `LF:`."""
    return isinstance(source, str) and ".json#" in source and not Path(source).exists()


def read_entry(source: str) -> DatasetEntry:
    """The entry that `[LF:]FOLDER/dataset_info.json#NAME` names.

    Raises:
        InputError: no such file or entry, or one of no use here: rows on a hub, preferences, pictures.
    """
    file_name, _, name = source.removeprefix("LF:").rpartition("#")
    file = Path(file_name).expanduser()
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file (working directory: {Path.cwd()})") from None
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error})") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError(f"{file} is not a dataset_info.json: it must hold one object a data set, by name")
    if name not in entries:
        raise InputError(f"{file} has no entry {name!r}; it has {', '.join(sorted(entries)[:20])}")
    entry: dict[str, Any] = entries[name]
    elsewhere = [key for key in _ELSEWHERE if entry.get(key)]
    if "file_name" not in entry or elsewhere:
        raise InputError(
            f"{file}#{name} names rows that are not local files; load them (datasets.load_dataset) and give fastsel "
            "the Dataset, or save them as a file"
        )
    columns: dict[str, Any] = {word: column for word, column in (entry.get("columns") or {}).items() if column}
    if entry.get("ranking") or columns.get("kto_tag"):
        raise InputError(f"{file}#{name} holds preferences, not answers to train on")
    pictures = [word for word in _NOT_TEXT if word in columns]
    if pictures:
        raise InputError(f"{file}#{name} has {', '.join(pictures)}; fastsel scores text only")
    if entry.get("num_samples"):
        warnings.warn(f"{name}: num_samples is not applied, the whole file is the pool", FastselWarning, stacklevel=3)
    formatting = entry.get("formatting", "alpaca")
    if formatting not in _FORMATS:
        raise InputError(f"{file}#{name}: formatting {formatting!r} is not known; known are {', '.join(_FORMATS)}")
    path = file.parent / entry["file_name"]
    if not path.exists():
        raise InputError(f"{path}: no such file (named by {file}#{name})")
    format = _FORMATS[formatting]
    used = {word: column for word, column in columns.items() if word in _USED_COLUMNS}
    if format == "alpaca" and "prompt" in used and "response" not in used:  # a corpus without answers
        format, used = "text", {"text": used["prompt"]}
    return DatasetEntry(name, path, format, used, entry.get("tags") or {})
