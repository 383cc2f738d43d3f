"""TRAK's projectors, for LESS, TRAK and DataFlex: one import changes, nothing else.

    from trak.projectors import BasicProjector, CudaProjector, ProjectionType            # before
    from fastsel.integrations.trak import BasicProjector, CudaProjector, ProjectionType  # after

Projector (CudaProjector is another name of it) runs on CPUs and GPUs alike. Its matrix is a function of seed, model_id
and coordinate alone: the same on every device and GPU model, whatever the batch. Gradients projected on different
machines compare, which they do not with TRAK's CUDA kernel, whose matrix depends on the number of multiprocessors.
BasicProjector gives the bits of TRAK 0.3.2's; FastJlProjector the matrix that its CUDA kernel has on a GPU of so many
multiprocessors, for stores that were written there. As in TRAK nothing is scaled by 1 / sqrt(proj_dim); "sjlt" keeps
lengths.
"""

from collections.abc import Mapping
from enum import Enum

import torch

from fastsel.kernels.random_projection import fast_jl_projection, random_projection, trak_basic_projection


class ProjectionType(str, Enum):
    """Which random matrix: TRAK's two names, and "sjlt", about a hundred times faster than "rademacher"."""

    normal = "normal"
    rademacher = "rademacher"
    sjlt = "sjlt"


class Projector:
    """Projects gradients by signs from a counter hash; takes the place of TRAK's CudaProjector.

    Args:
        grad_dim: coordinates of a gradient.
        proj_dim: numbers of a projection; any, not only multiples of 512.
        seed: of the matrix; another model_id gives another matrix.
        proj_type: "rademacher" or "sjlt".
        device: where gradients are moved to.
        max_batch_size: taken for TRAK's sake; batches have no limit here.
        dtype: of what project returns, float32 as from TRAK's CudaProjector.
        block_size: taken for TRAK's sake.
        sparsity: entries of the matrix for each coordinate, "sjlt" only.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        max_batch_size: int = 32,
        *,
        dtype: torch.dtype = torch.float32,
        block_size: int = 100,
        sparsity: int = 1,
    ) -> None:
        self.proj_type = ProjectionType(proj_type)
        if self.proj_type == ProjectionType.normal:
            raise ValueError("proj_type='normal' has no hashed matrix: take 'rademacher', 'sjlt', or BasicProjector")
        self.grad_dim, self.proj_dim, self.seed = grad_dim, proj_dim, seed
        self.device, self.dtype, self.sparsity = torch.device(device), dtype, sparsity
        self.max_batch_size, self.block_size = max_batch_size, block_size

    def project(self, grads: torch.Tensor | Mapping[str, torch.Tensor], model_id: int) -> torch.Tensor:
        """Project a batch.

        Args:
            grads: [b, grad_dim], or tensors [b, ...] that are flattened and follow one another in the mapping's order,
                without being joined in memory.
            model_id: number of the checkpoint; LESS uses 0 for all.

        Returns:
            [b, proj_dim].

        Raises:
            ValueError: grads do not hold grad_dim coordinates for each example.
        """
        pieces = _pieces(grads, self.grad_dim)
        accumulate = torch.float64 if pieces[0].dtype == torch.float64 else torch.float32
        out = torch.zeros(len(pieces[0]), self.proj_dim, dtype=accumulate, device=self.device)
        first = 0
        for piece in pieces:
            random_projection(
                piece.to(self.device), self.proj_dim, kind=self.proj_type.value, sparsity=self.sparsity,
                seed=self.seed + (model_id << 32), first=first, out=out,
            )  # fmt: skip
            first += piece.shape[1]
        return out.to(self.dtype)

    def free_memory(self) -> None:
        """Nothing is held."""


CudaProjector = Projector


class BasicProjector:
    """The numbers of TRAK 0.3.2's BasicProjector, bit for bit where torch's generator gives the same bits.

    Its cost too: the matrix, grad_dim x block_size, is drawn again for each block and call.

    Args:
        grad_dim, proj_dim, seed, proj_type, device, block_size, dtype, model_id: as there.
        max_batch_size: taken for the sake of callers that build either projector, as LESS does.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        block_size: int = 100,
        dtype: torch.dtype = torch.float32,
        model_id: int = 0,
        *,
        max_batch_size: int | None = None,
    ) -> None:
        self.proj_type = ProjectionType(proj_type)
        if self.proj_type == ProjectionType.sjlt:
            raise ValueError("BasicProjector gives TRAK's matrices, rademacher and normal; Projector has sjlt")
        self.grad_dim, self.proj_dim, self.seed = grad_dim, proj_dim, seed
        self.device, self.dtype, self.block_size = torch.device(device), dtype, block_size
        self.model_id, self.max_batch_size = model_id, max_batch_size

    def project(self, grads: torch.Tensor | Mapping[str, torch.Tensor], model_id: int) -> torch.Tensor:
        """As Projector.project; returns dtype, summed in dtype."""
        x = torch.cat([piece.to(self.device, self.dtype) for piece in _pieces(grads, self.grad_dim)], dim=1)
        self.model_id = model_id
        return trak_basic_projection(
            x, self.proj_dim, seed=self.seed, model_id=model_id, block_size=self.block_size,
            kind=self.proj_type.value, dtype=self.dtype,
        )  # fmt: skip

    def free_memory(self) -> None:
        """Nothing is held between calls."""


class FastJlProjector:
    """The matrix of TRAK's CudaProjector ("rademacher") on a GPU with num_sms multiprocessors, emulated on the CPU.

    For features of target rows that are to be compared with a store that LESS wrote on such a GPU (108 multiprocessors:
    A100; 132: H100 SXM); see fastsel.kernels.random_projection.fast_jl. Not compared with a GPU yet.

    Args:
        grad_dim, proj_dim, seed, proj_type, device, max_batch_size: as CudaProjector's; proj_dim a multiple of 512.
        num_sms: torch.cuda.get_device_properties(i).multi_processor_count there.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        max_batch_size: int = 32,
        *,
        num_sms: int,
    ) -> None:
        self.proj_type = ProjectionType(proj_type)
        if self.proj_type != ProjectionType.rademacher:
            raise ValueError(f"only proj_type='rademacher' is emulated, got {self.proj_type.value!r}")
        self.grad_dim, self.proj_dim, self.seed, self.num_sms = grad_dim, proj_dim, seed, num_sms
        self.device, self.max_batch_size = torch.device(device), max_batch_size

    def project(self, grads: torch.Tensor | Mapping[str, torch.Tensor], model_id: int) -> torch.Tensor:
        """As Projector.project; float32."""
        x = torch.cat([piece.to(self.device) for piece in _pieces(grads, self.grad_dim)], dim=1)
        return fast_jl_projection(x, self.proj_dim, num_sms=self.num_sms, seed=self.seed, model_id=model_id)

    def free_memory(self) -> None:
        """Nothing is held between calls."""


def _pieces(grads: torch.Tensor | Mapping[str, torch.Tensor], grad_dim: int) -> list[torch.Tensor]:
    """The gradients as matrices [b, ...] that hold grad_dim columns in all."""
    tensors = [grads] if isinstance(grads, torch.Tensor) else list(grads.values())
    pieces = [tensor.detach().flatten(1) for tensor in tensors]
    columns = sum(piece.shape[1] for piece in pieces)
    if columns != grad_dim or len({len(piece) for piece in pieces}) > 1:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors) or "nothing"
        raise ValueError(f"grads must hold {grad_dim} coordinates for each example, got {shapes}: {columns}")
    return pieces
