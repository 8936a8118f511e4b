"""What one adapted layer costs the host: PEFT's layer against the patched one on tensors too small to matter.

example: python benchmarks/host_overhead.py --out host_overhead.json
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import peft
import torch
from torch import Tensor, nn

import fastlora
from fastlora.benchmarks.arguments import UsageError
from fastlora.benchmarks.environment import environment, refuse_changed_code
from fastlora.benchmarks.records import to_json, write_json

TOKENS, FEATURES, RANK = 4, 8, 4
WARMUP = 300


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, FEATURES, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def layers(dropout: float) -> dict[str, nn.Module]:
    """The same layer frozen, adapted by PEFT, and adapted by PEFT and patched."""
    config = peft.LoraConfig(target_modules=["layer"], r=RANK, lora_dropout=dropout)
    theirs = peft.get_peft_model(Model(), config)
    ours = copy.deepcopy(theirs)
    assert fastlora.patch(ours).patched
    return {"frozen": Model().layer.requires_grad_(False), "peft": theirs.model.layer, "fastlora": ours.model.layer}


def modes(x: Tensor, dy: Tensor, compared: dict[str, nn.Module]) -> dict[str, Callable[[nn.Module], object]]:
    leaves = {layer: [x, *(p for p in layer.parameters() if p.requires_grad)] for layer in compared.values()}

    def without_grad(layer):
        with torch.no_grad():
            return layer(x)

    def with_backward(layer):
        return torch.autograd.grad(layer(x), leaves[layer], dy)

    return {"forward, no grad": without_grad, "forward and backward": with_backward}


def microseconds(dropout: float, rounds: int) -> dict[str, dict[str, float]]:
    """For each mode and layer the median time of a call; the layers are called in turn."""
    x = torch.randn(TOKENS, FEATURES, dtype=torch.bfloat16, requires_grad=True)
    found, compared = {}, layers(dropout)
    for mode, call in modes(x, torch.randn(TOKENS, FEATURES, dtype=torch.bfloat16), compared).items():
        times: dict[str, list[float]] = {name: [] for name in compared}
        for _ in range(WARMUP + rounds):
            for name, layer in compared.items():
                start = time.perf_counter()
                call(layer)
                times[name].append(time.perf_counter() - start)
        found[mode] = {name: round(median(taken[WARMUP:]) * 1e6, 1) for name, taken in times.items()}
        found[mode]["fastlora / peft"] = round(found[mode]["fastlora"] / found[mode]["peft"], 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4000, help="calls that count (default: 4000)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    where = environment(torch.device("cpu"))
    try:
        if args.out is not None:
            refuse_changed_code(args.out)
    except UsageError as error:
        parser.error(str(error))
    cases = {f"bf16 base, dropout {p}": microseconds(p, args.rounds) for p in (0.0, 0.05)}
    report = {"environment": where, "microseconds": cases}
    if args.out is not None:
        write_json(args.out, report)
    if args.json:
        print(to_json(report))
        return
    for case, found in cases.items():
        for mode, row in found.items():
            print(f"{case}, {mode}: " + ", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
