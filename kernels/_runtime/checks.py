"""Input checks with one style of message: what was given, what is needed."""

from collections.abc import Sequence

import torch


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int | str],
    *,
    dtypes: Sequence[torch.dtype] = (),
    device: torch.device | None = None,
) -> None:
    """Raise ValueError unless the tensor has this shape, one of these dtypes and this device.

    Args:
        name: the argument's name, for the message.
        tensor: what was given.
        shape: a number fixes a size; a letter names a free one.
        dtypes: the accepted ones; empty accepts all.
        device: the required one, or None.
    """
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    wanted = "[" + ", ".join(map(str, shape)) + "]"
    if tensor.ndim != len(shape) or any(
        isinstance(size, int) and size != given for size, given in zip(shape, tensor.shape, strict=True)
    ):
        raise ValueError(f"{name} must have shape {wanted}, got {list(tensor.shape)}")
    if dtypes and tensor.dtype not in dtypes:
        names = " | ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
