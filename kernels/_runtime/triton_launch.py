"""What a wrapper launches on a GPU, as data: the proofs without a GPU compile exactly what users run."""

import os
from typing import Any, NamedTuple

import torch

# With TRITON_INTERPRET=1 Triton runs every kernel in Python on CPU tensors; it is read once, when Triton is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Launch(NamedTuple):
    """One launch of a Triton kernel.

    kernel: the @triton.jit function.
    grid: number of programs along each axis.
    arguments: tensors, numbers and None by parameter name.
    constants: tl.constexpr parameters by name.
    options: num_warps, num_stages and what else the compiler is told.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        """Launch on the device that holds the tensors (nothing happens for an empty grid)."""
        if 0 in self.grid:
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, torch.Tensor))
        # Triton launches on the current device, which need not be the one that holds the tensors.
        with torch.cuda.device(device if device.type == "cuda" else -1):
            self.kernel[self.grid](**self.arguments, **self.constants, **compiler_options(self))


class Programs(NamedTuple):
    """Some programs of a launch that do the same amount of work.

    number: how many there are.
    inner_passes: how often one of them goes through each innermost loop of matrix products, in the kernel's order.
    outer_passes: how often it goes through the loop around those.
    """

    number: int
    inner_passes: tuple[int, ...]
    outer_passes: int


class Work(NamedTuple):
    """What a launch executes, in its grid's order, and the least that its task needs: for predicted times.

    programs: what the programs do.
    flops: of the matrix products in one pass of an innermost loop, padding included.
    cache_bytes: read from the second-level cache in such a pass.
    matrix_units: "16-bit" or "tf32".
    needed_flops, needed_exponentials, needed_bytes: of the task, each once, nothing padded.
    """

    programs: list[Programs]
    flops: int
    cache_bytes: int
    matrix_units: str
    needed_flops: int
    needed_exponentials: int
    needed_bytes: int


def compiler_options(launch: Launch) -> dict[str, Any]:
    """The options of a launch with fused multiply-add stated, whose default Triton 3.9 announces to change."""
    return {"enable_fp_fusion": True, **launch.options}


def no_device(tensor: torch.Tensor) -> str | None:
    """Why Triton cannot run on this tensor's device, or None."""
    if tensor.device.type == "cuda" or (INTERPRETED and tensor.device.type == "cpu"):
        return None
    return f"needs a CUDA or ROCm device; these tensors are on {tensor.device.type}"
