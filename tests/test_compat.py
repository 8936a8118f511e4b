"""`fastlora.compat`: what replaces a private name gives the same results, and PEFT's forward is the one that was read.

Seen to work with torch 2.11.0, 2.13.0, 2.14.1 and 2.15.0, PEFT 0.18.0 and 0.21.2, Triton 3.6.0, 3.8.0 and 3.9.0,
bitsandbytes 0.49.0 and 0.50.2, transformers 5.0.0, 5.23.0 and 5.24.0.
"""

import ast
import hashlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant

from fastlora import compat
from fastlora.benchmarks.accuracy import same
from fastlora.peft import OURS

GONE = {  # what is taken away before fastlora is imported
    "nothing": [],
    "saved-tensor hooks": ["torch._C._autograd._top_saved_tensors_default_hooks"],
    "functorch": ["torch._C._are_functorch_transforms_active"],
    "dispatch modes": ["torch._C._len_torch_dispatch_stack"],
    "forward AD": ["torch.autograd.forward_ad._current_level"],
    "grad mode": ["torch._C._set_grad_enabled"],
    "autocast": ["torch._C._is_any_autocast_enabled"],
    "graph tasks": ["torch._C._current_graph_task_id"],
    "keeping graphs": ["torch._C._autograd._get_current_graph_task_keep_graph"],
    "unsafe_view": ["torch.ops.aten._unsafe_view.default"],
    "owners": ["torch._C._storage_Use_Count"],
    "plain tensors": ["torch._C.DisableTorchFunctionSubclass"],
    "PEFT's attributes": [
        "peft.tuners.tuners_utils.BaseTunerLayer._active_adapter",
        "peft.tuners.tuners_utils.BaseTunerLayer._disable_adapters",
    ],
}
FUNCTORCH = "functorch"  # without its name every call falls back, so that nothing else would be met
TOGETHER = {
    "nothing": [],
    "all": [name for case, names in GONE.items() if case != FUNCTORCH for name in names],
    FUNCTORCH: GONE[FUNCTORCH],
}

