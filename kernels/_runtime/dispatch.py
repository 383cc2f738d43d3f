"""Choosing an implementation: ask each in order, run the first that accepts, otherwise say why each refused."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from types import ModuleType
from typing import Any

logger = logging.getLogger("fastsel.kernels")
AUTO = "auto"
# Runs only when it is asked for by name: it is written to be read, not to be fast.
BY_NAME_ONLY = frozenset({"reference"})

_record: ContextVar[dict[str, str] | None] = ContextVar("fastsel_what_ran", default=None)


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


@contextmanager
def recording() -> Iterator[dict[str, str]]:
    """Inside, operation -> the code that ran it, filled as operations run: {"tree_attention": "native-avx512"}.

    The word is the implementation's name, for native code with its instruction set and for Triton with the
    architecture: what decides the last bits of a result.
    """
    ran: dict[str, str] = {}
    token = _record.set(ran)
    try:
        yield ran
    finally:
        _record.reset(token)


def _code(name: str, inputs: tuple[Any, ...]) -> str:
    if name == "native":
        from fastsel.kernels._runtime.native import instruction_set

        return f"native-{instruction_set()}"
    if name == "triton":
        import torch

        from fastsel.kernels._runtime.devices import triton_architecture

        return f"triton-{triton_architecture(next(x for x in inputs if isinstance(x, torch.Tensor)))}"
    return name


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
            record = _record.get()
            if record is not None:
                record[implementations[name].split(".")[-2]] = _code(name, inputs)
            return module.compute(*inputs)
        reasons.append(f"  {name}: {reason}")
    raise NoImplementationError("no implementation accepts these inputs:\n" + "\n".join(reasons))
