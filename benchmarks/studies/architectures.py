"""What the blocks of other models gain: those of OPT, BERT, Phi-3 and GPT-2 beside Llama's.

Three blocks of each, 768 wide and 3072 in the MLP, with random weights, adapters of r = 16 on every linear layer and
AdamW, 2 x 256 tokens, the providers' steps in turn. OPT writes its MLP out in the block and BERT has it in two modules:
their layers run one by one. Phi-3's gate and up are one layer, and GPT-2's layers are Conv1D."""

import sys
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from torch import nn

from fastlora.benchmarks.cases import models
from fastlora.benchmarks.studies import common
from fastlora.benchmarks.studies.common import Row, Setup, Study, column, pick

K, H, HEADS, VOCABULARY, R = 768, 3072, 12, 512, 16
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": K, "num_attention_heads": HEADS, "vocab_size": VOCABULARY} | TOKENS
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PROVIDERS = ("frozen", "peft", "fastlora")
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {  # model, config, and its arguments
    "Llama": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"intermediate_size": H}),
    "OPT": ("OPTForCausalLM", "OPTConfig", SIZES | {"ffn_dim": H, "word_embed_proj_dim": K, "dropout": 0.0}),
    "BERT": ("BertLMHeadModel", "BertConfig", SIZES | {"intermediate_size": H, "is_decoder": True} | NO_DROPOUT),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", SIZES | {"intermediate_size": H}),
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": K, "n_inner": H, "n_head": HEADS, "vocab_size": VOCABULARY}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        | TOKENS,
    ),
}


def make_model(family: str, layers: int) -> nn.Module:
    model, config, arguments = FAMILIES[family]
    layers_name = "n_layer" if family == "GPT-2" else "num_hidden_layers"
    return getattr(transformers, model)(getattr(transformers, config)(**arguments, **{layers_name: layers}))


def measure(setup: Setup) -> list[Row]:
    base = models.default_bases(setup.device)[0]
    rows: list[Row] = []
    tokens = 32 if setup.quick else 256
    generator = torch.Generator().manual_seed(setup.seed)
    chosen = list(FAMILIES)[: 2 if setup.quick else None]
    for family in setup.progress.track(chosen, description="architectures"):
        torch.manual_seed(setup.seed)
        model = make_model(family, 1 if setup.quick else 3).to(setup.device, models.DENSE[base]).requires_grad_(False)
        rounds = 3 if setup.quick else 15
        setup.data = [torch.randint(3, VOCABULARY, (2, tokens), generator=generator) for _ in range(rounds)]
        trainers = setup.trainers(R, base=model, fan_in_fan_out=family == "GPT-2")
        setup.train([trainers[name] for name in PROVIDERS])
        frozen, peft = trainers["frozen"], trainers["peft"]
        for name in PROVIDERS:
            row = {"family": family, "provider": name, "base": base, **common.measured(trainers[name], frozen)}
            rows.append(row | {"over_peft": common.ratio(trainers[name], peft)})
    return rows


def of_peft(rows: list[Row], family: str) -> tuple[float, float]:
    """How many times PEFT's speed fastlora has, and what share of PEFT's bytes it saves for backward."""
    (peft,), (ours,) = (pick(rows, family=family, provider=name) for name in ("peft", "fastlora"))
    return 1 / ours["over_peft"], ours["saved_bytes"] / peft["saved_bytes"]


def families(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["family"] for row in rows))


def finding(rows: list[Row]) -> str:
    each = {family: of_peft(rows, family) for family in families(rows)}
    speeds = ", ".join(f"{speed:.2f} ({family})" for family, (speed, _) in each.items())
    shares = ", ".join(f"{share:.2f} ({family})" for family, (_, share) in each.items())
    return f"A step has {speeds} times PEFT's speed. What is kept for backward is {shares} of PEFT's."


def draw(rows: list[Row], figure: Figure) -> None:
    figure.set_size_inches(10.5, 4.4)
    names = families(rows)
    speeds = [of_peft(rows, family)[0] for family in names]
    figure.suptitle(f"Blocks of {len(names)} architectures: {min(speeds):.2f} to {max(speeds):.2f} times PEFT's speed")
    time, memory = figure.subplots(1, 2)
    saved = {name: [size / 1e6 for size in column(rows, "saved_bytes", provider=name)] for name in PROVIDERS[1:]}
    common.paired_bars(time, {name: column(rows, "over_frozen", provider=name) for name in PROVIDERS[1:]}, "%.2f")
    common.paired_bars(memory, saved, "%.0f")
    time.axhline(1, color="black", linestyle="--", label="frozen model")
    time.set_ylabel("time of a step / the frozen model's")
    memory.set_ylabel("saved for backward, MB")
    for axes in (time, memory):
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel("three blocks of")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


STUDY = Study(
    name="architectures",
    title="Blocks of other models",
    doc=__doc__,
    measure=measure,
    finding=finding,
    draw=draw,
    columns={
        "family": "blocks of",
        "provider": "provider",
        "base": "base",
        "saved_bytes": "saved, MB",
        "peak_bytes": "peak, MB",
        "step_p50_seconds": "s a step",
        "over_frozen": "over frozen",
        "over_peft": "over PEFT",
    },
    needs_model=False,
)

if __name__ == "__main__":
    sys.exit(common.main("architectures"))
