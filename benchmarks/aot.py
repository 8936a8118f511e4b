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
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastlora.kernels import tiles


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
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * KB, 64 * KB, warps=32, registers=4 * 512 * 64),
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
    loop: int | None  # instructions of the innermost loop that has tensor-core work, or else of the longest
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
    """A driver that names a target."""

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
    read = _read_nvidia if "cubin" in compiled.asm else _read_amd
    result = Compiled(
        kernel=kernel,
        hash=compiled.hash,
        tile=tile,
        warps=metadata.num_warps,
        threads=chip.target.warp_size,
        shared=metadata.shared,
        occupancy=0,
        seconds=seconds,
        **read(compiled.asm),
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
    if chip.target.backend == "hip":
        by_registers = 4 * min(8, 512 // max(8, -(-c.registers // 8) * 8)) // c.warps
    else:
        by_registers = chip.registers // (-(-c.registers * 32 // 256) * 256 * c.warps)
    by_shared = chip.shared // (c.shared + (KB if chip.target.backend == "cuda" else 0)) if c.shared else 32
    return min(by_registers, by_shared, chip.warps // c.warps, 32)


def _read_nvidia(asm: dict[str, Any]) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    env = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}  # cuobjdump calls nvdisasm

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", "-sass", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    assert usage is not None, "cuobjdump reports no resource usage"
    text = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;\n]*)", dump, re.MULTILINE)
    program = [(int(address, 16), name, operands) for address, name, operands in text if name != "NOP"]
    names = [name for _, name, _ in program]
    jumps = [
        (int(match.group(1), 16), address)
        for address, name, operands in program
        if name.startswith("BRA") and (match := re.search(r"0x([0-9a-f]+)", operands))
    ]
    loops = [
        [name for address, name, _ in program if start <= address <= stop] for start, stop in jumps if start < stop
    ]
    return {
        "registers": int(usage.group(1)),
        "spills": int(usage.group(2)),
        "instructions": len(names),
        "loop": _main_loop(loops, r"HGMMA|HMMA|UTC\w*MMA"),
        "tensor_core": _count(names, r"(HGMMA|HMMA|IMMA|UTC\w*MMA)\b"),
        "loads": _count(names, r"(UTMALDG|LDGSTS|LDG)\b(?:.*?\.(64|128)\b)?"),
        "stores": _count(names, r"(UTMASTG|STG)\b(?:.*?\.(64|128)\b)?"),
    }


def _read_amd(asm: dict[str, Any]) -> dict[str, Any]:
    dump = asm["amdgcn"]

    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", dump)
        return int(match.group(1)) if match else 0

    lines = [line.split() for line in dump.splitlines() if re.match(r"\s+[a-z]\w+|\.?\w+:", line)]
    program = [line[0] for line in lines if line]
    labels = {name[:-1]: i for i, name in enumerate(program) if name.endswith(":")}
    loops = [
        [name for name in program[labels[line[1]] : i] if not name.endswith(":")]
        for i, line in enumerate(line for line in lines if line)
        if len(line) > 1 and re.match(r"s_c?branch", line[0]) and labels.get(line[1], i) < i
    ]
    names = [name for name in program if re.match(r"(s|v|ds|buffer|global)_\w+$", name)]
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "instructions": len(names),
        "loop": _main_loop(loops, r"v_mfma"),
        "tensor_core": _count(names, r"(v_mfma)"),
        "loads": _count(names, r"(?:buffer|global)_load_(\w+)"),
        "stores": _count(names, r"(?:buffer|global)_store_(\w+)"),
    }


def _main_loop(loops: list[list[str]], tensor_core: str) -> int | None:
    working = [loop for loop in loops if any(re.match(tensor_core, name) for name in loop)]
    return min(map(len, working)) if working else max(map(len, loops), default=None)


def _count(names: list[str], pattern: str) -> dict[str, int]:
    found = (re.match(pattern, name) for name in names)
    return dict(Counter(".".join(filter(None, match.groups())) for match in found if match))
