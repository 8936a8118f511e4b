"""A transformer block in plain torch, and a watch on the ops that a step through it runs."""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# Widths that 4-bit blocks divide: with AVX-512, bitsandbytes 0.50 decodes a row that ends within a block wrongly.
HIDDEN, HEADS, MLP = 64, 4, 128


class Attention(nn.Module):
    def __init__(self, kv=HIDDEN // 2):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, kv)
        self.v_proj, self.o_proj = nn.Linear(HIDDEN, kv), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        heads = [layer(x).unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2) for layer in self.projections()]
        y = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def projections(self):
        return self.q_proj, self.k_proj, self.v_proj


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, MLP, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(MLP, HIDDEN, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.attention, self.mlp = Attention(), SwiGLU()

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def randomise(model: nn.Module) -> nn.Module:
    """Give every adapter's b values, as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 10)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def graph_of(y: torch.Tensor) -> set:
    """The autograd nodes that y depends on."""
    found, ahead = set(), [y.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found.add(node)
            ahead += [parent for parent, _ in node.next_functions]
    return found


class CountOps(TorchDispatchMode):
    """How often each op ran, ``names``, and each product of fastlora's with a base weight, by the weight: ``bases``."""

    def __init__(self):
        super().__init__()
        self.names, self.bases = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.names[name] += 1
        if name == "fastlora::lora_matmul":
            self.bases[args[1].data_ptr()] += 1
        elif name == "fastlora::lora_matmul_group":
            self.bases.update(w.data_ptr() for w in args[1])
        elif name in ("aten::mm", "aten::addmm", "aten::addmm_"):  # PEFT's layers, and products with a decoded weight
            self.bases.update(t.data_ptr() for t in args if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))
