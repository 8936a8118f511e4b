"""Compile kernels for GPUs that are not here, and read what the compiler made of them.

A launcher is run on meta tensors with a driver that names a target and has no device: what is compiled is what would be
launched there, tile, flags and specialisations included, and nothing is allocated or run.
"""

import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastlora.kernels import tiles
from fastlora.kernels.waves import speed_of


@dataclass(frozen=True)
class Chip:
    """What a compiled kernel has to fit into: limits of one multiprocessor (AMD: compute unit) of an architecture."""

    target: GPUTarget
    shared_per_block: int
    shared: int
    warps: int
    registers: int = 65536  # 32-bit, of all threads


KB = 1024
CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * KB, 164 * KB, warps=64),
    "sm_86": Chip(GPUTarget("cuda", 86, 32), 99 * KB, 100 * KB, warps=48),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * KB, 228 * KB, warps=64),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * KB, 228 * KB, warps=64),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 99 * KB, 100 * KB, warps=48),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * KB, 64 * KB, warps=32, registers=4 * 512 * 64),
    "gfx1100": Chip(GPUTarget("hip", "gfx1100", 32), 64 * KB, 64 * KB, warps=32, registers=2 * 1536 * 32),
}


@dataclass
class Compiled:
    """One compiled kernel. Counts of instructions are of the program text, not of what runs."""

    kernel: str
    hash: str
    tile: dict[str, int]
    warps: int
    threads: int  # in a warp
    registers: int
    spills: int  # bytes of stack (NVIDIA), spilled registers (AMD)
    shared: int
    instructions: int
    loop: int | None  # instructions of the main loop
    clocks: dict[str, float] | None  # of one turn of it (NVIDIA)
    tensor_core: dict[str, int]
    loads: dict[str, int]
    stores: dict[str, int]
    occupancy: int  # blocks on a multiprocessor at once
    seconds: float
    problems: list[str] = field(default_factory=list)


def compile_for(arch: str, launch: Callable[[], Any]) -> list[Compiled]:
    """Compile for ``arch`` every kernel that this call launches on meta tensors."""
    chip = CHIPS[arch]
    found: list[Compiled] = []

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        start = time.perf_counter()
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        tile = {name: kwargs[name] for name in ("BLOCK", *(f"BLOCK_{axis}" for axis in "MNKR")) if name in kwargs}
        found.append(_read(chip, self.__name__, tile, compiled, time.perf_counter() - start))

    run = JITFunction.run
    JITFunction.run = compile_only
    try:
        with _target(chip.target):
            launch()
    finally:
        JITFunction.run = run
    return found


