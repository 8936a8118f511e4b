"""Which tile a kernel runs with: one short table, by kernel and architecture.

They are starting points from compiled code (registers, spills, shared memory: ``fastlora inspect``), for a user's
table to override once measured. An architecture that has no row gets that of the least capable relative, so nothing
here decides whether a GPU may run, only how well.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
import triton
from triton.runtime import driver

from fastlora.kernels.limits import next_power_of_2
from fastlora.kernels.waves import Product, fastest, speed_of

INTERPRETED = triton.knobs.runtime.interpret  # kernels ask when they are defined


class Tile(NamedTuple):
    """Block sizes (those that a kernel has), warps and pipeline stages of one compiled variant."""

    BLOCK_M: int = 0
    BLOCK_N: int = 0
    BLOCK_K: int = 0
    GROUP_M: int = 0
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int = 0  # registers a thread, where the compiler would take some more than let two programs run (NVIDIA)

    def kwargs(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {name: value for name, value in self._asdict().items() if value}


Bucket = tuple[str, tuple[int, ...]]  # a kernel, and the next power of two of each of a problem's sizes


def tile(kernel: str, *sizes: int) -> Tile:
    """The tile of this kernel on the current device for a problem of this size, of a product's M, N and K.

    Forced by `use`, measured, or the table's: of a product the fastest (`waves`), else the first row whose bound holds
    the size.
    """
    found = _forced.get(kernel)
    index = torch.cuda.current_device() if _has_cuda() else None
    if found is None and _source is not None and _forced_family is None:
        measured = _source(_name_of_device(index)).tiles
        fields = measured.get(bucket(kernel, sizes)) if measured else None
        found = None if fields is None else Tile(**fields)
    if found is None:
        found = _of_table(kernel, sizes, index, _forced_family)
    if _watched is not None:
        _watched[bucket(kernel, sizes)] = found
    return found


@functools.lru_cache(maxsize=4096)
def _of_table(kernel: str, sizes: tuple[int, ...], index: int | None, forced_family: str | None) -> Tile:
    name = forced_family or _family_of_device(index)
    rows = rows_of(kernel, name)
    if not isinstance(rows, tuple):
        return next(row for bound, row in rows.items() if bound >= sizes[0])
    if forced_family is not None:  # which is only imagined: of the usual part
        count = speed_of(name).multiprocessors
    elif index is not None:
        count = multiprocessors(torch.device("cuda", index))
    else:
        count = 4 if INTERPRETED else speed_of(name).multiprocessors
    M, N, K = sizes
    return fastest(rows, Product(M, N, K, name, count, 4 if kernel.endswith("fp32") else 2))


T = TypeVar("T")


class ByTile(Generic[T]):
    """Keeps what ``make`` returns for each tile; a call returns that of the tile to use now."""

    def __init__(self, make: Callable[[Tile], T], kernel: str, *sizes: int) -> None:
        self.make, self.kernel, self.sizes = make, kernel, sizes
        self.made: dict[Tile, T] = {}

    def __call__(self) -> T:
        t = tile(self.kernel, *self.sizes)
        found = self.made.get(t)
        if found is None:
            found = self.made[t] = self.make(t)
        return found


def rows_of(kernel: str, name: str) -> "Rows":
    """The tiles of this kernel on this architecture, or what sizes they are for."""
    rows = TILES[kernel]
    return rows.get(name) or (rows.get("gfx942") if name.startswith("gfx") else None) or rows["default"]


TMA = "lora_matmul tma"  # how the rows of products begin whose tiles the hardware copies


def name_of_matmul(tma: bool, itemsize: int, group: bool, dropout: bool) -> str:
    """The rows for the kernel of a `lora_matmul`."""
    if tma and itemsize == 2:
        return TMA + " group" * group + " dropout" * dropout
    if itemsize > 2:
        return "lora_matmul fp32"
    return "lora_matmul group dropout" if group and dropout else "lora_matmul"


def bucket(kernel: str, sizes: tuple[int, ...]) -> Bucket:
    """By what a measured tile is kept: the kernel, and its sizes rounded up to powers of two."""
    return kernel, tuple(map(next_power_of_2, sizes))


_watched: dict[Bucket, Tile] | None = None


@contextmanager
def watch() -> Iterator[dict[Bucket, Tile]]:
    """The tiles that are launched within the context."""
    global _watched
    _watched, before = {}, _watched
    try:
        yield _watched
    finally:
        _watched = before


_forced: dict[str, Tile] = {}


@contextmanager
def use(kernel: str, forced: Tile) -> Iterator[None]:
    """Launch this kernel with this tile within the context, whatever the size: for measuring tiles."""
    before = _forced.get(kernel)
    _forced[kernel] = forced
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before


class Measured(Protocol):
    """What was measured on a device: the fields of tiles."""

    tiles: dict[Bucket, dict[str, int]]


_source: Callable[[str], Measured] | None = None


def measured_by(source: Callable[[str], Measured]) -> None:
    """Set the function that returns what was measured on a device, given its name. fastlora sets it at the first
    launch, since this folder does not import the package's tables."""
    global _source
    _source = source


