"""Fused LoRA and QLoRA layers: an adapted layer that costs little over the frozen one.

report = fastlora.patch(peft_model)          # a PEFT model, in place
fastlora.add_lora(model, r=16)               # or without PEFT
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastlora.adapter_files import load_adapter, save_adapter
from fastlora.calls import Report, report
from fastlora.functional import lora_linear
from fastlora.model import add_lora, merge, unmerge
from fastlora.nn import LoRALinear, LoRAMLP
from fastlora.nn_experts import LoRAExperts
from fastlora.parallel import ParallelAdapter
from fastlora.trainer import AdapterCheckpoints
from fastlora.version import __version__

if TYPE_CHECKING:
    from fastlora.callback import Callback
    from fastlora.peft import PatchReport, patch, unpatch
    from fastlora.peft_rows import adapters_of_rows

__all__ = [
    "AdapterCheckpoints",
    "Callback",
    "LoRAExperts",
    "LoRALinear",
    "LoRAMLP",
    "ParallelAdapter",
    "PatchReport",
    "Report",
    "__version__",
    "adapters_of_rows",
    "add_lora",
    "load_adapter",
    "lora_linear",
    "merge",
    "patch",
    "report",
    "save_adapter",
    "unmerge",
    "unpatch",
]

_LAZY = dict.fromkeys(("PatchReport", "patch", "unpatch"), "peft")
_LAZY |= {"adapters_of_rows": "peft_rows", "Callback": "callback"}


def __getattr__(name: str) -> Any:
    """Import PEFT and transformers, which take seconds and are optional, when something of them is asked for."""
    if name in _LAZY:
        return getattr(import_module(f"fastlora.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
