"""Choosing an implementation: ask each in order, run the first that accepts, otherwise say why each refused."""

import logging
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

logger = logging.getLogger("fastsel.kernels")
AUTO = "auto"
# Runs only when it is asked for by name: it is written to be read, not to be fast.
BY_NAME_ONLY = frozenset({"reference"})


class NoImplementationError(NotImplementedError):
    """No implementation of an operation accepts these inputs; the message lists each with its reason."""


def refusal(name: str, module_name: str, inputs: tuple[Any, ...]) -> tuple[str | None, ModuleType | None]:
    """(reason, None) when the implementation cannot take the inputs, else (None, its module)."""
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "fastsel":
            raise  # a missing file of ours is a bug, not a refusal
        return f"needs the package {error.name}, which is not installed", None
    reason: str | None = module.unsupported(*inputs)
    return reason, None if reason else module


def run(implementations: Mapping[str, str], implementation: str, *inputs: Any) -> Any:
    """Run the first accepting implementation ("auto"), or the one named; never fall back from a name.

    Args:
        implementations: name -> dotted module, in the order in which "auto" asks them.
        implementation: "auto" or one of the names.
        inputs: handed unchanged to unsupported() and compute().

    Raises:
        ValueError: the name is not in the table.
        NoImplementationError: nothing asked accepts these inputs; lists every reason.
    """
    if implementation != AUTO and implementation not in implementations:
        names = ", ".join([AUTO, *implementations])
        raise ValueError(f"implementation={implementation!r} is not known here; it is one of: {names}")
    asked = [implementation] if implementation != AUTO else [n for n in implementations if n not in BY_NAME_ONLY]
    reasons = []
    for name in asked:
        reason, module = refusal(name, implementations[name], inputs)
        if module is not None:
            logger.debug("%s", implementations[name])
            return module.compute(*inputs)
        reasons.append(f"  {name}: {reason}")
    raise NoImplementationError("no implementation accepts these inputs:\n" + "\n".join(reasons))
