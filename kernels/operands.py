"""What launchers ask of their operands before a kernel reads them: pointers know no bounds."""

from math import prod

from fastlora.kernels.launch import Layout


def expect(
    like: Layout, p: float = 0.0, seed: Layout | None = None, /, **operands: tuple[Layout | None, tuple]
) -> None:
    """Raise ValueError unless every operand that is given has this shape, on like's device, and dropout its seed."""
    for name, (t, shape) in operands.items():
        if t is not None and (t.shape != shape or t.device != like.device):
            raise ValueError(f"{name} must be {list(shape)} on {like.device}, got {list(t.shape)} on {t.device}")
    if p != 0.0 and (seed is None or prod(seed.shape) != 1 or seed.device != like.device):
        got = "None" if seed is None else f"{list(seed.shape)} on {seed.device}"
        raise ValueError(f"dropout needs a seed of one element on {like.device}, got {got}")


def expect_4bit(
    packed: Layout,
    absmax: Layout,
    code2: Layout | None,
    absmax2: Layout | None,
    offset: Layout | None,
    blocksize: int,
    blocksize2: int,
    quant_type: str,
    N: int,
    K: int,
) -> None:
    """Raise ValueError unless these are the bytes and statistics of a 4-bit weight [N, K]."""
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type must be nf4 or fp4, got {quant_type}")
    blocks = -(-N * K // blocksize)
    parts: dict[str, tuple[Layout | None, int]] = {"packed": (packed, -(-N * K // 2)), "absmax": (absmax, blocks)}
    if code2 is not None:
        parts |= {"code2": (code2, 256), "absmax2": (absmax2, -(-blocks // blocksize2)), "offset": (offset, 1)}
    for name, (t, least) in parts.items():
        if t is None or prod(t.shape) < least or not _is_contiguous(t) or t.device != packed.device:
            got = "None" if t is None else f"{list(t.shape)} of strides {list(t.stride)} on {t.device}"
            raise ValueError(
                f"{name} of a 4-bit weight [{N}, {K}] must be {least} contiguous elements on {packed.device}, got {got}"
            )


def _is_contiguous(t: Layout) -> bool:
    return all(
        size == 1 or stride == prod(t.shape[i + 1 :]) for i, (size, stride) in enumerate(zip(*t[:2], strict=True))
    )