_has_cuda = functools.cache(torch.cuda.is_available)  # asks the driver every time


@functools.cache
def _name_of_device(index: int | None) -> str:
    """The name of this CUDA device, or without CUDA of what there is."""
    if index is not None:
        return torch.cuda.get_device_name(index)
    return torch.xpu.get_device_name() if torch.xpu.is_available() else "cpu"


_forced_family: str | None = None


def force_family(name: str | None) -> None:
    """Choose tiles as on this architecture, whatever the device; None ends it. For compiling ahead of time."""
    global _forced_family
    _forced_family = name


def family() -> str:
    """The architecture whose rows serve the current device."""
    return _forced_family or _family_of_device(torch.cuda.current_device() if _has_cuda() else None)


@functools.cache
def _family_of_device(index: int | None) -> str:
    if INTERPRETED:
        return "interpreter"
    try:
        target = driver.active.get_current_target()
    except RuntimeError:  # no GPU: what would run on one can still be predicted
        return "default"
    return family_of(target.backend, target.arch)


def family_of(backend: str, arch: int | str) -> str:
    if backend == "hip":
        return "gfx942" if arch == "gfx942" else "gfx11" if str(arch).startswith("gfx11") else "gfx"
    if backend != "cuda" or not isinstance(arch, int):
        return backend
    if 100 <= arch < 110 or 120 <= arch < 130:
        return f"sm_{arch // 10}0"
    return {80: "sm_80", 90: "sm_90"}.get(arch, "default")  # consumer parts have 99 KB of shared memory


def has_tma() -> bool:
    """Whether the current device copies tiles in hardware (tensor descriptors)."""
    return family() in ("sm_90", "sm_100")


def has_tf32() -> bool:
    """Whether products on the current device can be of TF32. Of AMD's, those of gfx942 alone."""
    return family() not in ("gfx", "gfx11")


def has_ptx() -> bool:
    """Whether kernels for the current device may contain PTX."""
    return family() in ("sm_80", "sm_90", "sm_100", "sm_120", "default")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs fill the device once."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type in ("cpu", "meta"):
        return 4 if INTERPRETED else 132
    return driver.active.utils.get_device_properties(device.index)["multiprocessor_count"]


ANY = 1 << 30  # a bound that every size is under

# Of a product, tiles to choose from; of the other kernels the largest size that each row is for.
Rows = tuple[Tile, ...] | dict[int, Tile]

_INTERPRETED_MATMUL = (
    Tile(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, GROUP_M=2),
    Tile(BLOCK_M=64, BLOCK_N=128, BLOCK_K=128, GROUP_M=2),
)
_NARROW = Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=6)
_MIDDLE = Tile(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=5)
_SQUARE = Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=4)
_WIDE = Tile(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)

