"""Which of several ways an op is carried out on a GPU. Every plan of an op computes the same and passes the same tests.

| op          | plan      | what it does                                          | what it costs                    |
|-------------|-----------|-------------------------------------------------------|----------------------------------|
| lora_matmul | tail      | the adapter's product and the base's in one kernel    | our GEMM instead of the vendor's |
|             | base_last | the vendor's GEMM accumulates into the adapter's      | y written and read once more     |
| lora_grad   | one_pass  | dxa and db in one read of dy                          | partial sums of dxa              |
|             | two_pass  | dxa, then db                                          | a second read of dy              |
| linear_4bit | merged    | decode with the adapter added, then the vendor's GEMM | the weight written and read once |
|             | decoded   | decode, then as lora_matmul                           | the same, and xa                 |
|             | fused     | decode inside the product                             | decoding in every row of tiles   |

A group's lora_matmul (the dx of layers that share their x) has the same plans; `base_last` then passes over y once for
each of them.

``use(kernels="off")`` is no plan: every op is then what it is on a device without kernels, a composition of torch's.

A plan is, in this order: forced by `use`, measured by ``fastlora tune`` (`TABLE_FILE` in the user's cache directory),
or the one that the cost model predicts to be fastest. Nothing is measured behind a caller's back, and the file is read
when the first plan is chosen, not at import.
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastlora import costs
from fastlora.costs import Problem, Rates
from fastlora.files import replace_file
from fastlora.kernels.limits import MAX_GROUP, next_power_of_2, takes_fused
from fastlora.version import __version__

PLANS = {
    "lora_matmul": ("tail", "base_last"),
    "lora_grad": ("one_pass", "two_pass"),
    "linear_4bit": ("merged", "decoded", "fused"),
}
SWITCH = {"kernels": ("on", "off")}

Key = tuple[str, int, int, int, int, int, int, bool]

_forced: dict[str, str] = {}  # of all threads: autograd runs the backward of a GPU in threads of its own


def key(op: str, c: Problem) -> Key:
    """By what a measured plan is kept: M rounded up to a power of two, the other sizes as they are."""
    return op, next_power_of_2(c.M), c.N, c.K, c.r, c.parts, c.itemsize, c.p > 0


def possible(op: str, c: Problem) -> tuple[str, ...]:
    """The plans that can carry out this problem."""
    if op == "lora_matmul" and c.parts > MAX_GROUP:
        return ("base_last",)
    if op != "linear_4bit":
        return PLANS[op]
    if c.p > 0:
        return ("decoded",)
    return PLANS[op] if takes_fused(c.M, c.K, c.r, c.blocksize) else ("merged", "decoded")


@contextmanager
def use(**plans: str) -> Iterator[None]:
    """Force plans within this context, in all threads: ``with plans.use(lora_matmul="base_last"): ...``

    ``kernels="off"`` turns the kernels of GPUs off. Raises ValueError for an op or a plan that does not exist, and
    then from `choose` if the plan cannot carry out a problem.
    """
    global _forced
    choices = PLANS | SWITCH
    for op, plan in plans.items():
        if plan not in choices.get(op, ()):
            known = ", ".join(f"{op}={plan}" for op, names in choices.items() for plan in names)
            raise ValueError(f"plan must be one of {known}, got {op}={plan}")
    before, _forced = _forced, _forced | plans
    try:
        yield
    finally:
        _forced = before


def kernels_are_off() -> bool:
    """Whether `use` turned them off."""
    return _forced.get("kernels") == "off"


def choose(op: str, problem: Problem, device: str = "") -> str:
    """The plan for this problem on the device of this name."""
    forced = _forced.get(op)
    if forced is None:
        measured = table(device).plans.get(key(op, problem))
        return measured if measured in possible(op, problem) else by_rule(op, problem, device)
    if forced not in (fit := possible(op, problem)):
        raise ValueError(f"{op}={forced} cannot carry out {problem}: use {' or '.join(fit)}")
    return forced


@lru_cache(maxsize=4096)
def by_rule(op: str, problem: Problem, device: str = "") -> str:
    """The plan that the cost model predicts to be fastest, with the device's measured rates where there are any."""
    fit, c = possible(op, problem), problem
    nothing = c.M == 0 or c.K == 0 or (c.N == 0 and op != "lora_grad") or (c.r == 0 and op != "linear_4bit")
    if len(fit) == 1 or nothing:
        return fit[0]
    rates = table(device).rates or costs.modelled(device)
    return min(fit, key=lambda plan: costs.predict(op, plan, problem, rates).seconds)


# What ``fastlora tune`` measured.

FORMAT = 2
TABLE_FILE = "plans.json"


@dataclass
class Table:
    """What was measured on one device."""

    rates: Rates | None = None
    plans: dict[Key, str] = field(default_factory=dict)
    tiles: dict[tuple[str, tuple[int, ...]], dict[str, int]] = field(default_factory=dict)  # by kernel, powers of two
    versions: dict[str, str] = field(default_factory=dict)  # of what compiled the tiles
    environment: dict[str, Any] = field(default_factory=dict)


