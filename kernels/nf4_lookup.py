"""The 16 values of a nibble looked up in registers: PTX that decodes two words of eight nibbles to half precision.

A byte permutation picks four bytes of eight by three bits each, so it is a table of eight entries in which four nibbles
are looked up at once. Two permutations and a choice by the fourth bit make 16 entries; there is one such table for the
high and one for the low bytes of the values. No memory, no address: 46 instructions for 16 weights.
"""

import functools
import struct

import torch

_FOUR_NIBBLES = """
prmt.b32 mask, left, {s}, {signs};
prmt.b32 a, high0, high1, sel;
prmt.b32 b, high2, high3, sel;
lop3.b32 high, b, a, mask, 0xE4;
prmt.b32 a, low0, low1, sel;
prmt.b32 b, low2, low3, sel;
lop3.b32 low, b, a, mask, 0xE4;
prmt.b32 ${first}, low, high, 0x5140;
prmt.b32 ${second}, low, high, 0x7362;"""


@functools.cache
def lookup_asm(code: tuple[float, ...], dtype: torch.dtype) -> str:
    """For ``tl.inline_asm_elementwise`` of int32 words with ``pack=2``: outputs 0 to 7 are a word's eight weights in
    dtype (bf16 or fp16), rounded once. The even weight of a byte is its high nibble."""
    bits = torch.tensor(code, dtype=torch.float64).to(dtype).view(torch.int16).tolist()
    planes = [struct.unpack("<4I", bytes((b >> shift) & 255 for b in bits)) for shift in (8, 0)]
    high, low = ([f"0x{table:08x}" for table in plane] for plane in planes)
    lines = [
        "{",
        ".reg .b32 even, odd, mask, left, sel, a, b, high, low, zero, high<4>, low<4>;",
        # A zero that the compiler does not know (the grid has no third axis), different in every lane as far as it can
        # tell: the tables stay in registers. As constants they are moved there again before every permutation.
        "mov.u32 zero, %laneid;",
        "mov.u32 a, %ctaid.z;",
        "and.b32 zero, zero, a;",
        *(
            f"xor.b32 {plane}{i}, zero, {tables[i]};"
            for plane, tables in (("high", high), ("low", low))
            for i in range(4)
        ),
        # Two words side by side, so that equal places of both come out as neighbours in one register.
        "shl.b32 a, $9, 4;",
        "lop3.b32 even, $8, a, 0x0F0F0F0F, 0xE4;",
        "shr.u32 b, $8, 4;",
        "lop3.b32 odd, b, $9, 0x0F0F0F0F, 0xE4;",
    ]
    for s, place in (("even", 1), ("odd", 0)):
        lines += [f"shl.b32 left, {s}, 4;", f"and.b32 sel, {s}, 0x77777777;"]
        tables = {"s": s, "high": high, "low": low}
        lines += [_FOUR_NIBBLES.format(**tables, signs="0xD9C8", first=place, second=place + 2)]
        lines += ["shr.u32 sel, sel, 16;"]
        lines += [_FOUR_NIBBLES.format(**tables, signs="0xFBEA", first=place + 4, second=place + 6)]
    return "\n".join([*lines, "}"])


LOOKUP_CONSTRAINTS = ",".join(["=r"] * 8 + ["r"] * 2)
