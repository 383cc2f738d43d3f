"""Adam's moments as training programs leave them on disk, found again by the names of the parameters.

    optimizer.pt     transformers' Trainer: parameters are integers. They count group 0 first (weights that decay), then
                     group 1 (biases and norms), each in the order of named_parameters()
    optimizer.bin    a full FSDP state (accelerate): parameters are names

Read by torch's weights-only reader: tensors and plain containers come in, code never does.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsel.errors import InputError

FILES = ("optimizer.pt", "optimizer.bin")
BETAS, EPS = (0.9, 0.999), 1e-8  # torch's own, where a file does not say
# What wrappers put into the names of parameters.
_WRAPPED = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB])\.(?!weight$)[^.]+(?=\.weight$|$)")
# transformers' Trainer does not decay parameters with such names.
_WITHOUT_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


@dataclass(frozen=True)
class AdamState:
    """What Adam knows after a number of steps.

    Attributes:
        moments: name -> (exp_avg, exp_avg_sq), float32 on the CPU, in the shape of the parameter.
        step: optimizer steps taken.
        betas: decay rates of the two.
        eps: what is added to the root of the second.
    """

    moments: dict[str, tuple[torch.Tensor, torch.Tensor]]
    step: int
    betas: tuple[float, float]
    eps: float


def read_adam_state(folder: Path, names: Sequence[str], shapes: Mapping[str, Sequence[int]] | None = None) -> AdamState:
    """The moments of these parameters.

    Args:
        folder: a checkpoint, with optimizer.pt or optimizer.bin.
        names: of all parameters that were trained, in the order of named_parameters(); with names in the file, of those
            that are wanted.
        shapes: of parameters, by name as plain_name gives it; those it lists are checked.

    Raises:
        InputError: there is no such file, it is in shards or of another optimizer, it cannot be read without running
            code, or it does not fit the names; the message says what to do.
    """
    path = find_optimizer(folder)
    content = _load(path)
    content = content.get("optimizer", content)  # as torch's dcp_to_torch leaves what accelerate saved in shards
    state, groups = content.get("state"), content.get("param_groups") or []
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"{path} holds no state of an optimizer: was it saved with save_only_model?")
    if all(isinstance(key, int) for key in state):
        by_name = _numbered(path, state, groups, names)
    else:
        by_name = {plain_name(str(key)): value for key, value in state.items()}
    moments, steps = {}, []
    for name in names:
        entry = by_name.get(plain_name(name))
        if entry is None:
            raise InputError(f"{path} has no moments for {name}; it has them for {_some(by_name)}")
        moments[name] = _moments(path, name, entry)
        wanted = (shapes or {}).get(plain_name(name))
        if wanted is not None and tuple(moments[name][0].shape) != tuple(wanted):
            raise InputError(
                f"{path} keeps {name} in shape {list(moments[name][0].shape)}, the adapter in {list(wanted)}: they are "
                "of different runs, or its parameters were numbered in another order"
            )
        if "step" in entry:
            steps.append(int(entry["step"]))
    first = groups[0] if groups else {}
    beta1, beta2 = first.get("betas", BETAS)
    return AdamState(moments, max(steps, default=0), (float(beta1), float(beta2)), float(first.get("eps", EPS)))


def find_optimizer(folder: Path) -> Path:
    """The file with the optimizer's state.

    Raises:
        InputError: there is none, or it is in shards; the message says what to do.
    """
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    shards = sorted(path.parent for path in folder.glob("optimizer*/.metadata"))
    if shards:
        raise InputError(
            f"{folder} keeps its optimizer state in shards ({shards[0].name}). Merge them first:\n"
            f"  python -m torch.distributed.checkpoint.format_utils dcp_to_torch {shards[0]} {folder / 'optimizer.bin'}"
        )
    if any(folder.glob("global_step*/*optim_states.pt")):
        raise InputError(
            f"{folder} keeps DeepSpeed's optimizer state, which is cut up by process and cannot be read here: train "
            "without ZeRO or with FSDP and a full state dict, or leave Adam out (step='sgd')"
        )
    if any(folder.glob("optimizer_*rank*.bin")):
        raise InputError(
            f"{folder} keeps one optimizer file for each process, which cannot be put together: train with "
            "fsdp_state_dict_type FULL_STATE_DICT"
        )
    raise InputError(
        f"{folder} has neither {FILES[0]} nor {FILES[1]}: Adam's moments are needed. Train without save_only_model, "
        "name a checkpoint-N folder instead of the final model, or let fastsel.warmup train one"
    )


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers and peft's adapter names add to it."""
    return _ADAPTER.sub(r".\1", _WRAPPED.sub("", name))


def _load(path: Path) -> Mapping[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a foreign file: what it raises depends on where it is broken
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{path} cannot be read without running code that it might hold ({lines[0]}). Save it again from a recent "
            "transformers, or let fastsel.warmup train a checkpoint"
        ) from error
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path} holds a {type(loaded).__name__}, not the state of an optimizer")
    return loaded


def _numbered(
    path: Path, state: Mapping[int, Any], groups: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, Any]:
    """Name -> state; the numbers count the groups, one after another."""
    numbers = [number for group in groups for number in group["params"]] or sorted(state)
    written = [name for group in groups for name in group.get("param_names", [])]
    if len(written) == len(numbers):
        ordered: Iterable[str] = map(plain_name, written)
    else:
        if len(numbers) != len(names):
            raise InputError(
                f"{path} numbers {len(numbers)} parameters, the adapter has {len(names)}: others were trained beside "
                "it (modules_to_save, bias), and nothing says which number is whose"
            )
        without = [name for name in names if _WITHOUT_DECAY.search(plain_name(name))]
        two = len(groups) > 1 and len(groups[1]["params"]) == len(without)
        ordered = map(plain_name, [*(name for name in names if name not in without), *without] if two else names)
    return {name: state[number] for name, number in zip(ordered, numbers, strict=True) if number in state}


def _moments(path: Path, name: str, entry: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(entry, Mapping) or not {"exp_avg", "exp_avg_sq"} <= set(entry):
        kept = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
        raise InputError(
            f"{path} keeps {kept} for {name}, not Adam's exp_avg and exp_avg_sq: train with optim adamw_torch (8-bit "
            "and factored optimizers keep something else)"
        )
    first, second = entry["exp_avg"].float(), entry["exp_avg_sq"].float()
    if not (torch.isfinite(first).all() and torch.isfinite(second).all() and (second >= 0).all()):
        raise InputError(
            f"{path}: the moments of {name} are not finite numbers, the second at least 0; did it diverge?"
        )
    return first, second


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:2]) + (f" and {len(listed) - 2} more" if len(listed) > 2 else "")
