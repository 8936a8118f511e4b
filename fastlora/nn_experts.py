"""Adapted experts of a transformers model as a module."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.base_experts import (
    ExpertAdapter,
    KnownGate,
    experts_forward,
    gate_of,
    layout_of,
    weight_names,
    why_not_computed,
    why_not_this_call,
)
from fastlora.calls import calls_of
from fastlora.functional import check_dropout
from fastlora.nn import check_rank_and_start, scaling_of, start_lora_A, unchanged_on_error


class LoRAExperts(nn.Module):
    """Frozen experts of a transformers model with a trainable low-rank adapter for each, computed by fastlora.

    Equivalent: the experts with ``weight[e] + scaling * lora_B[e] @ lora_A[e]`` in the place of their weights, for each
    name in ``parameters``; with dropout, which that cannot have, every expert's adapter gets ``F.dropout`` of its rows.

    Parameters, by the name of the weight: ``lora_A [E, r, K]`` and ``lora_B [E, N, r]`` for a weight ``[E, N, K]``
    (or ``[E, K, N]``, as gpt-oss keeps it), which begin as those of `LoRALinear`. The experts are the submodule
    ``base_layer``; their weights are frozen. Takes what the experts take: ``x [T, K]``, the numbers of each token's
    experts and their weights ``[T, k]``.

    Args:
        experts: a module whose experts transformers' ``ExpertsInterface`` computes, dense or in bitsandbytes' 4 bits.
        parameters: of its stacks of weights, ``gate_up_proj`` (or ``up_proj``) and ``down_proj``; by default both.
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype: as for `LoRALinear`.

    Raises: ValueError, TypeError as `LoRALinear`; TypeError too if the experts are not such a module. A call raises
    RuntimeError if they cannot be computed any more, as when a hook was put on them.
    """

    base_layer: Any

    def __init__(
        self,
        experts: nn.Module,
        parameters: Sequence[str] | None = None,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank_and_start(r, init_lora_weights)
        check_dropout(lora_dropout)
        with unchanged_on_error(experts):
            experts.requires_grad_(False)
            if (reason := why_not_computed(experts)) is not None:
                raise TypeError(f"cannot adapt this {type(experts).__name__}: {reason}")
            names = weight_names(experts)
            if odd := [name for name in parameters or () if name not in names]:
                raise TypeError(f"cannot adapt {', '.join(odd)} of experts whose weights are {' and '.join(names)}")
        self.base_layer = experts
        self.lora_dropout = lora_dropout
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        is_transposed = layout_of(experts).is_transposed
        for name in [name for name in names if parameters is None or name in parameters]:
            weight = getattr(experts, name)
            E, N, K = weight.transpose(1, 2).shape if is_transposed else weight.shape
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            new = {"device": weight.device, "dtype": adapter_dtype or wide}
            a = torch.empty(E * r, K, **new)
            start_lora_A(a, r, init_lora_weights)
            self.lora_A[name] = nn.Parameter(a.view(E, r, K))
            self.lora_B[name] = nn.Parameter(torch.zeros(E, N, r, **new))
        self.set_scaling(lora_alpha, use_rslora)
        self._gate = KnownGate(experts)
        self._unmerged_weights: dict[str, Tensor] = {}

    def set_scaling(self, lora_alpha: float, use_rslora: bool = False) -> None:
        """``scaling = lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with use_rslora. ValueError unless it is finite."""
        self.scaling = scaling_of(lora_alpha, self.r, use_rslora)
        self.lora_alpha, self.use_rslora = lora_alpha, use_rslora

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            calls = calls_of(self)
            if self.merged:
                calls.falls_back("its adapter is merged", asked_for=True)
            else:
                calls.fused += 1
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        reason = why_not_computed(self.base_layer) or why_not_this_call(self.base_layer, x, *args, **kwargs)
        gate = reason or gate_of(self._gate, self.base_layer)
        if isinstance(gate, str):
            raise RuntimeError(f"fastlora: these experts cannot be computed: {gate}")
        p = self.lora_dropout if self.training else 0.0
        adapters = {name: ExpertAdapter(a, self.lora_B[name], self.scaling, p) for name, a in self.lora_A.items()}
        return experts_forward(self.base_layer, gate, x, adapters, *args)

    @property
    def r(self) -> int:
        return next(iter(self.lora_A.values())).shape[1]

    @property
    def use_dora(self) -> bool:
        return False

    @property
    def merged(self) -> bool:
        return bool(self._unmerged_weights)

    def merged_weights(self) -> dict[str, Tensor]:
        """``weight + scaling * lora_B @ lora_A`` of every expert, in fp32, rounded once to the weight's dtype.

        Raises ValueError if the adapter has a NaN or infinity, TypeError if the weights are in 4 bits.
        """
        found = {}
        for name, a in self.lora_A.items():
            b, weight = self.lora_B[name].detach(), self.base_layer._parameters.get(name)
            if weight is None:
                raise TypeError(f"cannot merge into {name} of {type(self.base_layer).__name__}: it is not dense")
            if not (a.isfinite().all() and b.isfinite().all()):
                raise ValueError("the adapter has NaN or infinite values and is not merged")
            wide = torch.promote_types(weight.dtype, torch.float32)
            transposed = layout_of(self.base_layer).is_transposed
            stack = weight.detach().transpose(1, 2) if transposed else weight.detach()
            merged = torch.baddbmm(stack.to(wide), b.to(wide), a.detach().to(wide), alpha=self.scaling).to(weight.dtype)
            found[name] = merged.transpose(1, 2).contiguous() if transposed else merged
        return found

    def merge(self) -> None:
        """Fold the adapters into the weights; `unmerge` gives the old weights back bit for bit, which are kept."""
        if self.merged:
            return
        merged = self.merged_weights()
        self._unmerged_weights = {name: self.base_layer._parameters[name] for name in merged}
        for name, weight in merged.items():
            setattr(self.base_layer, name, nn.Parameter(weight, requires_grad=False))

    def unmerge(self) -> None:
        """Undo `merge`, exactly."""
        for name, weight in self._unmerged_weights.items():
            setattr(self.base_layer, name, weight)
        self._unmerged_weights = {}

    def extra_repr(self) -> str:
        return (
            f"parameters={list(self.lora_A)}, r={self.r}, lora_alpha={self.lora_alpha}, "
            f"lora_dropout={self.lora_dropout}, use_rslora={self.use_rslora}{', merged' if self.merged else ''}"
        )