TILES: dict[str, dict[str, Rows]] = {
    "shrink": {  # by the ranks that a program sums up, padded
        "sm_90": {
            32: Tile(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=3),
            64: Tile(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=3),
            128: Tile(BLOCK_M=64, BLOCK_K=32, num_warps=4, num_stages=3),
            ANY: Tile(BLOCK_M=32, BLOCK_K=32, num_warps=4, num_stages=3),
        },
        "sm_100": {
            32: Tile(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3),
            64: Tile(BLOCK_M=64, BLOCK_K=32, num_warps=8, num_stages=3),
            128: Tile(BLOCK_M=64, BLOCK_K=32, num_warps=8, num_stages=3),
            ANY: Tile(BLOCK_M=32, BLOCK_K=32, num_warps=8, num_stages=3),
        },
        "gfx942": {
            32: Tile(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=3),
            64: Tile(BLOCK_M=64, BLOCK_K=32, num_warps=4, num_stages=3),
            128: Tile(BLOCK_M=64, BLOCK_K=32, num_warps=8, num_stages=3),
            ANY: Tile(BLOCK_M=64, BLOCK_K=32, num_warps=8, num_stages=2),
        },
        "default": {
            32: Tile(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=3),
            64: Tile(BLOCK_M=64, BLOCK_K=32, num_warps=4, num_stages=3),
            128: Tile(BLOCK_M=64, BLOCK_K=32, num_warps=8, num_stages=3),
            ANY: Tile(BLOCK_M=32, BLOCK_K=32, num_warps=8, num_stages=3),
        },
        "gfx11": {ANY: Tile(BLOCK_M=64, BLOCK_K=32, num_warps=8, num_stages=2)},
        "interpreter": {ANY: Tile(BLOCK_M=32, BLOCK_K=32)},
    },
    "shrink fp32": {
        "default": {ANY: Tile(BLOCK_M=64, BLOCK_K=32, num_warps=8, num_stages=3)},
        "interpreter": {ANY: Tile(BLOCK_M=32, BLOCK_K=32)},
    },
    "lora_matmul": {
        "default": (
            Tile(BLOCK_M=16, BLOCK_N=64, BLOCK_K=128, GROUP_M=1, num_warps=4, num_stages=4),
            Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=4),
            Tile(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=4, num_stages=4),
            Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=8, num_stages=4),
        ),
        "sm_120": (
            Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, num_warps=8, num_stages=3),
            Tile(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=4, num_stages=4),
            Tile(BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, num_warps=8, num_stages=3),
        ),
        "gfx11": (
            Tile(BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, GROUP_M=1, num_warps=4, num_stages=2),
            Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, num_warps=4, num_stages=2),
            Tile(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=8, num_stages=2),
        ),
        "interpreter": _INTERPRETED_MATMUL,
    },
    "lora_matmul group dropout": {  # the mask and an accumulator of its own for every part
        "default": (Tile(BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, num_warps=8, num_stages=4),),
        "gfx11": (Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, num_warps=8, num_stages=2),),
        "interpreter": (Tile(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, GROUP_M=2),),
    },
    "lora_matmul fp32": {
        "default": (Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, GROUP_M=8, num_warps=8, num_stages=3),),
        "interpreter": (Tile(BLOCK_M=32, BLOCK_N=32, BLOCK_K=16, GROUP_M=2),),
    },
    "lora_matmul tma": {
        "sm_100": (_NARROW, _MIDDLE, _SQUARE._replace(num_warps=4)),  # beside fp32 adapters a larger one does not fit
        "default": (_NARROW, _MIDDLE, _SQUARE, _WIDE),
        "interpreter": _INTERPRETED_MATMUL,
    },
    "lora_matmul tma dropout": {  # the mask takes the registers of half an accumulator
        "default": (_NARROW, _MIDDLE, _SQUARE),
        "interpreter": _INTERPRETED_MATMUL,
    },
    "lora_matmul tma group": {  # the operands of every part stay in registers
        "default": (_NARROW, _MIDDLE, _SQUARE),
        "interpreter": _INTERPRETED_MATMUL,
    },
    "lora_matmul tma group dropout": {  # and so do two accumulators beside a mask
        "default": (_NARROW, _SQUARE._replace(BLOCK_N=64)),
        "interpreter": _INTERPRETED_MATMUL,
    },
    "lora_grad": {  # by padded rank; BLOCK_N columns of dy stay with a program
        "sm_90": {
            32: Tile(BLOCK_M=32, BLOCK_N=256, num_warps=4, num_stages=3),
            64: Tile(BLOCK_M=64, BLOCK_N=128, num_warps=8, num_stages=3, maxnreg=128),
            ANY: Tile(BLOCK_M=32, BLOCK_N=128, num_warps=8, num_stages=3),
        },
        "sm_100": {
            32: Tile(BLOCK_M=32, BLOCK_N=256, num_warps=8, num_stages=3),
            64: Tile(BLOCK_M=64, BLOCK_N=128, num_warps=8, num_stages=3),
            ANY: Tile(BLOCK_M=32, BLOCK_N=128, num_warps=8, num_stages=3),
        },
        "gfx942": {
            32: Tile(BLOCK_M=32, BLOCK_N=256, num_warps=4, num_stages=3),
            64: Tile(BLOCK_M=32, BLOCK_N=128, num_warps=8, num_stages=3),
            ANY: Tile(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=3),
        },
        "default": {
            32: Tile(BLOCK_M=32, BLOCK_N=256, num_warps=4, num_stages=3, maxnreg=168),
            64: Tile(BLOCK_M=32, BLOCK_N=128, num_warps=8, num_stages=3),
            ANY: Tile(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=3),
        },
        "gfx11": {
            64: Tile(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=2),
            ANY: Tile(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=2),
        },
        "interpreter": {ANY: Tile(BLOCK_M=16, BLOCK_N=64)},
    },
    "lora_grad fp32": {
        "default": {ANY: Tile(BLOCK_M=32, BLOCK_N=64, num_warps=8, num_stages=3)},
        "interpreter": {ANY: Tile(BLOCK_M=16, BLOCK_N=64)},
    },
    "decode_4bit": {
        "default": {ANY: Tile(BLOCK_N=8, BLOCK_K=1024, num_warps=4)},
        "interpreter": {ANY: Tile(BLOCK_N=16, BLOCK_K=64)},
    },
    "decode_4bit narrow": {  # rows that are no whole groups of 32 weights
        "default": {ANY: Tile(BLOCK_N=16, BLOCK_K=64, num_warps=4)},
        "interpreter": {ANY: Tile(BLOCK_N=16, BLOCK_K=64)},
    },
    "decode_4bit merged": {
        "default": {ANY: Tile(BLOCK_N=64, BLOCK_K=128, num_warps=4)},
        "gfx11": {ANY: Tile(BLOCK_N=64, BLOCK_K=128, num_warps=8)},
        "interpreter": {ANY: Tile(BLOCK_N=16, BLOCK_K=64)},
    },
    "dora_grad": {  # rows of 256 bytes, so that a program has few columns to sum up and many programs are there
        "default": {ANY: Tile(BLOCK_M=16, BLOCK_N=128, num_warps=4)},
        "interpreter": {ANY: Tile(BLOCK_M=16, BLOCK_N=64)},
    },
    "swiglu": {  # 8 elements a thread, so that a half-precision load is 16 bytes
        "default": {ANY: Tile(BLOCK_M=1, BLOCK_K=1024, num_warps=4)},
        "interpreter": {ANY: Tile(BLOCK_M=2, BLOCK_K=32)},
    },
    "nf4_matmul": {  # by the larger of M and the padded rank
        "sm_90": {ANY: Tile(BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=4)},
        "gfx942": {ANY: Tile(BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=2)},
        "sm_120": {
            16: Tile(BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=4),
            ANY: Tile(BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=2),
        },
        "default": {
            16: Tile(BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=4),
            ANY: Tile(BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3),
        },
        "gfx11": {ANY: Tile(BLOCK_N=32, BLOCK_K=64, num_warps=8, num_stages=2)},
        "interpreter": {ANY: Tile(BLOCK_N=32, BLOCK_K=64)},
    },
    "nf4_matmul fp32": {
        "default": {ANY: Tile(BLOCK_N=32, BLOCK_K=64, num_warps=4, num_stages=2)},
        "interpreter": {ANY: Tile(BLOCK_N=32, BLOCK_K=64)},
    },
}
