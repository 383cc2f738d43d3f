"""lora_gradient_sketch on a GPU: torch_blocked.py runs there until this file holds a kernel."""

from fastsel.kernels.lora_gradient_sketch.options import GradientSketch


def unsupported(*inputs: object) -> str | None:
    """There is no kernel yet."""
    return "is not written yet; torch runs on any device"


def compute(*inputs: object) -> GradientSketch:
    """Never called: unsupported() refuses everything."""
    raise AssertionError("refused by unsupported()")
