"""What launchers ask of their operands before a kernel reads them: pointers know no bounds."""

from math import prod
from typing import NamedTuple

from fastlora.kernels.launch import Layout, cached_by_layout


class Packed(NamedTuple):
    """The layout of a 4-bit weight [N, K]: of its bytes and statistics, and what says how to read them."""

    packed: Layout
    absmax: Layout
    code2: Layout | None
    absmax2: Layout | None
    offset: Layout | None
    blocksize: int
    blocksize2: int
    quant_type: str
    N: int
    K: int


@cached_by_layout
def check_operands(
    like: Layout, p: float = 0.0, seed: Layout | None = None, /, **operands: tuple[Layout | None, tuple]
) -> None:
    """Raise ValueError unless every operand that is given has this shape, on like's device, and dropout its seed."""
    for name, (t, shape) in operands.items():
        if t is not None and (t.shape != shape or t.device != like.device):
            raise ValueError(f"{name} must be {list(shape)} on {like.device}, got {list(t.shape)} on {t.device}")
    if p != 0.0 and (seed is None or prod(seed.shape) != 1 or seed.device != like.device):
        got = "None" if seed is None else f"{list(seed.shape)} on {seed.device}"
        raise ValueError(f"dropout needs a seed of one element on {like.device}, got {got}")


def check_4bit(w: Packed) -> None:
    """Raise ValueError unless these are the bytes and statistics of a 4-bit weight."""
    if w.quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type must be nf4 or fp4, got {w.quant_type}")
    blocks = -(-w.N * w.K // w.blocksize)
    least = {"packed": -(-w.N * w.K // 2), "absmax": blocks}
    if w.code2 is not None:
        least |= {"code2": 256, "absmax2": -(-blocks // w.blocksize2), "offset": 1}
    for name, length in least.items():
        t = getattr(w, name)
        if t is None or prod(t.shape) < length or not _is_contiguous(t) or t.device != w.packed.device:
            got = "None" if t is None else f"{list(t.shape)} of strides {list(t.stride)} on {t.device}"
            raise ValueError(
                f"{name} of a 4-bit weight [{w.N}, {w.K}] must be {length} contiguous elements on {w.packed.device}, "
                f"got {got}"
            )


def _is_contiguous(t: Layout) -> bool:
    inner = [prod(t.shape[i + 1 :]) for i in range(len(t.shape))]
    return 0 in t.shape or all(n == 1 or step == each for n, step, each in zip(t.shape, t.stride, inner, strict=True))
