"""``fastlora inspect``: every kernel and tile compiled ahead of time, and what the compiler made of it."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from fastlora.benchmarks.aot import CHIPS, CLOCKS, compile_for
from fastlora.benchmarks.arguments import UsageError
from fastlora.benchmarks.records import write_rows

BF16, FP32 = torch.bfloat16, torch.float32
_COLUMNS = (
    *("kernel", "case", "tile", "warps", "registers", "spills", "shared"),
    *("tensor core", "loads", "stores", "blocks", "instructions", "loop", "clocks of a turn"),
)


def run(args: Namespace) -> int:
    """Print what was compiled; 1 if something spills, does not fit or lost its tensor-core instructions."""
    if triton.knobs.runtime.interpret:
        raise UsageError("TRITON_INTERPRET is set: kernels are interpreted here, not compiled")
    rows: dict[tuple[str, str], dict] = {}  # a kernel that several cases share is listed with the first
    for arch in args.arch:
        for op, case, launch in cases():
            if args.kernel not in (None, op):
                continue
            print(f"\r\033[K{arch} {op}, {case}", end="", file=sys.stderr, flush=True)
            for compiled in compile_for(arch, launch):
                rows.setdefault((arch, compiled.hash), {"arch": arch, "op": op, "case": case, **asdict(compiled)})
    print("\r\033[K", end="", file=sys.stderr, flush=True)
    if not rows:
        raise UsageError(f"--kernel must be of {', '.join(dict.fromkeys(op for op, *_ in cases()))}, got {args.kernel}")
    if args.csv is not None:
        write_rows(args.csv, [_summary(row) for row in rows.values()])
    if args.json:
        print(json.dumps(list(rows.values()), indent=2))
    else:
        for arch in args.arch:
            limit = CHIPS[arch].shared_per_block
            print(f"{arch}: at most {limit} bytes of shared memory a block")
            print(_table([row for row in rows.values() if row["arch"] == arch]), end="\n\n")
    problems = [f"{row['arch']} {row['kernel']}, {row['case']}: {p}" for row in rows.values() for p in row["problems"]]
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


def cases() -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(op, what is special, a launch on meta tensors) so that every row of the tile table is compiled."""
    from fastlora.kernels.dora import dora_grad
    from fastlora.kernels.lora_grad import lora_grad
    from fastlora.kernels.lora_matmul import lora_matmul, lora_matmul_group
    from fastlora.kernels.nf4 import decode_4bit
    from fastlora.kernels.nf4_matmul import nf4_matmul
    from fastlora.kernels.shrink import shrink, shrink_group
    from fastlora.kernels.swiglu import swiglu, swiglu_backward_

    M, N, K, p, seed = 8192, 4096, 4096, 0.1, _meta(dtype=torch.int64)

    for r, dtype in ((16, BF16), (16, FP32), (64, FP32), (512, FP32)):
        adapter = f"r={r}, {_name(dtype)} adapters"
        x, w, dy = _meta(M, K), _meta(N, K), _meta(M, N)
        a, b, xa = _meta(r, K, dtype=dtype), _meta(N, r, dtype=dtype), _meta(M, r, dtype=dtype)
        yield "shrink", adapter, _call(shrink, x, a, 2.0)
        yield "shrink", f"{adapter}, dropout", _call(shrink, x, a, 2.0, p, seed)
        yield "lora_matmul", adapter, _call(lora_matmul, x, w, xa, b)
        yield "lora_matmul", f"{adapter}, dx", _call(lora_matmul, dy, w.t(), xa, a.t())
        yield "lora_matmul", f"{adapter}, dx, dropout", _call(lora_matmul, dy, w.t(), xa, a.t(), None, p, seed)
        yield "lora_grad", f"{adapter}, dropout", _call(lora_grad, dy, x, b, xa, 2.0, p, seed, r <= 32)
        yield "decode_4bit", f"merged, {adapter}", _call(decode_4bit, *_weight_4bit(N, K), BF16, a, b, 2.0)
    for m in (64, 65536):  # few rows of which parts are added up at the end, and reductions that need no parts
        x, dy, a, b, xa = _meta(m, K), _meta(m, N), _meta(16, K), _meta(N, 16), _meta(m, 16)
        yield "shrink", f"M={m}", _call(shrink, x, a, 2.0)
        yield "lora_grad", f"M={m}", _call(lora_grad, dy, x, b, xa, 2.0)
        yield "dora_grad", f"M={m}", _call(dora_grad, dy, dy, _meta(N, dtype=FP32))
    for q, name in ((0.0, ""), (p, ", dropout")):
        x, seeds, qs = _meta(M, K), (seed if q else None,) * 3, (q,) * 3
        for r in (16, 64):
            adapters = tuple(_meta(r, K, dtype=FP32) for _ in qs)
            yield "shrink", f"of q, k, v, r={r}{name}", _call(shrink_group, x, adapters, (2.0,) * 3, qs, seeds)
    for of, widths in (("q, k, v", (N, N // 4, N // 4)), ("gate, up", (3 * N, 3 * N))):
        for q, name in ((0.0, f"dx of {of}"), (p, f"dx of {of}, dropout")):
            dys, ws = tuple(_meta(M, n) for n in widths), tuple(_meta(n, K).t() for n in widths)
            dxas, ats = zip(*((_meta(M, 16, dtype=FP32), _meta(16, K, dtype=FP32).t()) for _ in widths), strict=True)
            drops = [q for _ in widths], [seed if q else None for _ in widths]
            yield "lora_matmul", name, _by_every_tile(True, q > 0, lora_matmul_group, dys, ws, dxas, ats, *drops)
    r = 16
    x, w, xa, b = _meta(M, K), _meta(N, K), _meta(M, r, dtype=FP32), _meta(N, r, dtype=FP32)
    yield "lora_matmul", "of DoRA", _call(lora_matmul, x, w, xa, b, None, 0.0, None, _meta(N, dtype=FP32))
    for q, name in ((0.0, "every tile"), (p, "every tile, dropout")):
        launch = _by_every_tile(False, q > 0, lora_matmul, x, w, xa, b, _meta(N), q, seed if q else None)
        yield "lora_matmul", name, launch
    x, w, xa, b = _meta(M, K)[:, :0], _meta(N, K)[:, :0], _meta(M, r, dtype=FP32), _meta(N, r, dtype=FP32)
    yield "lora_matmul", "the adapter's product alone", _call(lora_matmul, x, w, xa, b)
    x, w, xa, b = _meta(M, 4097), _meta(N, 4097), _meta(M, r, dtype=FP32), _meta(N, r, dtype=FP32)
    yield "lora_matmul", "rows of odd length", _call(lora_matmul, x, w, xa, b)
    x, w, dy, a, b, xa = (_meta(*shape, dtype=FP32) for shape in ((M, K), (N, K), (M, N), (r, K), (N, r), (M, r)))
    yield "shrink", "fp32", _call(shrink, x, a, 2.0, p, seed)
    yield "lora_matmul", "fp32", _call(lora_matmul, x, w, xa, b)
    yield "dora_grad", "bf16", _call(dora_grad, *(_meta(M, N) for _ in range(2)), _meta(N, dtype=FP32))
    yield from _cases_of_experts()
    yield "lora_grad", "fp32", _call(lora_grad, dy, x, b, xa, 2.0)
    yield "swiglu", "forward", _call(swiglu, _meta(M, K), _meta(M, K), "silu")
    yield "swiglu", "backward", _call(swiglu_backward_, *(_meta(M, K) for _ in range(3)), "silu")
    for m, rank, dtype in ((1, 16, BF16), (16, 16, FP32), (16, 128, FP32), (32, 64, FP32), (64, 32, FP32)):
        x, a, b = _meta(m, K), _meta(rank, K, dtype=dtype), _meta(N, rank, dtype=dtype)
        case = f"M={m}, r={rank}, {_name(dtype)} adapters"
        yield "nf4_matmul", case, _call(nf4_matmul, x, *_weight_4bit(N, K), a, b, 2.0)
    large = 65536
    yield "nf4_matmul", "as many outputs as a head has", _call(nf4_matmul, x, *_weight_4bit(large, K), None, None, 1.0)
    yield "nf4_matmul", "M=1", _call(nf4_matmul, x[:1], *_weight_4bit(N, K), None, None, 1.0)
    for nested in (True, False):
        name = "nested" if nested else "flat"
        yield "decode_4bit", name, _call(decode_4bit, *_weight_4bit(N, K, nested), BF16, None, None, 1.0)
    yield "decode_4bit", "rows of odd length", _call(decode_4bit, *_weight_4bit(63, 63), BF16, None, None, 1.0)
    for dtype, name in ((torch.float16, "fp16"), (FP32, "fp32")):
        a, b = _meta(16, K, dtype=FP32), _meta(N, 16, dtype=FP32)
        yield "decode_4bit", f"merged, {name}", _call(decode_4bit, *_weight_4bit(N, K), dtype, a, b, 2.0)
    for K, name in ((4104, "rows of 8 weights"), (4097, "rows of odd length")):
        a, b = _meta(r, K, dtype=FP32), _meta(N, r, dtype=FP32)
        yield "decode_4bit", f"merged, {name}", _call(decode_4bit, *_weight_4bit(N, K), BF16, a, b, 2.0)


def _cases_of_experts() -> Iterator[tuple[str, str, Callable[[], Any]]]:
    from fastlora.kernels.experts import combine_experts, lora_grad_experts, lora_matmul_experts, shrink_experts

    E, N, K, r, p, seed = 128, 1536, 2048, 16, 0.1, _meta(dtype=torch.int64)  # as in Qwen3-30B-A3B
    w, a, b, offs = _meta(E, N, K), _meta(E, r, K, dtype=FP32), _meta(E, N, r, dtype=FP32), _meta(E, dtype=torch.int32)
    for M in (8, 4096, 65536):
        x, xa = _meta(M, K), _meta(M, r, dtype=FP32)
        yield "lora_matmul_experts", f"M={M}", _call(lora_matmul_experts, x, w, xa, b, offs)
    dy, wt, at = _meta(M, N), w.transpose(1, 2), a.transpose(1, 2)
    bias = _meta(E, N)
    yield "lora_matmul_experts", "bias", _call(lora_matmul_experts, x, w, xa, b, offs, bias)
    yield "lora_matmul_experts", "dx, dropout", _call(lora_matmul_experts, dy, wt, xa, at, offs, None, p, seed)
    yield "shrink_experts", "dropout", _call(shrink_experts, x, a, offs, 2.0, p, seed)
    yield "lora_grad_experts", "dropout", _call(lora_grad_experts, xa, x, offs, p, seed)
    index = _meta(M // 8, 8, dtype=torch.int64)
    yield "combine_experts", "8 of a token", _call(combine_experts, x, index, _meta(M // 8, 8))


def _call(function: Callable, *args: Any) -> Callable[[], Any]:
    return lambda: function(*args)


def _by_every_tile(group: bool, dropout: bool, function: Callable, *args: Any) -> Callable[[], Any]:
    """The call of a product by each tile that the table has for it on the architecture."""
    from fastlora.kernels import tiles

    def launch() -> None:
        kernel = tiles.name_of_matmul(tiles.has_tma(), BF16.itemsize, group, dropout)
        rows = tiles.rows_of(kernel, tiles.family())
        for tile in rows.values() if isinstance(rows, dict) else rows:
            with tiles.use(kernel, tile):
                function(*args)

    return launch


def _meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _weight_4bit(N: int, K: int, nested: bool = True) -> tuple:
    blocks = -(-N * K // 64)
    packed = _meta(-(-N * K // 2), 1, dtype=torch.uint8)
    if not nested:
        return packed, _meta(blocks, dtype=FP32), None, None, None, 64, 0, "nf4", N, K
    statistics = _meta(256, dtype=FP32), _meta(-(-blocks // 256), dtype=FP32), _meta(dtype=FP32)
    return packed, _meta(blocks, dtype=torch.uint8), *statistics, 64, 256, "nf4", N, K


def _name(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP32: "fp32"}[dtype]


def _table(rows: list[dict]) -> str:
    lines = [_COLUMNS, *map(_line, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def per_weight(row: dict) -> float | None:
    """Instructions of one lane for each weight that it decodes: of the program, or of nf4_matmul's main loop."""
    if row["op"] not in ("decode_4bit", "nf4_matmul") or "BLOCK_K" not in row["tile"]:
        return None
    weights = prod(row["tile"][name] for name in ("BLOCK_N", "BLOCK_K")) / (row["threads"] * row["warps"])
    return row["instructions" if row["op"] == "decode_4bit" else "loop"] / weights


def _counts(found: dict[str, int]) -> str:
    return " ".join(f"{n} {name}" for name, n in found.items())


def _tile(row: dict) -> str:
    return " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in row["tile"].items())


_PLAIN = ("warps", "registers", "spills", "shared", "occupancy", "instructions", "loop")


def _summary(row: dict) -> dict[str, Any]:
    """A row of the CSV."""
    names = {"triton": triton.__version__, **{name: row[name] for name in ("arch", "kernel", "case")}}
    counts = {name: _counts(row[name]) for name in ("tensor_core", "loads", "stores")}
    return (
        names
        | {"tile": _tile(row)}
        | {name: row[name] for name in _PLAIN}
        | counts
        | {"per_weight": per_weight(row)}
        | {f"clocks, {name}": (row["clocks"] or {}).get(name) for name in CLOCKS}
    )


def _line(row: dict) -> tuple[str, ...]:
    def counts(found: dict[str, int]) -> str:
        return _counts(found) or "-"

    instructions = str(row["instructions"])
    loop = str(row["loop"] or "-")
    each = per_weight(row)
    if each is not None and row["op"] == "decode_4bit":
        instructions += f" ({each:.1f} a weight)"
    elif each is not None:
        loop += f" ({each:.1f} a weight)"
    return (
        row["kernel"].strip("_").removesuffix("_kernel"),
        row["case"],
        _tile(row),
        str(row["warps"]),
        str(row["registers"]),
        str(row["spills"]),
        str(row["shared"]),
        counts(row["tensor_core"]),
        counts(row["loads"]),
        counts(row["stores"]),
        str(row["occupancy"]),
        instructions,
        loop,
        ", ".join(f"{name} {clocks:.0f}" for name, clocks in (row["clocks"] or {}).items()) or "-",
    )
