"""What becomes of a gradient (AdamStep, SketchSpec), and what comes back (GradientSketch)."""

from typing import NamedTuple

import torch


class AdamStep(NamedTuple):
    """What Adam would do with a gradient g, for an optimizer state (m, v) that stays as it is:

        gamma = m' / sqrt(v' + eps)   (eps_inside),   or   m' / (sqrt(v') + eps)
        m' = (beta1 m + (1 - beta1) g) / correction1,   or g without momentum
        v' = (beta2 v + (1 - beta2) g^2) / correction2,   or v / correction2 when frozen

    A coordinate whose denominator is 0 (no gradient has ever reached it, and eps is 0) has gamma 0. The defaults are
    LESS's released code; correction1 = 1 - beta1^t, correction2 = 1 - beta2^t and eps_inside=False are Adam as
    published; momentum=False, frozen=True, eps_inside=False is Bergson's normaliser.

    exp_avg: [p_module] float32 | float64, m; None without momentum.    exp_avg_sq: [p_module] same, v >= 0.
    beta1, beta2: 0 to 1.    eps: at least 0.    correction1, correction2: above 0.
    """

    exp_avg: torch.Tensor | None
    exp_avg_sq: torch.Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_inside: bool = True
    correction1: float = 1.0
    correction2: float = 1.0
    momentum: bool = True
    frozen: bool = False

    def factors(self) -> tuple[float, float, float, float]:
        """(a, b, c, d) of m' = a m + b g and v' = c v + d g^2."""
        a, b = (self.beta1 / self.correction1, (1 - self.beta1) / self.correction1) if self.momentum else (0.0, 1.0)
        c, d = (1.0, 0.0) if self.frozen else (self.beta2, 1 - self.beta2)
        return a, b, c / self.correction2, d / self.correction2


class SketchSpec(NamedTuple):
    """A random projection to k numbers, as kernels/random_projection computes it of the whole parameter vector.

    k: 1 to 2^31 - 1.    seed: of its signs and rows.    first: coordinate number of the module's first parameter.
    sparsity: nonzeros of a coordinate, 1 to k (SJLT).    kind: "sjlt" or "rademacher".
    """

    k: int
    seed: int = 0
    first: int = 0
    sparsity: int = 1
    kind: str = "sjlt"


class GradientSketch(NamedTuple):
    """Of each example: dots [n, s] float64 or None, sqnorms [n] float64, sketch [n, k] float32 (float64) or None."""

    dots: torch.Tensor | None
    sqnorms: torch.Tensor
    sketch: torch.Tensor | None
