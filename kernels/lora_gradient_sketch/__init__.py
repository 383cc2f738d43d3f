"""What one LoRA layer saw of a packed batch -> each example's gradient, stepped, as dot products or as a sketch."""

from fastsel.kernels.lora_gradient_sketch.api import lora_gradient_sketch
from fastsel.kernels.lora_gradient_sketch.options import AdamStep, GradientSketch, SketchSpec

__all__ = ["AdamStep", "GradientSketch", "SketchSpec", "lora_gradient_sketch"]
