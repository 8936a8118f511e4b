"""``fastlora info``."""

import json
import re
from argparse import Namespace

import torch

from fastlora import kernel_ops
from fastlora.benchmarks.environment import cores, cpu_kernels, cpu_name, versions


def run(args: Namespace) -> int:
    found = {
        "versions": versions(),
        "devices": devices(),
        "cpu_kernels": cpu_kernels(),
        "gpu_kernels": kernel_ops.unsupported_reason() or "on",
        "implementations": implementations(),
    }
    print(json.dumps(found, indent=2) if args.json else _as_text(found))
    return 0


def devices() -> dict:
    return {
        "cpu": {
            "name": cpu_name(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "amx": torch.cpu._is_amx_tile_supported(),
        },
        "cuda": [
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "kernels": kernel_ops.unsupported_reason(torch.device("cuda", i)) or "on",
            }
            for i, properties in enumerate(map(torch.cuda.get_device_properties, range(torch.cuda.device_count())))
        ],
    }


def implementations() -> dict[str, dict[str, str]]:
    """What runs each op on each device: a kernel registered for that device, or the composition that serves all."""
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if re.match("fastlora::[^_]", name))
    return {
        device: {
            op.removeprefix("fastlora::"): (
                "kernel" if torch._C._dispatch_has_kernel_for_dispatch_key(op, device.upper()) else "torch composition"
            )
            for op in names
        }
        for device in ("cpu", "cuda")
    }


def _as_text(found: dict) -> str:
    cpu, gpus = found["devices"]["cpu"], found["devices"]["cuda"]
    abilities = [cpu["capability"], *(name for name in ("avx512_bf16", "amx") if cpu[name])]
    rows = list(found["versions"].items())
    rows.append(("cpu", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {', '.join(abilities)}"))
    rows += [
        (
            f"cuda:{i}",
            f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory_bytes'] / 2**30:.0f} GiB, "
            f"kernels {gpu['kernels']}",
        )
        for i, gpu in enumerate(gpus)
    ] or [("cuda", "no device")]
    rows += [("cpu kernels", found["cpu_kernels"]), ("gpu kernels", found["gpu_kernels"])]
    for device, used in found["implementations"].items():
        for implementation in sorted(set(used.values())):
            names = ", ".join(op for op, runs in used.items() if runs == implementation)
            rows.append((f"ops on {device}", f"{implementation}: {names}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
