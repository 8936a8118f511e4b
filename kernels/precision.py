"""How a dot of fp32 tiles is computed."""

import torch
from torch import Tensor


def dot_precision(x: Tensor) -> str:
    """``"ieee"`` unless the user allowed TF32 for fp32 products (``torch.set_float32_matmul_precision``)."""
    return "ieee" if x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"
