"""What is sown and perturbed, recorded, and its derivatives."""

from nnx_bridge.captures._context import capture
from nnx_bridge.captures._derivatives import (
    CapturedGrad,
    CapturedJvp,
    capture_grad,
    capture_jvp,
)

__all__ = ["CapturedGrad", "CapturedJvp", "capture", "capture_grad", "capture_jvp"]
