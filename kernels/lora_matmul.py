"""``y = x @ w.T + bias + dropout(xa @ b.T, p)``: the adapted layer, and its dx by transposed strides of w and b.

The adapter's product opens the accumulator, as the first K-iterations of one fp32 sum that the base product continues:
dropout's mask then falls on accumulator registers, y is rounded once, and small updates survive that rounding. Any rank
is taken in chunks, padded in registers; xa and b keep their own dtype in memory.

The dx of projections that share their x (q, k, v; gate, up) is the sum of theirs. It is one launch over tuples of
operands, a reduction over all their columns: dx is written once instead of being read and written for each.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels import tiles
from fastlora.kernels.dropout import dropout_scale, dropped_levels, keep_mask
from fastlora.kernels.launch import Launch, Layout, cached_by_layout, layouts
from fastlora.kernels.limits import MAX_GROUP, cdiv, padded_rank
from fastlora.kernels.operands import check_operands
from fastlora.kernels.precision import dot_precision, wide_dot
from fastlora.kernels.tiles import TMA, ByTile, Tile, multiprocessors, name_of_matmul

Layouts = tuple[Layout, ...]


@triton.jit
def _tile_position(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Walk down GROUP_M tiles before stepping right, so that programs running together share rows of x and w in L2."""
    group = pid // (GROUP_M * tiles_n)
    height = min(tiles_m - group * GROUP_M, GROUP_M)
    in_group = pid % (GROUP_M * tiles_n)
    return group * GROUP_M + in_group % height, in_group // height


