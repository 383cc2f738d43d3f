"""Options that do nothing beside another one: they are refused, never passed over in silence."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fastsel.errors import UsageError

WARM_UP = ("warmup_fraction", "epochs", "lora_r", "learning_rate")
_OF_A_MODEL = (
    "model", "checkpoints", *WARM_UP, "template", "max_length", "overflow", "turns", "dtype", "implementation",
    "batch_tokens", "sketch_size", "eps_mode", "layers", "engine", "workers", "ray_address", "executor",
)  # fmt: skip


def unused_options(values: Mapping[str, Any]) -> dict[str, str]:
    """Option -> why it does nothing; of those in values.

    Args:
        values: option -> its value, defaults included.
    """
    found: dict[str, str] = {}
    if values.get("gradients") is not None:
        found |= dict.fromkeys(_OF_A_MODEL, "with --gradients: they are ready, and no model runs")
    if values.get("checkpoints") is not None:
        found |= dict.fromkeys(WARM_UP, "with --checkpoints: they are trained already, and nothing is warmed up")
    if "mode" in values and mode_of(values) == "direct":
        found["sketch_size"] = "with --mode direct, which projects nothing; --mode sketch does"
    if values.get("leaks") == "none" and values.get("drop_leaks"):
        found["drop_leaks"] = "with --leaks none, which looks for none"
    return {name: why for name, why in found.items() if name in values}


def mode_of(values: Mapping[str, Any]) -> str:
    """How less takes gradients where nobody says how."""
    return values.get("mode") or ("trak" if values.get("official") else "direct")


def refuse_unused(method: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Refuse what would do nothing.

    Args:
        method: a function whose signature has the defaults.
        values: what it was called with, defaults included; other names are passed over.

    Raises:
        UsageError: an option differs from its default and does nothing.
    """
    parameters = inspect.signature(method).parameters
    for name, why in unused_options({name: values[name] for name in parameters if name in values}).items():
        default = parameters[name].default
        if values[name] is not default and values[name] != default:
            raise UsageError(unused(name, why))


def unused(name: str, why: str) -> str:
    """The message."""
    return f"--{name.replace('_', '-')} ({name}=) does nothing {why}; leave one of the two out"
