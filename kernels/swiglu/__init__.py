"""silu(gate) * up, the gate of a Llama's MLP, and its gradient; silu(gate) is never kept."""

from fastsel.kernels.swiglu.api import swiglu, swiglu_gradient

__all__ = ["swiglu", "swiglu_gradient"]
