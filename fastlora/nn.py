"""The adapted linear layer, and the MLP of three of them, as modules."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.base_layers import base_kind, is_hooked
from fastlora.calls import calls_of
from fastlora.dora import column_scale
from fastlora.fourbit import is_4bit, weight_4bit
from fastlora.functional import (
    Adapter,
    adapted_forward,
    adapted_row_norms,
    check_dropout,
    is_finite_number,
    mlp_forward,
    refuse_transforms,
)
from fastlora.fused_block import mlp_layers
from fastlora.kernels.limits import ACTIVATIONS
from fastlora.proof import prove
from fastlora.reference import activate
from fastlora.siblings import Siblings, siblings_among


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank adapter, computed by fastlora.

    Equivalent: ``base_layer(x) + scaling * F.linear(F.linear(F.dropout(x, lora_dropout, training), lora_A), lora_B)``

    Parameters ``lora_A [r, in_features]`` (Kaiming-uniform, or normal with std 1/r if ``init_lora_weights="gaussian"``)
    and ``lora_B [out_features, r]`` (zero); the base layer is the submodule ``base_layer``. ``scaling`` is
    ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``. With ``use_dora`` the rows of
    ``weight + scaling * lora_B @ lora_A`` have trained norms, ``lora_magnitude_vector [out_features]``, which begin as
    the weight's own. The base weight is frozen; its bias keeps its requires_grad. Takes ``[..., in_features]``, gives
    ``[..., out_features]``.

    Args:
        in_features, out_features, bias, device, dtype: of the frozen ``nn.Linear`` made here; see also `from_linear`.
        r, lora_alpha, lora_dropout, use_rslora, use_dora, init_lora_weights: as in PEFT's ``LoraConfig``.
        adapter_dtype: of what is trained; by default fp32 on a half-precision or quantised base, else the base's.

    Raises:
        ValueError: r or the dropout is out of range, or init_lora_weights is unknown.
        TypeError: the base is not a linear layer, or for DoRA not one whose weight is known, or r is not an integer.

    Source: arXiv:2106.09685 (LoRA), arXiv:2312.03732 (rank-stabilised scaling), arXiv:2305.14314 (QLoRA),
    arXiv:2402.09353 (DoRA).
    """

    base_layer: Any
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base_layer = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._adapt(base_layer, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype, use_dora)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
    ) -> "LoRALinear":
        """Adapt an existing layer, which becomes ``base_layer`` (not copied; its weight is frozen).

        ``nn.Linear`` and bitsandbytes' ``Linear4bit`` (NF4 or FP4, nested statistics or not) are fused; any other
        module with in_features and out_features computes its own output, and the adapter is added to it: without DoRA,
        which has to read the weight.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adapt(linear, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype, use_dora)
        return layer

    def _adapt(
        self, base_layer, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype, use_dora
    ) -> None:
        K, N = features_of(base_layer)
        check_rank_and_start(r, init_lora_weights)
        check_dropout(lora_dropout)
        if r > min(N, K):
            message = f"r={r} exceeds min(in_features, out_features)={min(N, K)}: the adapter is overcomplete"
            warnings.warn(message, stacklevel=3)
        weight = getattr(base_layer, "weight", None)
        if isinstance(weight, nn.Parameter):
            if not is_4bit(weight) and base_kind(base_layer) == "dense" and not weight.is_floating_point():
                raise TypeError(f"the base weight must be floating point, got {weight.dtype}")
            weight.requires_grad_(False)
        self.base_layer = base_layer
        self.lora_dropout = lora_dropout
        self.lora_A, self.lora_B = new_factors(base_layer, N, K, r, init_lora_weights, adapter_dtype)
        self.set_scaling(lora_alpha, use_rslora)
        self.lora_magnitude_vector: nn.Parameter | None = None
        if use_dora:
            if base_kind(base_layer) == "opaque":
                raise TypeError(
                    f"DoRA needs the weight of its base layer; that of {type(base_layer).__name__} is unknown"
                )
            self.lora_magnitude_vector = nn.Parameter(self._row_norms().to(self.lora_A.dtype))
        self._unmerged_weight: Tensor | None = None
        self._siblings: Siblings | None = None  # set by add_lora, which knows the tree

    def set_scaling(self, lora_alpha: float, use_rslora: bool = False) -> None:
        """``scaling = lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with use_rslora. ValueError unless it is finite."""
        self.scaling = scaling_of(lora_alpha, self.r, use_rslora)
        self.lora_alpha, self.use_rslora = lora_alpha, use_rslora

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            calls = calls_of(self)
            if self.merged:
                calls.falls_back("its adapter is merged", asked_for=True)
            else:
                calls.ran(base_kind(self.base_layer))
        if self._unmerged_weight is not None:
            return self.base_layer(x)
        refuse_transforms()
        return adapted_forward(self.base_layer, x, self.adapter(), self._siblings, self)

    def adapter(self) -> Adapter:
        """What this layer adds to its base layer now."""
        p = self.lora_dropout if self.training else 0.0
        return Adapter(self.lora_A, self.lora_B, self.scaling, p, None, self.lora_magnitude_vector)

    def _row_norms(self) -> Tensor:
        """``‖weight + scaling * lora_B @ lora_A‖`` by row."""
        return adapted_row_norms(self.base_layer, self.adapter(), torch.float32)

    def operands(self, x: Tensor) -> tuple[Any, Adapter] | None:
        """The base layer and its adapter, for a block that computes several layers as one; None if not now."""
        if self.merged or is_hooked(self) or is_hooked(self.base_layer):
            return None
        return self.base_layer, self.adapter()

    def operands_now(self) -> tuple[Any, str, Adapter] | None:
        """The base layer, its `base_kind` and the adapter; None if the adapter is merged."""
        return None if self.merged else (self.base_layer, base_kind(self.base_layer), self.adapter())

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    @property
    def in_features(self) -> int:
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[0]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, where model code expects a linear layer to have it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def use_dora(self) -> bool:
        return self.lora_magnitude_vector is not None

    @property
    def merged(self) -> bool:
        return self._unmerged_weight is not None

    def merged_weight(self) -> Tensor:
        """``weight + scaling * lora_B @ lora_A`` in fp32, rounded once to the base's dtype; 4-bit weights are decoded.
        With DoRA its rows are multiplied by ``lora_magnitude_vector`` over their norms.

        Raises ValueError if the adapter has a NaN or infinity, TypeError if the base weight cannot be read.
        """
        a, b = self.lora_A.detach(), self.lora_B.detach()
        m = self.lora_magnitude_vector
        if not all(t.isfinite().all() for t in (a, b, m) if t is not None):
            raise ValueError("the adapter has NaN or infinite values and is not merged")
        kind = base_kind(self.base_layer)
        if kind not in ("dense", "4bit"):
            raise TypeError(f"cannot merge into a {type(self.base_layer).__name__}: only nn.Linear and Linear4bit")
        weight = self.base_layer.weight
        if kind == "4bit":
            dtype = weight.quant_state.dtype
            merged = weight_4bit(weight).decode_merged(dtype if m is None else torch.float32, a, b, self.scaling)
        else:
            dtype, wide = weight.dtype, torch.promote_types(weight.dtype, torch.float32)
            merged = torch.addmm(weight.detach().to(wide), b.to(wide), a.to(wide), alpha=self.scaling)
        if m is not None:
            merged = merged * column_scale(m, self._row_norms()).unsqueeze(1)
        return merged.to(dtype)

    def merge(self) -> None:
        """Fold the adapter into the base weight; `unmerge` gives the old weight back bit for bit, which is kept."""
        if self._unmerged_weight is not None:
            return
        merged, old = self.merged_weight(), self.base_layer.weight
        if is_4bit(old):
            self._set_4bit(_requantise(merged, old))
        else:
            self.base_layer.weight = nn.Parameter(merged, requires_grad=False)
        self._unmerged_weight = old

    def unmerge(self) -> None:
        """Undo `merge`, exactly."""
        old, self._unmerged_weight = self._unmerged_weight, None
        if old is None:
            return
        if is_4bit(old):
            self._set_4bit(old)
        else:
            self.base_layer.weight = old

    def _set_4bit(self, weight: Any) -> None:
        self.base_layer.weight = weight
        self.base_layer.quant_state = weight.quant_state

    def extra_repr(self) -> str:
        return (
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, "
            f"use_rslora={self.use_rslora}, use_dora={self.use_dora}{', merged' if self.merged else ''}"
        )


class LoRAMLP(nn.Module):
    """The MLP of a transformer block, frozen, with a trainable low-rank adapter on each layer, as one function.

    Equivalent: ``down_proj(act(gate_proj(x)) * up_proj(x))``, or ``down_proj(act(up_proj(x)))`` without a gate, for the
    `LoRALinear` layers of these names. The input of down_proj is not saved but recomputed in backward.
    Takes ``[..., in_features]``, gives ``[..., out_features]``.

    Args:
        in_features, hidden_features, out_features: of the layers made here; out_features is in_features unless given.
            See also `from_mlp`.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, ``"quick_gelu"``, ``"relu"`` or ``"relu2"``.
        gated: whether there is a gate_proj (SwiGLU, GeGLU).
        bias, device, dtype, and the adapters' arguments: as for `LoRALinear`.

    Raises: ValueError if the activation is unknown, and what `LoRALinear` raises.

    Source: arXiv:2002.05202 (GLU variants).
    """

    gate_proj: LoRALinear | None

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__()
        wide = (in_features, hidden_features)
        layers = [LoRALinear(*wide, bias=bias, **arguments) for _ in range(2 if gated else 1)]
        narrow = (hidden_features, in_features if out_features is None else out_features)
        self._compose([*layers, LoRALinear(*narrow, bias=bias, **arguments)], activation)

    @classmethod
    def from_mlp(cls, mlp: nn.Module, **arguments: Any) -> "LoRAMLP":
        """Adapt the layers of an existing MLP, which are not copied; ``arguments`` as for `LoRALinear.from_linear`.

        Which layer is which, and the activation, is proven (`fastlora.proof`). Raises ValueError if it is no such MLP.
        """
        bases = mlp_layers(mlp, lambda child: hasattr(child, "in_features"))
        reason = "it has not two or three linear layers in the shape of an MLP"
        block = prove(mlp, bases) if bases else reason
        if not isinstance(block, str) and block.gate_first is not None:
            block = "one layer gives gate and up; `add_lora` computes it as one where it is"
        elif not isinstance(block, str) and (block.inside, block.after) != (None, None):
            block = "it has dropout besides that of adapters; `add_lora` computes it as one where it is"
        if isinstance(block, str):
            raise ValueError(f"cannot make a LoRAMLP of this {type(mlp).__name__}: {block}")
        with unchanged_on_error(mlp):
            layers = [LoRALinear.from_linear(bases[name], **arguments) for name in block.layers]
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new._compose(layers, block.activation)
        return new.train(mlp.training)

    def _compose(self, layers: list[Any], activation: str) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        *gate, self.up_proj, self.down_proj = layers
        self.gate_proj = gate[0] if gate else None
        self.activation = activation
        for layer, siblings in siblings_among({str(i): layer for i, layer in enumerate((*gate, self.up_proj))}):
            layer._siblings = siblings

    def forward(self, x: Tensor) -> Tensor:
        refuse_transforms()
        layers = [layer for layer in (self.gate_proj, self.up_proj, self.down_proj) if layer is not None]
        y = mlp_forward(x, [layer.operands(x) for layer in layers], self.activation)
        if y is not None:
            return y
        *first, down = layers
        h = activate(first[0](x), self.activation)
        return down(h if len(first) == 1 else h * first[1](x))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


def features_of(base_layer: Any) -> tuple[int, int]:
    """in_features and out_features. Raises TypeError if this is not a linear layer."""
    K, N = (getattr(base_layer, name, None) for name in ("in_features", "out_features"))
    if not isinstance(base_layer, nn.Module) or not isinstance(K, int) or not isinstance(N, int):
        raise TypeError(f"expected a linear layer with in_features and out_features, got {type(base_layer).__name__}")
    return K, N


def new_factors(
    base_layer: nn.Module, N: int, K: int, r: int, init_lora_weights: bool | str, dtype: torch.dtype | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """a [r, K], started, and b [N, r] of zeros, on the device of the base; fp32 unless said, or fp64 on one of fp64."""
    weight = getattr(base_layer, "weight", None)
    like = weight if isinstance(weight, Tensor) else next(base_layer.parameters(), torch.empty(0))
    new: Any = {
        "device": like.device,
        "dtype": dtype or (torch.float64 if like.dtype == torch.float64 else torch.float32),
    }
    a, b = nn.Parameter(torch.empty(r, K, **new)), nn.Parameter(torch.zeros(N, r, **new))
    start_lora_A(a, r, init_lora_weights)
    return a, b


def check_rank_and_start(r: Any, init_lora_weights: Any) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an integer, got {r!r}")
    if r <= 0:
        raise ValueError(f"r must be positive, got {r}")
    if init_lora_weights not in (True, "kaiming", "gaussian"):
        raise ValueError(f'init_lora_weights must be True, "kaiming" or "gaussian", got {init_lora_weights!r}')


def start_lora_A(a: Tensor, r: int, init_lora_weights: bool | str) -> None:
    """Fill lora_A, of one layer or of experts below each other."""
    if init_lora_weights == "gaussian":
        nn.init.normal_(a, std=1 / r)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))


def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    if not is_finite_number(lora_alpha):
        raise ValueError(f"lora_alpha must be a finite number, got {lora_alpha!r}")
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Give every parameter its requires_grad back if the block raises: making adapted layers freezes their bases."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        raise


def _requantise(weight: Tensor, like: Any) -> Any:
    """Quantise a dense weight as the 4-bit parameter ``like`` was, by bitsandbytes."""
    parameter = type(like)(
        weight,
        requires_grad=False,
        quant_type=like.quant_type,
        blocksize=like.blocksize,
        compress_statistics=like.compress_statistics,
        quant_storage=like.quant_storage,
    )
    return parameter.to(weight.device)