# In a process of its own, which loads what takes long and then forks once for every case. There
# `fastlora.compat` is loaded before fastlora, with a ``hasattr`` that denies these names.
PROGRAM = """
import importlib.util, json, os, sys, traceback
sys.path.insert(0, "tests")
import bitsandbytes, peft, torch
import torch._dynamo
from torch.utils.checkpoint import checkpoint

def results(names):
    gone = {path.rpartition(".")[2] for path in names} - {"default"}
    gone |= {"_unsafe_view"} if any("_unsafe_view" in path for path in names) else set()
    spec = importlib.util.spec_from_file_location("fastlora.compat", "fastlora/compat.py")
    compat = sys.modules["fastlora.compat"] = importlib.util.module_from_spec(spec)
    compat.hasattr = lambda owner, name: name not in gone and hasattr(owner, name)
    spec.loader.exec_module(compat)

    import fastlora
    from accuracy import linear_4bit
    from blocks import HIDDEN, Block, randomise

    torch.manual_seed(0)
    block = Block()
    config = peft.LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.25)
    block.attention.o_proj = linear_4bit(block.attention.o_proj.weight.detach())
    model = randomise(peft.get_peft_model(torch.nn.Sequential(block), config))
    assert not fastlora.patch(model).skipped
    found = {}
    for training in (False, True):
        model.train(training)
        for how in ("plain", "again", "checkpoint", "autocast", "create graph", "no grad"):
            torch.manual_seed(1)
            x = torch.randn(2, 5, HIDDEN, requires_grad=True)
            h = x * 1
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")
            with autocast, torch.set_grad_enabled(how != "no grad"):
                y = checkpoint(model, h, use_reentrant=False) if how == "checkpoint" else model(h)
            found.setdefault(how, []).append(y.double().sum().item())
            if how != "no grad":
                model.zero_grad()
                y.float().square().sum().backward(create_graph=how == "create graph")
                grads = (t.grad for t in (x, *model.parameters()))
                found[how] += [grad.double().abs().sum().item() for grad in grads if grad is not None]
    fallbacks = sum(calls.own for calls in fastlora.report(model).layers.values())
    assert fallbacks == 0 or any("functorch" in path for path in names)
    return found

for case, names in json.load(sys.stdin).items():
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            print(json.dumps([case, results(names)]), flush=True)
        except BaseException:
            print(json.dumps([case, traceback.format_exc()]), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""


def results(cases: dict[str, list[str]]) -> dict[str, dict[str, torch.Tensor]]:
    """What a model computes without the names of each case."""
    command = [sys.executable, "-c", PROGRAM]
    env = os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "env": env, "cwd": Path(__file__).parents[1]}
    ran = subprocess.run(command, input=json.dumps(cases), **options)
    assert ran.returncode == 0, ran.stderr
    dtypes = {"autocast": torch.bfloat16}  # computed in, and so compared in
    found = {}
    for line in ran.stdout.splitlines():
        case, values = json.loads(line)
        assert isinstance(values, dict), f"{case}: {values}"
        found[case] = {how: torch.tensor(t, dtype=dtypes.get(how, torch.float32)) for how, t in values.items()}
    return found


@pytest.mark.parametrize(
    "cases", [TOGETHER, pytest.param(GONE, marks=pytest.mark.slow)], ids=["together", "one by one"]
)
def test_what_replaces_a_private_name_gives_the_same(cases):
    found = results(cases)
    expected = found["nothing"]
    for case, outputs in found.items():
        assert outputs.keys() == expected.keys(), case
        assert all(same(outputs[how], values) for how, values in expected.items()), case


def test_this_torch_has_every_name():
    """Otherwise something is slower than it need be: see what `fastlora.compat` says of it."""
    for path in [name for names in GONE.values() for name in names]:
        module, _, rest = path.partition(".")
        assert compat.find({"torch": torch, "peft": peft}[module], rest, None) is not None, path


def test_a_dual_level_is_found_by_probing():
    probe = compat._ProbedLevel()
    assert probe._current_level < 0
    with torch.autograd.forward_ad.dual_level():
        assert probe._current_level >= 0
    assert probe._current_level < 0


def test_storages_are_told_apart():
    t = torch.zeros(4)
    assert compat.share_storage(t, t[1:]) and not compat.share_storage(t, torch.zeros(4))
    meta = torch.zeros(4, device="meta")
    assert compat.share_storage(meta, meta[1:]) and not compat.share_storage(meta, torch.zeros(4, device="meta"))


READ = {  # hashes of PEFT's forward, without comments and layout, in the versions whose source was read
    "Linear": {"0a8b96d29dea80c2"},
    "Linear4bit": {"c4e3e7885324d1bb"},
    "Linear8bitLt": {"2f6e58dc9fd0c980"},
    "TorchaoLoraLinear": {"0a8b96d29dea80c2"},  # that of Linear
    "GPTQLoraLinear": {"9a6de89c99911c0c"},
    "AwqLoraLinear": {"95e8606db4ffd4d8"},
    "AqlmLoraLinear": {"6e848ff5ab5e7830"},
}


def hash_of(function):
    source = ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(function))))
    return hashlib.sha256(source.encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", READ)
def test_the_forward_of_peft_is_the_one_that_was_read(name):
    layer = next((theirs for theirs in OURS if theirs.__name__ == name), None)
    if layer is None:
        pytest.skip(f"this PEFT has no {name}, or what it needs is not installed")
    found = hash_of(layer.forward)
    assert found in READ[name], (
        f"PEFT {peft.__version__} has another lora.{name}.forward ({found}). Read it for anything that "
        "fastlora.peft_layers would ignore: a new condition before the base layer is called, a new argument, another "
        "cast of x or of the result, another kind of adapter. Make `why_peft` and `_operands_now` refuse what is new, "
        "compare the results (tests/test_peft_*.py), and add the hash here."
    )


READ_OF_DORA = {  # in PEFT 0.18 and 0.21
    DoraLinearVariant.forward: {"c046a3d47eaf1fe3", "9733ecbed230bb12"},
    DoraLinearLayer.forward: {"d361199adfc0201e", "d25329f77da3fa59"},
    DoraLinearLayer.get_weight_norm: {"d04fb3fbe8f41f8b", "e546ef1acfc84fe8"},
}


@pytest.mark.parametrize("function", READ_OF_DORA, ids=lambda function: function.__qualname__)
def test_the_dora_of_peft_is_the_one_that_was_read(function):
    """See `fastlora.dora` for what it computes, and `fastlora.peft_layers._dora_reason` for what is left to PEFT."""
    assert hash_of(function) in READ_OF_DORA[function], f"PEFT {peft.__version__}: {hash_of(function)}"