def table(device: str) -> Table:
    """The measurements of the device of this name; empty if there are none."""
    return _tables().get(device) or _EMPTY


def read_from(path: Path) -> None:
    """Choose by the measurements in this file, if there is one, instead of the user's."""
    global _file
    _file = path if path.exists() else None
    forget()


_file: Path | None = None


def cache_file() -> Path:
    """The user's measurements, in ``$XDG_CACHE_HOME/fastlora``, by default ``~/.cache/fastlora``, or `read_from`'s."""
    if _file is not None:
        return _file
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return folder / "fastlora" / TABLE_FILE


@cache
def _tables() -> dict[str, Table]:
    try:
        tables = read_tables(cache_file())
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: there is no home directory
        warnings.warn(f"fastlora ignores its measured plans and goes by its cost model: {error}", stacklevel=2)
        return {}
    for name, measured in tables.items():
        if measured.tiles and measured.versions != versions():
            was, now = (", ".join(map(" ".join, each.items())) for each in (measured.versions, versions()))
            message = (
                f"fastlora ignores the tiles measured on {name} with {was}: here is {now}. fastlora tune renews them"
            )
            warnings.warn(message, stacklevel=2)
            measured.tiles.clear()
    return tables


def versions() -> dict[str, str]:
    """What a tile depends on: the kernels and their compiler. Under another one it may not even fit."""
    return {"fastlora": __version__, "triton": version("triton")}


def read_tables(path: Path) -> dict[str, Table]:
    """Measurements by device name. Raises OSError, or ValueError naming the file if it is not one that this version
    writes."""
    try:
        found = json.loads(path.read_bytes())
        if found["version"] != FORMAT:
            raise ValueError(f"format {FORMAT} is understood here, the file has {found['version']!r}")
        return {name: _table_from_json(entry) for name, entry in found["devices"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a table of plans: {reason}") from error


def write_tables(path: Path, tables: dict[str, Table]) -> None:
    """Replace the file at once, and let this process choose by the new measurements from now on."""
    devices = {name: _table_to_json(measured) for name, measured in tables.items()}
    text = json.dumps({"version": FORMAT, "devices": devices}, indent=1, allow_nan=False)
    replace_file(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
    forget()


def forget() -> None:
    """Read the file again when the next plan is chosen."""
    _tables.cache_clear()
    by_rule.cache_clear()


_KEY = {"op": str, "M": int, "N": int, "K": int, "r": int, "parts": int, "itemsize": int, "dropout": bool}
_BLOCKS, _STAGES = {1 << i for i in range(12)}, set(range(1, 17))
_WARPS = {1 << i for i in range(6)}  # of 1024 threads, or 2048 of an AMD's
_TILE = dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M"), _BLOCKS)
_TILE |= {"num_warps": _WARPS, "num_stages": _STAGES, "maxnreg": set(range(0, 256, 8))}


def _table_to_json(measured: Table) -> dict:
    return {
        "environment": measured.environment,
        "versions": measured.versions,
        "rates": measured.rates and measured.rates.to_json(),
        "plans": [dict(zip(_KEY, at, strict=True)) | {"plan": plan} for at, plan in measured.plans.items()],
        "tiles": [{"kernel": name, "sizes": list(sizes), "tile": t} for (name, sizes), t in measured.tiles.items()],
    }


def _table_from_json(entry: dict) -> Table:
    measured = Table(versions=dict(entry["versions"]), environment=dict(entry["environment"]))
    for name in measured.versions:
        _typed(measured.versions, name, str)
    if entry["rates"] is not None:
        measured.rates = Rates.from_json(entry["rates"])
    for row in entry["plans"]:
        at: Any = tuple(_typed(row, name, type_) for name, type_ in _KEY.items())
        if row["plan"] not in PLANS.get(row["op"], ()):
            raise ValueError(f"there is no plan {row['op']}={row['plan']}")
        if any(type(value) is int and value < 0 for value in at):
            raise ValueError(f"sizes must not be negative, got {row!r}")
        measured.plans[at] = row["plan"]
    for row in entry["tiles"]:
        tile = {name: _typed(row["tile"], name, int) for name in row["tile"]}
        if not all(value in _TILE.get(name, ()) for name, value in tile.items()):
            what = "a tile has powers of two as BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M and num_warps, and num_stages"
            raise ValueError(f"{what} of 1 to 16, got {row['tile']!r}")
        sizes = tuple(_typed(row, "sizes", list))
        if not sizes or not all(type(size) is int and size == next_power_of_2(size) for size in sizes):
            raise ValueError(f"tiles are measured for powers of two, got the sizes {list(sizes)}")
        measured.tiles[_typed(row, "kernel", str), sizes] = tile
    return measured


def _typed(row: dict, name: str, type_: type) -> Any:
    if type(row[name]) is not type_:
        raise ValueError(f"{name} must be of type {type_.__name__}, got {row[name]!r}")
    return row[name]


_EMPTY = Table()
