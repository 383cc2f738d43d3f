"""What the devices of this machine can do."""

import torch

TRITON_ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def triton_architecture(tensor: torch.Tensor) -> str:
    """The key of a kernel's launch table for the device that holds the tensor.

    On a CPU only Triton's interpreter runs, and any entry will do.
    """
    if tensor.device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(tensor.device)[0]
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")  # sm_86, sm_89, sm_12x: the instructions of sm_80
