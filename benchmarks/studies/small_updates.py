"""How much of a small update survives rounding: the unfused bf16 layer against fastlora's.

The unfused layer rounds y to bf16 before the adapter is added, which erases updates that are small against y; fastlora
adds the adapter first and rounds once. What is kept is the regression of what a layer adds to the exact base product on
what its adapter should add, which averages rounding errors out: 1 is all of it. Adapters are bf16 too, scaling is 1."""

import sys
from typing import Any

import peft
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastlora import lora_linear, reference
from fastlora.benchmarks.cases.models import to_base
from fastlora.benchmarks.pictures import COLOURS
from fastlora.benchmarks.studies import common
from fastlora.benchmarks.studies.common import Row, Setup, Study, column
from fastlora.benchmarks.tables import power
from fastlora.fourbit import weight_4bit

M, K, N, R = 512, 4096, 1024, 16
DRAWS = 8  # of x; the mean over them is what is said
MAGNITUDES = (1e-5, 1e-4, 1e-3, 1e-2)
LAYERS = ("unfused bf16 layer", "fastlora, bf16 base", "fastlora, NF4 base")


def measure(setup: Setup) -> list[Row]:
    generator = torch.Generator(setup.device).manual_seed(setup.seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=generator, device=setup.device)).bfloat16()

    w, a, unit = normal(N, K, std=K**-0.5), normal(R, K, std=K**-0.5), normal(N, R)
    model: Any = nn.Sequential(nn.Linear(K, N, bias=False, device=setup.device, dtype=torch.bfloat16))
    model[0].weight = nn.Parameter(w, requires_grad=False)
    nf4: Any = to_base(nn.Sequential(model[0]), "nf4").get_submodule("0").weight
    config = peft.LoraConfig(r=R, lora_alpha=R, target_modules=["0"])
    unfused: Any = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    layer = unfused.base_model.model[0]
    layer.lora_A["default"].weight.data = a

    shares: dict[tuple[float, str], list[float]] = {}
    draws = 2 if setup.quick else DRAWS
    with torch.no_grad():
        weights = {"bf16": w.double().t(), "nf4": decoded(nf4).t()}
        for _ in setup.progress.track(range(draws), description="draws of x"):
            x = normal(M, K)
            bases = {base: x.double() @ weight for base, weight in weights.items()}
            for magnitude in MAGNITUDES:
                b = (magnitude * unit.float()).bfloat16()
                layer.lora_B["default"].weight.data = b
                expected = x.double() @ a.double().t() @ b.double().t()
                results = (
                    (unfused(x), bases["bf16"]),
                    (lora_linear(x, w, a, b, 1.0), bases["bf16"]),
                    (lora_linear(x, nf4, a, b, 1.0), bases["nf4"]),
                )
                for name, (y, base) in zip(LAYERS, results, strict=True):
                    kept = ((y.double() - base) * expected).sum() / expected.square().sum()
                    shares.setdefault((magnitude, name), []).append(kept.item())
    return [
        {"magnitude_of_B": magnitude, "layer": name, "draws": draws, "share_kept": sum(kept) / draws}
        for (magnitude, name), kept in shares.items()
    ]


def decoded(weight: Any) -> Tensor:
    """A 4-bit weight in fp64, by the formula."""
    w, code = weight_4bit(weight), weight.quant_state.code
    absmax = w.absmax
    if w.code2 is not None and w.absmax2 is not None and w.offset is not None:
        absmax = reference.decode_absmax(absmax, w.code2, w.absmax2, w.blocksize2, w.offset)
    return reference.decode_4bit(w.packed, absmax, code.double(), w.blocksize, w.N, w.K)


def finding(rows: list[Row]) -> str:
    magnitude = 1e-4
    unfused, dense, nf4 = (column(rows, "share_kept", magnitude_of_B=magnitude, layer=name)[0] for name in LAYERS)
    worst = {name: max(column(rows, "share_kept", layer=name), key=lambda kept: abs(kept - 1)) for name in LAYERS}
    return (
        f"Where B is around {power(magnitude)}, as early in training, the unfused bf16 layer keeps {unfused:.2f} of "
        f"the adapter's contribution, fastlora {dense:.2f} on a bf16 base and {nf4:.2f} on NF4. Over magnitudes from "
        f"{power(rows[0]['magnitude_of_B'])} to {power(rows[-1]['magnitude_of_B'])} the share furthest from 1 is "
        f"{worst[LAYERS[0]]:.2f} unfused, {worst[LAYERS[1]]:.2f} and {worst[LAYERS[2]]:.2f} with fastlora."
    )


def draw(rows: list[Row], figure: Figure) -> None:
    figure.set_size_inches(8, 4.2)
    axes = figure.subplots()
    unfused, ours, _ = (column(rows, "share_kept", magnitude_of_B=1e-4, layer=name)[0] for name in LAYERS)
    figure.suptitle(f"Of an update with B around 1e-4, the unfused layer keeps {unfused:.0%}, fastlora {ours:.0%}")
    for name, colour, line in zip(LAYERS, ("peft", "fastlora", "fastlora+compile"), ("-o", "-s", "--^"), strict=True):
        magnitudes = column(rows, "magnitude_of_B", layer=name)
        axes.plot(magnitudes, column(rows, "share_kept", layer=name), line, color=COLOURS[colour], label=name)
    axes.axhline(1, color="black", linestyle="--", label="all of it: the limit", zorder=0)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("magnitude of B")
    axes.set_ylabel("share of the adapter's contribution in y")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)


STUDY = Study(
    name="small_updates",
    title="What small updates survive",
    doc=__doc__,
    measure=measure,
    finding=finding,
    draw=draw,
    columns={"magnitude_of_B": "magnitude of B", "layer": "layer", "share_kept": "share kept"},
    needs_model=False,
)

if __name__ == "__main__":
    sys.exit(common.main("small_updates"))
