"""Train a tiny adapted model on two processes in every way that `test_sharding.Case` can say.

``python -m tests.sharded_runs FOLDER CASES``, with CASES a JSON list: both processes train every case in turn, and the
first writes what happened to FOLDER/results.json. They are forked once everything is imported.
"""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace as Case  # of test_sharding, which is not imported here

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))  # helpers of tests are imported by their own names

import peft
import torch
import torch.distributed as dist
from accuracy import linear_4bit
from blocks import HIDDEN, Block, SwiGLU, randomise
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastlora

WORLD, ROWS, LR = 2, 4, 1e-2
WIDE = ("fp64", "dora")  # bases that are in fp64


class Model(nn.Module):
    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.layers, self.checkpointing = nn.ModuleList([Block(), Block()]), checkpointing

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return x


def adapted(case: Case) -> nn.Module:
    torch.manual_seed(0)
    wide = case.base in WIDE
    model = Model(case.checkpointing).to(torch.float64 if wide else torch.float32)
    if case.base == "nf4":
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear):
                bias = None if layer.bias is None else layer.bias.detach()
                model.set_submodule(name, linear_4bit(layer.weight.detach(), bias, storage=torch.float32))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, use_dora=case.base == "dora")
    model = peft.get_peft_model(model, config)
    if wide:
        model.to(torch.float64)
    return randomise(model)


def wrapped(model: nn.Module, case: Case) -> nn.Module:
    if case.stack == "DDP":
        return DistributedDataParallel(model)
    if case.stack == "FSDP1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if case.stack == "FSDP2":
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options = {
            "mesh": init_device_mesh("cpu", (WORLD,)),
            "reshard_after_forward": case.reshard,
            "mp_policy": half if case.base == "mixed" else MixedPrecisionPolicy(),
        }
        units = {"block": Block, "MLP": SwiGLU, "layer": peft.tuners.lora.LoraLayer}
        for module in [m for m in model.modules() if isinstance(m, units[case.unit])]:
            fully_shard(module, **options)
        fully_shard(model, **options)
    return model


def by_deepspeed(model: nn.Module, stage: int) -> tuple[nn.Module, Callable[[torch.Tensor], None]]:
    """The model in DeepSpeed's engine, and a training step of it."""
    import deepspeed  # which not every test environment has

    trained = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": ROWS // WORLD,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(trained, lr=LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=trained, config=config)

    def step(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return engine, step


def by_torch(model: nn.Module) -> tuple[nn.Module, Callable[[torch.Tensor], None]]:
    """The model, and a training step of it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def run(case: Case) -> dict:
    model = adapted(case)
    if case.patch == "before":
        said = fastlora.patch(model)
    stage = {"ZeRO-2": 2, "ZeRO-3": 3}.get(case.stack)
    whole, step = by_deepspeed(model, stage) if stage else by_torch(wrapped(model, case))
    if case.patch == "after":
        said = fastlora.patch(whole, strict=case.unit != "layer" and not stage)  # shards are no reason to refuse
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, ROWS, 5, HIDDEN, dtype=torch.float64, generator=generator)
    rank, share = dist.get_rank(), ROWS // WORLD
    mine = slice(None) if case.stack == "one process" else slice(rank * share, (rank + 1) * share)
    dtype = torch.float64 if case.base in WIDE else torch.float32
    losses = []
    for _ in range(case.steps):
        loss = (whole(x[mine].to(dtype)) - target[mine]).square().mean()
        step(loss)
        total = loss.detach().double()
        dist.all_reduce(total)
        losses.append(total.item() / WORLD)
    result = {"losses": losses}
    if case.patch in ("before", "after"):
        counts = fastlora.report(whole)
        result |= {"said": asdict(said), "text": str(said)}
        result |= {kind: {n: asdict(c) for n, c in getattr(counts, kind).items()} for kind in ("layers", "mlps")}
        result["unpatched"] = len(fastlora.unpatch(whole))
    return result


def process(rank: int, folder: str, cases: str) -> None:
    for_deepspeed = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "DS_ACCELERATOR": "cpu"}
    os.environ.update({name: str(value) for name, value in for_deepspeed.items()})
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results = []
    for case in [Case(**each) for each in json.loads(cases)]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = run(case)
            except Exception:
                result = {"error": traceback.format_exc()}
        result["warnings"] = sorted({str(w.message) for w in caught if "fastlora" in str(w.message)})
        results.append(result)
        dist.barrier()
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(process, sys.argv[1:], nprocs=WORLD, start_method="fork")