class _NoDevice:
    """A Triton driver without a device: it only says which target to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:  # the key of Triton's cache of compiled kernels
        return f"no device, {self.target.arch}"

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextmanager
def _target(target: GPUTarget) -> Iterator[None]:
    driver.set_active(_NoDevice(target))
    tiles.force_family(tiles.family_of(target.backend, target.arch))
    try:
        yield
    finally:
        tiles.force_family(None)
        with suppress(RuntimeError):  # no GPU, no driver to go back to
            driver.reset_active()


def _read(chip: Chip, kernel: str, tile: dict[str, int], compiled: Any, seconds: float) -> Compiled:
    metadata = compiled.metadata
    family = tiles.family_of(chip.target.backend, chip.target.arch)
    if "cubin" in compiled.asm:
        found = _read_nvidia(compiled.asm, tile, metadata.num_warps, family)
    else:
        found = _read_amd(compiled.asm)
    result = Compiled(
        kernel=kernel,
        hash=compiled.hash,
        tile=tile,
        warps=metadata.num_warps,
        threads=chip.target.warp_size,
        shared=metadata.shared,
        occupancy=0,
        seconds=seconds,
        **found,
    )
    result.occupancy = _occupancy(chip, result)
    if result.spills:
        result.problems.append(f"spills {result.spills}")
    if result.shared > chip.shared_per_block:
        result.problems.append(f"shared memory {result.shared} > {chip.shared_per_block}")
    if re.search(r"tt\.dot .*x(bf16|f16)>", compiled.asm["ttir"]) and not result.tensor_core:
        result.problems.append("no tensor-core instructions")  # a pass gave up, or dropped the loop
    return result


def _occupancy(chip: Chip, c: Compiled) -> int:
    if chip.target.arch == "gfx1100":  # two SIMDs, registers in steps of 24
        by_registers = 2 * min(16, 1536 // max(24, -(-c.registers // 24) * 24)) // c.warps
    elif chip.target.backend == "hip":
        by_registers = 4 * min(8, 512 // max(8, -(-c.registers // 8) * 8)) // c.warps
    else:
        by_registers = chip.registers // (-(-c.registers * 32 // 256) * 256 * c.warps)
    by_shared = chip.shared // (c.shared + (KB if chip.target.backend == "cuda" else 0)) if c.shared else 32
    return min(by_registers, by_shared, chip.warps // c.warps, 32)


def _read_nvidia(asm: dict[str, Any], tile: dict[str, int], warps: int, family: str) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    env = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}  # cuobjdump calls nvdisasm

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", "-sass", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    assert usage is not None, "cuobjdump reports no resource usage"
    program = _program(dump)
    names = [each.name for each in program]
    jumps = [
        (int(match.group(1), 16), each.address)
        for each in program
        if each.name.startswith("BRA") and (match := re.search(r"0x([0-9a-f]+)", each.operands))
    ]
    loops = [[each for each in program if start <= each.address <= stop] for start, stop in jumps if start < stop]
    main = _main_loop(loops, r"HGMMA|HMMA|UTC\w*MMA")
    return {
        "registers": int(usage.group(1)),
        "spills": int(usage.group(2)),
        "instructions": len(names),
        "loop": None if main is None else len(main),
        "clocks": None if main is None else _clocks(main, tile, warps, family),
        "tensor_core": _count(names, r"(HGMMA|HMMA|IMMA|UTC\w*MMA)\b"),
        "loads": _count(names, r"(UTMALDG|LDGSTS|LDG)\b(?:.*?\.(64|128)\b)?"),
        "stores": _count(names, r"(UTMASTG|STG)\b(?:.*?\.(64|128)\b)?"),
    }


class Instruction(NamedTuple):
    """One of a program, with the clocks that its warp issues nothing after it."""

    address: int
    name: str
    operands: str
    stall: int


def _program(dump: str) -> list[Instruction]:
    """Of what ``cuobjdump -sass`` prints: an instruction with its first eight bytes, then the other eight, of which
    bits 41 to 44 are the stall."""
    text = re.findall(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;\n]*);[^\n]*\n\s+/\* 0x([0-9a-f]{16}) \*/",
        dump,
        re.MULTILINE,
    )
    found = [Instruction(int(at, 16), name, rest, int(high, 16) >> 41 & 15) for at, name, rest, high in text]
    return [each for each in found if each.name != "NOP"]


def _clocks(loop: list[Instruction], tile: dict[str, int], warps: int, family: str) -> dict[str, float]:
    """Of one turn of a loop, for one program alone on a multiprocessor: what its four schedulers need to issue it, how
    long the stalls of a warp are, what its products take the tensor core, and its loads at a share of L2."""
    speed, flops, loaded = speed_of(family), 0, 0
    for name in (each.name for each in loop):
        if match := re.match(r"HGMMA\.64x(\d+)x(\d+)", name):
            flops += 2 * 64 * int(match.group(1)) * int(match.group(2)) * warps // 4
        elif match := re.match(r"HMMA\.16(8)(8|16)\b", name):
            flops += 2 * 16 * 8 * int(match.group(2)) * warps
        elif re.match(r"LDG(STS)?\b", name):
            width = re.search(r"\.(64|128)\b", name)
            loaded += (int(width.group(1)) if width else 32) // 8 * 32 * warps
    copied = sum(each.name.startswith("UTMALDG") for each in loop)
    if copied:  # two are a tile of x and one of w
        loaded += 2 * (tile["BLOCK_M"] + tile["BLOCK_N"]) * tile["BLOCK_K"] * copied // 2
    if copied and any(re.match(r"UTC\w*MMA", each.name) for each in loop):  # whose sizes are in a descriptor
        flops = 2 * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_K"] * copied // 2
    issue, stalls = len(loop) * warps / 4, float(sum(each.stall for each in loop))
    return dict(zip(CLOCKS, (issue, stalls, flops / speed.flops, loaded / speed.l2), strict=True))


CLOCKS = ("issue", "stalls", "tensor core", "L2")


def _read_amd(asm: dict[str, Any]) -> dict[str, Any]:
    dump = asm["amdgcn"]

    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", dump)
        return int(match.group(1)) if match else 0

    lines = [line.split() for line in dump.splitlines() if re.match(r"\s+[a-z]\w+|\.?\w+:", line)]
    program = [line[0] for line in lines if line]
    labels = {name[:-1]: i for i, name in enumerate(program) if name.endswith(":")}
    loops = [
        [Instruction(at, program[at], "", 0) for at in range(labels[line[1]], i) if not program[at].endswith(":")]
        for i, line in enumerate(line for line in lines if line)
        if len(line) > 1 and re.match(r"s_c?branch", line[0]) and labels.get(line[1], i) < i
    ]
    names = [name for name in program if re.match(r"(s|v|ds|buffer|global)_\w+$", name)]
    main = _main_loop(loops, r"v_mfma|v_wmma")
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "instructions": len(names),
        "loop": None if main is None else len(main),
        "clocks": None,
        "tensor_core": _count(names, r"(v_mfma|v_wmma)"),
        "loads": _count(names, r"(?:buffer|global)_load_(\w+)"),
        "stores": _count(names, r"(?:buffer|global)_store_(\w+)"),
    }


Loop = TypeVar("Loop", bound=list)


def _main_loop(loops: list[Loop], tensor_core: str) -> Loop | None:
    """The last of the innermost loops that have tensor-core work, or else the longest: an adapter's comes before."""
    innermost = [loop for loop in loops if not any(set(other) < set(loop) for other in loops)]
    working = [loop for loop in innermost if any(re.match(tensor_core, each.name) for each in loop)]
    return working[-1] if working else max(loops, key=len, default=None)


def _count(names: list[str], pattern: str) -> dict[str, int]:
    found = (re.match(pattern, name) for name in names)
    return dict(Counter(".".join(filter(None, match.groups())) for match in found if match))
