"""Calls every op with random operands, most of them wrong in one or two ways, and compares its implementations.

    python tests/fuzz_ops.py --seconds 60 --seed 1

A call must raise ValueError, TypeError or RuntimeError, or compute: what the CPU kernel takes, the composition and the
fake take too, and give the same. What ends the process ends this one: `test_checks` and ``make fuzz-asan`` run it as
one of their own.
"""

import argparse
import math
import random
import sys
import time
from collections import Counter

import bitsandbytes  # defines the decoding that compositions call
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from fastlora import fourbit, kernel_ops, ops, ops_4bit
from fastlora.kernels.limits import ACTIVATIONS

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OTHERS = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
SIZES = [0, 1, 2, 3, 5, 8, 16, 17, 32, 33]
# bitsandbytes 0.49 decodes FP4's large blocks and odd shapes, and only them, by a table rounded to four digits.
QUANT_TYPES = ["nf4"] if bitsandbytes.__version__.startswith("0.49.") else ["nf4", "fp4"]
REFUSED = ValueError, TypeError, RuntimeError, IndexError  # the last by torch, of an index


class Calls:
    """Random calls."""

    def __init__(self, seed: int, names: list[str]) -> None:
        self.names = names
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def one_of(self, values):
        return self.random.choice(values)

    def maybe(self, value):
        return value if self.random.random() < 0.5 else None

    def matrix(self, shape, dtype):
        """Of any stride."""
        rows, cols = shape
        layout = self.one_of(["rows"] * 4 + ["columns", "wide", "steps", "expanded", "expanded rows"])
        if layout == "columns":
            return self.values((cols, rows), dtype).t()
        if layout == "wide":
            return self.values((rows, cols + 3), dtype)[:, 1 : cols + 1]
        if layout == "steps":
            return self.values((rows, 2 * cols), dtype)[:, ::2]
        if layout == "expanded":
            return self.values((rows, 1), dtype).expand(rows, cols)
        if layout == "expanded rows":
            return self.values((1, cols), dtype).expand(rows, cols)
        return self.values((rows, cols), dtype)

    def values(self, shape, dtype):
        return torch.randn(shape, generator=self.generator).to(dtype)

    def vector(self, length):
        return self.maybe(self.values((length,), self.one_of(FLOATS)))

    def dropout(self):
        p = self.one_of([0.0, 0.0, 0.3])
        return p, torch.tensor(self.random.randrange(1 << 62)) if p else None

    def sizes(self):
        return [self.one_of(SIZES) for _ in range(4)]

    def shrink(self):
        (M, K, r, _), dtype, adapter = self.sizes(), self.one_of(FLOATS), self.one_of(FLOATS)
        return [self.matrix((M, K), dtype), self.matrix((r, K), adapter), self.one_of([1.0, 0.3, 2.0]), *self.dropout()]

    def shrink_group(self):
        x, a, s, p, seed = self.shrink()
        n = self.random.randrange(3)
        dropouts = [(p, seed), *(self.dropout() for _ in range(n))]
        a = [a, *(self.matrix((self.one_of(SIZES), x.shape[1]), self.one_of(FLOATS)) for _ in range(n))]
        return [x, a, [float(s)] * len(a), *map(list, zip(*dropouts, strict=True))]

    def part(self, M, N, dtype):
        K, r, adapter = self.one_of(SIZES), self.one_of(SIZES), self.one_of(FLOATS)
        return (
            self.matrix((M, K), dtype),
            self.matrix((N, K), dtype),
            self.matrix((M, r), adapter),
            self.matrix((N, r), adapter),
        )

    def lora_matmul(self):
        M, N, *_ = self.sizes()
        return [*self.part(M, N, self.one_of(FLOATS)), self.vector(N), *self.dropout(), self.vector(N)]

    def lora_matmul_group(self):
        (M, N, *_), dtype, n = self.sizes(), self.one_of(FLOATS), self.random.randrange(1, 4)
        parts = [(*self.part(M, N, dtype), *self.dropout()) for _ in range(n)]
        return [list(each) for each in zip(*parts, strict=True)]

    def lora_grad(self):
        (M, N, K, r), dtype, adapter = self.sizes(), self.one_of(FLOATS), self.one_of(FLOATS)
        dy, x = self.matrix((M, N), dtype), self.matrix((M, K), dtype)
        b, xa = self.matrix((N, r), adapter), self.matrix((M, r), adapter)
        return [dy, self.maybe(x), self.maybe(b), self.maybe(xa), 0.7, *self.dropout()]

    def lora_grad_a(self):
        M, K, r, _ = self.sizes()
        return [self.matrix((M, r), self.one_of(FLOATS)), self.matrix((M, K), self.one_of(FLOATS)), *self.dropout()]

    def dora_grad(self):
        shape, dtype = self.sizes()[:2], self.one_of(FLOATS)
        scale = self.values(shape[1:], self.one_of(FLOATS)).abs_().add_(0.5)
        return [self.matrix(shape, dtype), self.matrix(shape, dtype), scale]

    def swiglu(self):
        shape, dtype = self.sizes()[:2], self.one_of(FLOATS)
        activation = self.one_of(ACTIVATIONS)
        return [self.matrix(shape, dtype), self.maybe(self.matrix(shape, dtype)), activation]

    def swiglu_backward_(self):
        (M, K, *_), dtype = self.sizes(), self.one_of(FLOATS)
        both, third = self.values((M, 2 * K), dtype), self.matrix((M, K), dtype)
        gate, up = both[:, :K], both[:, K - self.one_of([0, 0, 0, 1]) :][:, :K]
        dh = self.one_of([third, third, third, gate, up])
        return [dh, gate, self.maybe(up), self.one_of(ACTIVATIONS)]

    def weight(self, N=None, K=None):
        N, K = (self.one_of([*SIZES, 128]) if size is None else size for size in (N, K))
        blocksize = self.one_of([32, 64, 128, 4096])
        blocks = -(-N * K // blocksize)
        packed = torch.randint(0, 256, (-(-N * K // 2),), generator=self.generator, dtype=torch.uint8)
        quant_type = self.one_of(QUANT_TYPES)
        if self.maybe(True):
            absmax = self.values((blocks,), torch.float32)
            return fourbit.Weight4bit(packed, absmax, None, None, None, blocksize, 0, quant_type, N, K)
        absmax = torch.randint(0, 256, (blocks,), generator=self.generator, dtype=torch.uint8)
        nested = self.values((256,), torch.float32), self.values((-(-blocks // 256),), torch.float32)
        offset = torch.tensor(0.5)
        return fourbit.Weight4bit(packed, absmax, *nested, offset, blocksize, 256, quant_type, N, K)

    def adapter(self, weight):
        r, dtype = self.one_of(SIZES), self.one_of(FLOATS)
        a, b = self.matrix((r, weight.K), dtype), self.matrix((weight.N, r), dtype)
        return self.one_of([[a, b], [None, None]])

    def decode_4bit(self):
        weight = self.weight()
        return [*weight, self.one_of(FLOATS[:3]), *self.adapter(weight), 0.3]

    def nf4_matmul(self):
        weight, dtype = self.weight(), self.one_of(FLOATS[:3])
        x = self.matrix((self.one_of(SIZES), weight.K), dtype)
        return [x, *weight, *self.adapter(weight), 0.3, self.vector(weight.N)]

    def lora_matmul_4bit(self):
        (M, N, *_), dtype, transposed = self.sizes(), self.one_of(FLOATS[:3]), self.one_of([True, False])
        parts = []
        for _ in range(self.random.randrange(1, 4)):
            r, adapter = self.one_of(SIZES), self.one_of(FLOATS)
            weight = self.weight(**{"K" if transposed else "N": N})
            K = weight.N if transposed else weight.K
            x, xa, b = self.matrix((M, K), dtype), self.matrix((M, r), adapter), self.matrix((N, r), adapter)
            parts.append((x, weight, xa, b, *self.dropout()))
        x, weights, xa, b, p, seed = map(list, zip(*parts, strict=True))
        return [x, *ops_4bit.lists_of(weights), xa, b, self.vector(N), p, seed, transposed, self.vector(N)]

    def ends(self, experts, rows):
        ends = sorted(self.random.randrange(rows + 1) for _ in range(experts))
        return torch.tensor(ends, dtype=torch.int32)

    def stack(self, experts, shape, dtype):
        t = self.values((experts, *shape), dtype)
        return self.one_of([t, t.transpose(1, 2).contiguous().transpose(1, 2)])

    def shrink_experts(self):
        (M, K, r, _), E = self.sizes(), self.random.randrange(1, 5)
        a = self.stack(E, (r, K), self.one_of(FLOATS))
        return [self.matrix((M, K), self.one_of(FLOATS)), a, self.ends(E, M), 0.3, *self.dropout()]

    def lora_matmul_experts(self):
        (M, N, K, r), E, dtype, adapter = self.sizes(), self.random.randrange(1, 5), *map(self.one_of, (FLOATS, FLOATS))
        x, w, xa = self.matrix((M, K), dtype), self.stack(E, (N, K), dtype), self.matrix((M, r), adapter)
        b, bias = self.stack(E, (N, r), adapter), self.maybe(self.matrix((E, N), adapter))
        return [x, w, xa, b, self.ends(E, M), bias, *self.dropout()]

    def lora_matmul_experts_4bit(self):
        (M, *_, r), E, transposed = self.sizes(), self.random.randrange(1, 5), self.one_of([True, False])
        dtype, adapter, K, rows = self.one_of(FLOATS[:3]), self.one_of(FLOATS), self.one_of([64, 128]), 64
        weight = self.weight(E * rows, K)
        inputs, outputs = (rows, K) if transposed else (K, rows)
        x, xa = self.matrix((M, inputs), dtype), self.matrix((M, r), adapter)
        b, bias = self.stack(E, (outputs, r), adapter), self.maybe(self.matrix((E, outputs), adapter))
        return [x, *weight, xa, b, self.ends(E, M), bias, *self.dropout(), transposed]

    def lora_grad_experts(self):
        M, K, r, _ = self.sizes()
        dxa, x = self.matrix((M, r), self.one_of(FLOATS)), self.matrix((M, K), self.one_of(FLOATS))
        return [dxa, x, self.ends(self.random.randrange(1, 5), M), *self.dropout()]

    def combine_experts(self):
        M, N, T, k = self.sizes()
        rows = self.matrix((max(M, 1), N), self.one_of(FLOATS))
        index = torch.randint(0, max(M, 1), (T, k), generator=self.generator)
        return [rows, index, self.maybe(self.matrix((T, k), self.one_of(FLOATS)))]

    def broken(self, args):
        """One operand, or one of a list, made another."""
        i = self.random.randrange(len(args))
        args = list(args)
        if isinstance(args[i], list) and args[i] and self.maybe(True):
            args[i] = self.broken(args[i])
        else:
            args[i] = self.other(args[i])
        return args

    def other(self, value):
        if isinstance(value, list):
            return self.one_of([[], value[1:], value * 2, value + value[:1]])
        if isinstance(value, bool):
            return not value  # types are for torch to check
        if value is None:
            return self.one_of([None, self.values((2, 3), torch.float32), torch.tensor(3)])
        if isinstance(value, str):
            return self.one_of(["nf4", "fp4", "silu", "int4", ""])
        if isinstance(value, torch.dtype):
            return self.one_of(FLOATS + OTHERS)
        if isinstance(value, int):
            return self.one_of([0, -1, 1, 3, value + 1, value - 1, 16, 48, 1 << 13, 1 << 40, 1 << 62, -(1 << 63)])
        if isinstance(value, float):
            return self.one_of([-1.0, 1.0, 1.5, 1e-9, 1 - 1e-9, float("nan"), float("inf"), 0.5])
        return self.other_tensor(value)

    def other_tensor(self, t):
        if not is_small([t]):  # many changes would go through 2^40 elements
            return None
        changes = [
            lambda: None,
            lambda: t.to(self.one_of(FLOATS)),
            lambda: t.to(self.one_of(OTHERS)),
            lambda: t[None],
            lambda: t[0],
            lambda: t[1:],
            lambda: t[..., 1:],
            lambda: t.flatten(),
            lambda: t.t(),
            lambda: t.to("meta"),
            lambda: t.to_sparse(),
            lambda: torch._neg_view(t),
            lambda: t.new_zeros(self.one_of(SIZES), self.one_of(SIZES)),
            lambda: t.new_zeros(()),
            lambda: t.new_zeros(1).expand(t.shape),
            lambda: t.new_zeros(1).expand(1 << 40),
            lambda: t.new_empty(1 << 20, 0),  # rows that hold nothing take time too
        ]
        try:
            return self.one_of(changes)()
        except (*REFUSED, IndexError, NotImplementedError):  # not every tensor can be changed so
            return None

    def next(self):
        name = self.one_of(self.names)
        args = list(getattr(self, name)())
        for _ in range(self.one_of([0, 1, 1, 2])):
            args = self.broken(args)
        return name, args


def outcome(call, args):
    """What a call gives, or None if it refuses."""
    try:
        return tree_leaves([call(*args)])
    except REFUSED:
        return None


def is_plain(args) -> bool:
    tensors = (t for t in tree_leaves(args) if isinstance(t, torch.Tensor))
    return all(t.device.type == "cpu" and t.layout == torch.strided and not t.is_neg() for t in tensors)


def is_small(args) -> bool:
    """Larger results have no memory, or take minutes, where the fake has an answer."""
    sizes = [n for t in tree_leaves(args) for n in (t.shape if isinstance(t, torch.Tensor) else [t])]
    return all(not isinstance(n, int) or abs(n) < 1 << 20 for n in sizes)


def copies(args):
    """With the strides and the sharing of memory that the operands have."""
    storages: dict[int, torch.UntypedStorage] = {}

    def copy(t):
        storage = t.untyped_storage()
        ours = storages.setdefault(storage._cdata, storage.clone())
        return torch.empty(0, dtype=t.dtype).set_(ours, t.storage_offset(), t.shape, t.stride())

    return tree_map_only(torch.Tensor, copy, args)


def compare(name: str, args: list) -> bool:
    """Whether the call was taken. Raises AssertionError if implementations disagree."""
    op = getattr(torch.ops.fastlora, name).default
    if not is_plain(args) or not is_small(args):
        return outcome(op, args) is not None
    in_plain_torch, on_meta = copies(args), tree_map_only(torch.Tensor, lambda t: t.to("meta"), copies(args))
    ours = outcome(op, args)
    theirs = outcome(kernel_ops.compositions[name], in_plain_torch)
    assert (ours is None) == (theirs is None), "the composition" + " does not take this" * (theirs is None)
    fake = outcome(op, on_meta) if name != "swiglu_backward_" else ours  # moved to meta, nothing shares memory
    unseen = ours is None and "experts" in name  # values of offs, which a fake tensor has none of
    assert (ours is None) == (fake is None) or unseen, "the fake"
    if ours is None or theirs is None or fake is None:
        return False
    if name == "swiglu_backward_":
        ours, theirs = tree_leaves(args), tree_leaves(in_plain_torch)
    for t, other in zip(ours, theirs, strict=True):
        if isinstance(t, torch.Tensor):
            check_close(t, other, args)
    for t, other in zip(ours if name != "swiglu_backward_" else [], fake, strict=False):
        assert (t.shape, t.dtype, t.stride()) == (other.shape, other.dtype, other.stride()), "the fake's layout"
    return True


def check_close(ours, theirs, args) -> None:
    """The composition rounds adapters and sums to the narrowest dtype there is; a wrong element is off by its size."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), "shape or dtype of the composition"
    dtypes = {t.dtype for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.is_floating_point()}
    eps = max((torch.finfo(dtype).eps for dtype in dtypes if dtype in FLOATS), default=0.0)
    eps = max([eps, *(torch.finfo(d).eps for d in (*tree_leaves(args), ours.dtype) if d in FLOATS)], default=eps)
    ours, theirs = ours.double(), theirs.double()
    finite = torch.isfinite(theirs)  # where the composition's narrower sums are, the kernel's are
    scale = 1 + theirs[finite].abs().max() if finite.any() else 1
    error = (ours - theirs)[finite].abs()
    assert (error <= 64 * eps * scale).all(), f"values: {error.max().item()} > 64 * {eps} * {scale}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--calls", type=int, default=sys.maxsize)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ops", default=",".join(kernel_ops.compositions), help="names, separated by commas")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # bitsandbytes compiles its decoding anew for every shape
    print(f"CPU kernels: {ops.NO_CPU_KERNELS or 'loaded'}", flush=True)
    calls, counts, stop = Calls(args.seed, args.ops.split(",")), Counter(), time.monotonic() + args.seconds
    while time.monotonic() < stop and counts.total() < args.calls:
        name, operands = calls.next()
        try:
            counts[name, compare(name, operands)] += 1
        except Exception:
            print(f"after {counts.total()} calls: {name}", *map(described, operands), sep="\n  ", flush=True)
            raise
    for name in kernel_ops.compositions:
        print(f"{name:20} {counts[name, True]:8} taken {counts[name, False]:8} refused")


def described(value) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(described, value))}]"
    if isinstance(value, torch.Tensor):
        strides = value.stride() if value.layout == torch.strided else value.layout
        return f"{value.dtype} {list(value.shape)} of strides {strides} on {value.device}"
    return repr(value)


if __name__ == "__main__":
    main()
