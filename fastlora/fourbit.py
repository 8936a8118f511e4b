"""A bitsandbytes 4-bit weight as plain tensors and numbers, the form that ops and autograd take."""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.compat import as_plain_tensor
from fastlora.ops import overload

decode_4bit = overload("decode_4bit")


class Weight4bit(NamedTuple):
    """The fields of a bitsandbytes ``QuantState`` (NF4 or FP4, nested statistics or not) and its packed bytes."""

    packed: Tensor  # uint8, two weights a byte
    absmax: Tensor  # fp32 per block, or uint8 if the statistics are nested
    code2: Tensor | None  # nested statistics: code book, scales, offset
    absmax2: Tensor | None
    offset: Tensor | None
    blocksize: int
    blocksize2: int
    quant_type: str
    N: int
    K: int

    def decode(self, dtype: torch.dtype) -> Tensor:
        """``dtype[N, K]``"""
        return decode_4bit(*self, dtype, None, None, 1.0)

    def decode_merged(self, dtype: torch.dtype, a: Tensor, b: Tensor, s: float) -> Tensor:
        """``decode + s * b @ a`` in fp32, rounded once to dtype."""
        return decode_4bit(*self, dtype, a, b, s)


WEIGHT_TENSORS = 5  # the first fields of a Weight4bit, which may be None; the rest are numbers


def is_4bit(weight: Any) -> bool:
    """Whether this parameter is a bitsandbytes 4-bit weight, quantised or still to be."""
    return type(weight).__name__ == "Params4bit"


def quantisation_tensors(parameter: Any) -> list[Tensor]:
    """What a 4-bit parameter's quant_state holds, which is weight too; nothing for another parameter."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *nested]


def weight_4bit(weight: Any) -> Weight4bit:
    """Read a ``bitsandbytes.nn.Params4bit`` without copying it.

    Raises ValueError if it is not quantised yet, or was repacked by bitsandbytes for CPU inference (its bytes are then
    not in the format that its ``quant_state`` describes).
    """
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise ValueError("this 4-bit weight is not quantised yet: move its layer to a device with .to(device) first")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "this 4-bit weight was repacked in place by bitsandbytes for CPU inference (a forward of its Linear4bit in "
            "eval mode without gradients); calling state_dict() on that layer restores the standard format"
        )
    if state.absmax.dim() == 2:  # bitsandbytes' way back from its CPU format leaves flat statistics transposed, in bf16
        state.absmax = state.absmax.t().flatten().float()
    return packed_weight(as_plain_tensor(weight), state)


def packed_weight(packed: Tensor, state: Any) -> Weight4bit:
    """These bytes, as bitsandbytes' ``QuantState`` describes them. Of a stack of weights the rows are one matrix's."""
    nested = state.nested
    return Weight4bit(
        packed=packed.view(torch.uint8),
        absmax=state.absmax,
        code2=state.state2.code if nested else None,
        absmax2=state.state2.absmax if nested else None,
        offset=state.offset if nested else None,
        blocksize=state.blocksize,
        blocksize2=state.state2.blocksize if nested else 0,
        quant_type=state.quant_type,
        N=prod(state.shape[:-1]),
        K=state.shape[-1],
    )
