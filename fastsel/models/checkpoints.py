"""Checkpoints of a LoRA run: the adapter, Adam's state, and how fast the model was learning when it was reached.

A folder that transformers' Trainer wrote (or TRL, axolotl, LLaMA-Factory, which use it) is taken as it is:

    run/checkpoint-105/   adapter_config.json  adapter_model.safetensors  optimizer.pt  trainer_state.json
    run/checkpoint-211/   ...

A checkpoint stands for the steps since the one before, and its weight is their mean learning rate (LESS, section 3).
"""

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastsel.errors import FastselWarning, InputError
from fastsel.models.adam_state import AdamState, plain_name, read_adam_state
from fastsel.models.loading import LoadedModel, load_adapter, refuse_pickles

CONFIG, WEIGHTS, STATE = "adapter_config.json", "adapter_model.safetensors", "trainer_state.json"
_PROBES = ("The quick brown fox, 12345!", "def f(x):\n    return x + 1\n", "Où est-il ? 东京")
_NAMED = re.compile(r"checkpoint-(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a LoRA run.

    Attributes:
        folder: where it lies.
        step: optimizer steps taken.
        learning_rate: the mean over the steps since the checkpoint before; None where the run did not log it.
    """

    folder: Path
    step: int
    learning_rate: float | None

    @property
    def base(self) -> str | None:
        """What the adapter's configuration says it was trained on: a hub id, a folder, "bundled"; None: nothing."""
        named = _read(self.folder / CONFIG).get("base_model_name_or_path")
        return str(named) if named else None

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Plain parameter name -> shape, of the adapter's file."""
        from safetensors import safe_open

        with safe_open(str(self.folder / WEIGHTS), "pt") as weights:  # type: ignore[no-untyped-call]
            return {plain_name(name): tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits over the adapter's files, the optimizer's and the learning rate."""
        return self._digest(CONFIG, WEIGHTS, "optimizer.pt", "optimizer.bin")

    @cached_property
    def adapter(self) -> str:
        """The same without the optimizer's state, whose file is the largest."""
        return self._digest(CONFIG, WEIGHTS)

    def _digest(self, *names: str) -> str:
        import xxhash

        digest = xxhash.xxh3_128(f"{self.step} {self.learning_rate!r}".encode())
        for name in names:
            if (self.folder / name).is_file():
                with open(self.folder / name, "rb") as stream:
                    digest.update(name.encode())
                    while block := stream.read(1 << 24):
                        digest.update(block)
        return digest.hexdigest()

    def load(
        self, base: Any = None, *, device: str = "auto", dtype: str = "auto", offline: bool = False
    ) -> LoadedModel:
        """The model of this checkpoint; `model` is the peft model, its adapter not merged, nothing trainable.

        Args:
            base: what the adapter was trained on, see load_model; None takes what its configuration names. A pair or
                a LoadedModel gets the adapter put into its own layers.
            device, dtype, offline: see load_model.

        Raises:
            InputError: the adapter or the base cannot be read, or do not fit each other.
        """
        loaded = load_adapter(self.folder, base, device=device, dtype=dtype, offline=offline)
        there = {plain_name(name) for name, _ in loaded.model.named_parameters()}
        astray = [name for name in self.shapes if "lora_" in name and name not in there]
        if astray:  # peft passes over them in silence
            raise InputError(
                f"the adapter {self.folder} does not fit its base {loaded.model.get_base_model().__class__.__name__}: "
                f"that has no {astray[0]}"
            )
        if isinstance(base, (tuple, LoadedModel)):
            self._check_tokenizer(loaded, base[1] if isinstance(base, tuple) else base.tokenizer)
        return loaded

    def _check_tokenizer(self, loaded: LoadedModel, of_base: Any) -> None:
        """The tokenizer beside the adapter is what it was trained with; where it reads texts in other tokens than the
        base's, something is mixed up.
        """
        if loaded.tokenizer is of_base:
            return
        rows = loaded.model.get_input_embeddings().weight.shape[0]
        highest = max(loaded.tokenizer.get_vocab().values(), default=0)
        if highest >= rows and highest > max(of_base.get_vocab().values(), default=0):
            raise InputError(
                f"the tokenizer in {self.folder} goes to token {highest:,}, its base has {rows:,} embeddings: the run "
                "enlarged them. Name the enlarged model (--model), or take the tokenizer files out of the folder"
            )
        if any(loaded.tokenizer(text)["input_ids"] != of_base(text)["input_ids"] for text in _PROBES):
            warnings.warn(
                f"the tokenizer in {self.folder} reads texts in other tokens than its base's: is this the model that "
                "the run trained? The folder's tokenizer is taken",
                FastselWarning,
                stacklevel=3,
            )

    def adam_state(self, names: Sequence[str]) -> AdamState:
        """Adam's moments for these parameters; see read_adam_state."""
        return read_adam_state(self.folder, names, self.shapes)


def open_checkpoints(folders: Any) -> list[Checkpoint]:
    """The checkpoints of a run, by step.

    Args:
        folders: a run's folder with checkpoint-N folders in it, one checkpoint's folder, or a list of such.

    Raises:
        InputError: a folder is missing or holds no LoRA checkpoint; two are of the same step; the message says what to
            do.
    """
    given = [Path(folders)] if isinstance(folders, (str, Path)) else [Path(folder) for folder in folders]
    if not given:
        raise InputError("no checkpoint was named: give a folder of a LoRA run")
    found = [checkpoint for folder in given for checkpoint in _in_folder(folder)]
    for folder in found:
        _refuse_unusable(folder)
    states = [_trainer_state(folder) for folder in found]
    steps = [_step(folder, state, len(found)) for folder, state in zip(found, states, strict=True)]
    order = sorted(range(len(found)), key=lambda i: steps[i])
    for before, after in zip(order, order[1:], strict=False):
        if steps[before] == steps[after]:
            raise InputError(
                f"{found[before]} and {found[after]} are both of step {steps[before]}: name one of them, or let each "
                "run be selected by on its own"
            )
    logged = _logged(states)
    checkpoints, since = [], 0
    for i in order:
        checkpoints.append(Checkpoint(found[i], steps[i], mean_learning_rate(logged, since, steps[i])))
        since = steps[i]
    if any(checkpoint.learning_rate is None for checkpoint in checkpoints):
        checkpoints = [replace(checkpoint, learning_rate=None) for checkpoint in checkpoints]
    return checkpoints


def mean_learning_rate(logged: Mapping[int, float], since: int, step: int) -> float | None:
    """The mean over steps since + 1 to step.

    Args:
        logged: step -> learning rate, as often as the run logged it; between two of them the rate goes in a straight
            line, and outside as between the two that are nearest, but never below 0.
        since, step: steps taken at the checkpoint before, and at this one.

    Returns:
        The mean; None when nothing was logged or there is no step between.
    """
    if not logged or step <= since:
        return None
    at = np.array(sorted(logged), np.float64)
    rates = np.array([logged[int(s)] for s in at])
    steps = np.arange(since + 1, step + 1, dtype=np.float64)
    means = np.interp(steps, at, rates)
    if len(at) > 1:
        for outside, a, b in ((steps < at[0], 0, 1), (steps > at[-1], -1, -2)):
            slope = (rates[b] - rates[a]) / (at[b] - at[a])
            means[outside] = np.maximum(0, rates[a] + slope * (steps[outside] - at[a]))
    return float(means.mean())


def _in_folder(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"checkpoint {folder}: there is no such folder")
    if _NAMED.search(folder.name) is None:
        inside = [path for path in folder.iterdir() if path.is_dir() and _NAMED.search(path.name)]
        if inside:
            return inside
    return [folder]


def _refuse_unusable(folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        shards = sorted(path.parent for path in folder.glob("pytorch_model_fsdp*/.metadata"))
        if shards:
            raise InputError(
                f"{folder} keeps its weights in shards ({shards[0].name}). Merge them first:\n"
                f"  accelerate merge-weights {shards[0]} {folder}\n"
                "or train with fsdp_state_dict_type FULL_STATE_DICT, which writes the adapter"
            )
        if (folder / "config.json").is_file():
            raise InputError(
                f"{folder} is a whole model, not an adapter: gradients are taken with respect to LoRA matrices. Train "
                "with LoRA (`fastsel warmup`), or leave the checkpoints out"
            )
        raise InputError(
            f"{folder} holds no checkpoint: neither checkpoint-N folders nor {CONFIG}. It should be the output_dir of "
            "a LoRA run of transformers' Trainer, or of `fastsel warmup`"
        )
    config = _read(folder / CONFIG)
    kind = config.get("peft_type", "LORA")
    if config.get("use_dora"):
        raise InputError(
            f"{folder} is a DoRA adapter, which divides its directions by their lengths: gradients are taken of plain "
            "LoRA matrices. Train with use_dora=False (`fastsel warmup` does)"
        )
    if kind != "LORA":
        raise InputError(
            f"{folder} is a {kind} adapter; gradients are taken of LoRA matrices: `fastsel warmup` trains such"
        )
    refuse_pickles(folder, str(folder), WEIGHTS, "peft_model.save_pretrained(FOLDER)")


def _trainer_state(folder: Path) -> dict[str, Any]:
    return _read(folder / STATE) if (folder / STATE).is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds no JSON object")
    return loaded


def _step(folder: Path, state: Mapping[str, Any], n: int) -> int:
    if isinstance(state.get("global_step"), int):
        return int(state["global_step"])
    named = _NAMED.search(folder.name)
    if named is None and n > 1:
        raise InputError(
            f"{folder}: of which step is it? {STATE} is missing and the folder is not called checkpoint-N; copy that "
            "file beside the adapter, or rename the folder"
        )
    return int(named.group(1)) if named else 0


def _logged(states: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Step -> learning rate of all logs together; a later log wins, as a run that was resumed writes steps again."""
    rates: dict[int, float] = {}
    for state in sorted(states, key=lambda state: state.get("global_step") or 0):
        for entry in state.get("log_history") or []:
            rate, step = entry.get("learning_rate"), entry.get("step")
            if isinstance(rate, (int, float)) and isinstance(step, int) and math.isfinite(rate):
                rates[step] = float(rate)
    return rates