# fmt: off
@triton.jit
def _adapters(
    xa_ptrs, xa_strides, b_ptrs, b_strides, ranks, seed_ptrs, dropped, scale,
    bias_ptr, offs_m, start_n, M, N,
    PARTS: tl.constexpr, DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """``bias + sum of dropout(xa @ b.T, p)`` of one tile, in fp32: where its accumulator starts."""
    # fmt: on
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(PARTS):
        xa_tile = xa_ptrs[i] + offs_m[:, None].to(tl.int64) * xa_strides[i][0] + offs_r[None, :] * xa_strides[i][1]
        b_tile = b_ptrs[i] + offs_n[None, :].to(tl.int64) * b_strides[i][0]
        b_tile += offs_r[:, None].to(tl.int64) * b_strides[i][1]
        part = tl.zeros_like(acc) if HAS_DROPOUT[i] else acc
        for start in tl.range(0, ranks[i], BLOCK_R, num_stages=2):
            mask_r = start + offs_r < ranks[i]
            xa = tl.load(xa_tile, mask=(offs_m < M)[:, None] & mask_r[None, :], other=0.0)
            b = tl.load(b_tile, mask=(offs_n < N)[None, :] & mask_r[:, None], other=0.0)
            part = wide_dot(xa, b, part, DTYPE, PRECISION)
            xa_tile += BLOCK_R * xa_strides[i][1]
            b_tile += BLOCK_R * b_strides[i][1]
        if HAS_DROPOUT[i]:
            keep = keep_mask(tl.load(seed_ptrs[i]), offs_m, start_n, dropped[i], BLOCK_M, BLOCK_N)
            part = acc + tl.where(keep, part * scale[i], 0.0)
        acc = part
    return acc


# fmt: off
@triton.jit
def _products(
    acc, x_ptrs, x_strides, w_ptrs, w_strides, lengths, offs_m, offs_n, M, N,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """``acc + sum of x @ w.T`` of one tile."""
    # fmt: on
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    for i in tl.static_range(PARTS):
        x_tile = x_ptrs[i] + offs_m[:, None].to(tl.int64) * x_strides[i][0]
        x_tile += offs_k[None, :].to(tl.int64) * x_strides[i][1]
        w_tile = w_ptrs[i] + offs_n[None, :].to(tl.int64) * w_strides[i][0]
        w_tile += offs_k[:, None].to(tl.int64) * w_strides[i][1]
        for k in range(0, lengths[i], BLOCK_K):
            mask_k = offs_k < lengths[i] - k
            x = tl.load(x_tile, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_tile, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
            acc = tl.dot(x, w.to(x.dtype), acc, input_precision=PRECISION)
            x_tile += tl.cast(BLOCK_K, tl.int64) * x_strides[i][1]
            w_tile += tl.cast(BLOCK_K, tl.int64) * w_strides[i][1]
    return acc


# fmt: off
@triton.jit
def _lora_matmul_kernel(
    x_ptrs, x_strides, w_ptrs, w_strides, lengths,
    y_ptr, stride_ym,
    xa_ptrs, xa_strides, b_ptrs, b_strides, ranks, seed_ptrs, dropped, scale, bias_ptr, column_scale_ptr, M, N,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_COLUMN_SCALE: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):
    # fmt: on
    pid_m, pid_n = _tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = _adapters(
        xa_ptrs, xa_strides, b_ptrs, b_strides, ranks, seed_ptrs, dropped, scale, bias_ptr, offs_m, pid_n * BLOCK_N,
        M, N, PARTS, y_ptr.dtype.element_ty, HAS_BIAS, HAS_DROPOUT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    acc = _products(
        acc, x_ptrs, x_strides, w_ptrs, w_strides, lengths, offs_m, offs_n, M, N, PARTS, PRECISION, BLOCK_K
    )

    if HAS_COLUMN_SCALE:
        acc *= tl.load(column_scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None].to(tl.int64) * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


# fmt: off
@triton.jit
def _lora_matmul_tma_kernel(
    x0, x1, x2, w0, w1, w2,  # descriptors: Triton's launcher finds none in a tuple before 3.8
    lengths, y_desc, programs,
    xa_ptrs, xa_strides, b_ptrs, b_strides, ranks, seed_ptrs, dropped, scale, bias_ptr, column_scale_ptr, M, N,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_COLUMN_SCALE: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):
    """The same sum where the hardware copies tiles itself: one program a multiprocessor walks over its tiles."""
    # fmt: on
    x_descs, w_descs = (x0, x1, x2), (w0, w1, w2)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for pid in tl.range(tl.program_id(0), tiles_m * tiles_n, programs):
        pid_m, pid_n = _tile_position(pid, tiles_m, tiles_n, GROUP_M)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = _adapters(
            xa_ptrs, xa_strides, b_ptrs, b_strides, ranks, seed_ptrs, dropped, scale, bias_ptr, offs_m, pid_n * BLOCK_N,
            M, N, PARTS, y_desc.dtype, HAS_BIAS, HAS_DROPOUT, "ieee", BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        for i in tl.static_range(PARTS):
            for k in range(0, lengths[i], BLOCK_K):
                x = x_descs[i].load([pid_m * BLOCK_M, k])
                if TRANSPOSED[i]:
                    acc = tl.dot(x, w_descs[i].load([k, pid_n * BLOCK_N]), acc)
                else:
                    acc = tl.dot(x, w_descs[i].load([pid_n * BLOCK_N, k]).T, acc)
        if HAS_COLUMN_SCALE:
            offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
            acc *= tl.load(column_scale_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        y_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N], acc.to(y_desc.dtype))


def lora_matmul(
    x: Tensor,
    w: Tensor,
    xa: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """``x @ w.T + bias + dropout(xa @ b.T, p)``: [M, K], [N, K], [M, r], [N, r] -> [M, N] in x's dtype; its columns
    times ``scale`` [N] before they are rounded, if that is given."""
    return _lora_matmul((x,), (w,), (xa,), (b,), bias, (p,), (seed,), scale)


def lora_matmul_base_last(
    x: Tensor,
    w: Tensor,
    xa: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """The same with the base product by the vendor's GEMM, which accumulates into the adapter's."""
    y = _lora_matmul((x,), (w,), (xa,), (b,), bias, (p,), (seed,), scale, with_base=False).addmm_(x, w.t())
    return y if scale is None else y.mul_(scale)


def lora_matmul_group(
    x: Sequence[Tensor],
    w: Sequence[Tensor],
    xa: Sequence[Tensor],
    b: Sequence[Tensor],
    p: Sequence[float],
    seed: Sequence[Tensor | None],
) -> Tensor:
    """``sum(lora_matmul(x_i, w_i, xa_i, b_i, None, p_i, seed_i) for ...)``, rounded once; K, r and masks may differ."""
    return _lora_matmul(tuple(x), tuple(w), tuple(xa), tuple(b), None, tuple(p), tuple(seed))


def lora_matmul_group_base_last(
    x: Sequence[Tensor],
    w: Sequence[Tensor],
    xa: Sequence[Tensor],
    b: Sequence[Tensor],
    p: Sequence[float],
    seed: Sequence[Tensor | None],
) -> Tensor:
    """The same, each base product accumulated by the vendor's GEMM, which rounds the sum every time."""
    y = _lora_matmul(tuple(x), tuple(w), tuple(xa), tuple(b), None, tuple(p), tuple(seed), with_base=False)
    for x_i, w_i in zip(x, w, strict=True):
        y.addmm_(x_i, w_i.t())
    return y


def _lora_matmul(
    xs: tuple[Tensor, ...],
    ws: tuple[Tensor, ...],
    xas: tuple[Tensor, ...],
    bs: tuple[Tensor, ...],
    bias: Tensor | None,
    ps: tuple[float, ...],
    seeds: tuple[Tensor | None, ...],
    column_scale: Tensor | None = None,
    with_base: bool = True,
) -> Tensor:
    """Without the base products nothing is scaled either. Raises ValueError unless the operands fit together."""
    x, M, N = xs[0], xs[0].shape[0], ws[0].shape[0]
    found = layouts(*xs, *ws, *xas, *bs, bias, column_scale, *seeds)
    call = _call(tiles.has_tma(), len(xs), found, ps, with_base, dot_precision(x))
    y = x.new_empty(M, N)
    if M == 0 or N == 0:
        return y
    launch = call()
    adapters = {
        "xa_ptrs": xas,
        "b_ptrs": bs,
        "seed_ptrs": seeds,
        "bias_ptr": None if bias is None else bias.contiguous(),
        "column_scale_ptr": None if column_scale is None else column_scale.contiguous(),
    }
    if launch.descriptors:
        launch(**dict(zip(launch.descriptors, (*xs, *ws, y), strict=True)), **adapters)
    else:
        launch(x_ptrs=xs, w_ptrs=ws, y_ptr=y, **adapters)
    return y


@cached_by_layout
def _call(
    has_tma: bool, n: int, found: Layouts, ps: tuple[float, ...], with_base: bool, PRECISION: str
) -> ByTile[Launch]:
    xs, ws, xas, bs = (found[i * n : (i + 1) * n] for i in range(4))
    (bias, column_scale), seeds = found[4 * n : 4 * n + 2], found[4 * n + 2 :]
    M, N = xs[0].shape[0], ws[0].shape[0]
    for x, w, xa, b, p, seed in zip(xs, ws, xas, bs, ps, seeds, strict=True):
        K, r = x.shape[1], b.shape[1]
        check_operands(xs[0], p, seed, x=(x, (M, K)), w=(w, (N, K)), xa=(xa, (M, r)), b=(b, (N, r)))
    check_operands(xs[0], bias=(bias, (N,)), scale=(column_scale, (N,)))
    if not with_base:
        xs, ws = (tuple(t._replace(shape=torch.Size((t.shape[0], 0))) for t in each) for each in (xs, ws))
    rows = name_of_matmul(has_tma and _fits_tma(xs, ws), xs[0].dtype.itemsize, n > 1, any(ps))
    scaled = with_base and column_scale is not None
    make = partial(_launch, rows, PRECISION, xs, ws, xas, bs, ps, bias is not None, scaled)
    return ByTile(make, rows, M, N, sum(x.shape[1] for x in xs))


def _descriptors(t: Tile, xs: Layouts, ws: Layouts) -> dict[str, dict]:
    """The fields of a descriptor of every x, every w (or w.T) and y, in this order."""
    M, N, dtype = xs[0].shape[0], ws[0].shape[0], xs[0].dtype
    found = {}
    for i, x in enumerate(xs):
        found[f"x{i}"] = _descriptor(x.shape, x.stride[0], [t.BLOCK_M, t.BLOCK_K], dtype)
    for i, w in enumerate(ws):
        if w.stride[1] != 1:
            found[f"w{i}"] = _descriptor(w.shape[::-1], w.stride[1], [t.BLOCK_K, t.BLOCK_N], dtype)
        else:
            found[f"w{i}"] = _descriptor(w.shape, w.stride[0], [t.BLOCK_N, t.BLOCK_K], dtype)
    return found | {"y_desc": _descriptor((M, N), N, [t.BLOCK_M, t.BLOCK_N], dtype)}


def _descriptor(shape: Any, stride: int, block: list[int], dtype: torch.dtype) -> dict[str, Any]:
    anything = torch.empty(8, dtype=dtype)  # aligned to 16 bytes, as `_fits_tma` found the operand to be
    return vars(TensorDescriptor(anything, torch.Size(shape), [stride, 1], block)) | {"base": None}


def _fits_tma(xs: Layouts, ws: Layouts) -> bool:
    """Whether few x, w (or w.T) and y are 16-bit matrices of unit column stride with rows of whole 16 bytes."""

    def fits(t: Layout) -> bool:
        rows, columns = t.stride
        return columns == 1 and rows % 8 == 0 and rows > 0 and t.offset == 0

    halves = all(t.dtype == xs[0].dtype and t.dtype in (torch.bfloat16, torch.float16) for t in (*xs, *ws))
    few = len(xs) <= MAX_GROUP and all(x.shape[1] > 0 for x in xs) and ws[0].shape[0] % 8 == 0
    return halves and few and all(map(fits, xs)) and all(fits(w) or fits(_transposed(w)) for w in ws)


def _transposed(t: Layout) -> Layout:
    return t._replace(stride=t.stride[::-1])


def _launch(
    name: str,
    PRECISION: str,
    xs: Layouts,
    ws: Layouts,
    xas: Layouts,
    bs: Layouts,
    ps: tuple[float, ...],
    HAS_BIAS: bool,
    HAS_COLUMN_SCALE: bool,
    t: Tile,
) -> Launch:
    M, N, ranks = xs[0].shape[0], ws[0].shape[0], tuple(b.shape[1] for b in bs)
    wide = any(t.dtype != xs[0].dtype for t in (*xas, *bs))  # two tiles of each wait in registers
    arguments: dict[str, Any] = {
        "xa_strides": tuple(xa.stride for xa in xas),
        "b_strides": tuple(b.stride for b in bs),
        "ranks": ranks,
        "dropped": tuple(map(dropped_levels, ps)),
        "scale": tuple(map(dropout_scale, ps)),
        "M": M,
        "N": N,
        "lengths": tuple(x.shape[1] for x in xs),
        "PARTS": len(xs),
        "HAS_BIAS": HAS_BIAS,
        "HAS_COLUMN_SCALE": HAS_COLUMN_SCALE,
        "HAS_DROPOUT": tuple(p != 0.0 for p in ps),
        "BLOCK_R": min(padded_rank(max(ranks)), 16 if wide else 32),
        **t.kwargs(),
    }
    blocks = cdiv(M, t.BLOCK_M) * cdiv(N, t.BLOCK_N)
    if name.startswith(TMA):
        programs = min(multiprocessors(xs[0].device), blocks)
        turned = tuple(w.stride[1] != 1 for w in ws)
        descriptors = _descriptors(t, xs, ws)
        unused = dict.fromkeys({f"{each}{i}" for each in "xw" for i in range(MAX_GROUP)} - descriptors.keys())
        arguments |= {"programs": programs, "TRANSPOSED": turned, **unused}
        launch = Launch(_lora_matmul_tma_kernel, (programs,), **arguments)
        launch.descriptors = descriptors
        return launch
    strides = {"x_strides": tuple(x.stride for x in xs), "w_strides": tuple(w.stride for w in ws), "stride_ym": N}
    return Launch(_lora_matmul_kernel, (blocks,), PRECISION=PRECISION, **strides, **arguments)
