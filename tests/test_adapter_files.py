"""Adapters on disk: PEFT's format, both ways, bit for bit; and what is refused."""

import json
import os
import random
import signal
import time

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import adapter_files
from fastlora.adapter_files import CONFIG, WEIGHTS
from fastlora.benchmarks.accuracy import same
from fastlora.model import lora_layers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.blocks = nn.ModuleList([nn.Linear(12, 12, bias=False) for _ in range(3)])
        self.double()

    def forward(self, x):
        x = self.norm(self.q(x))
        for block in self.blocks:
            x = x + block(x)
        return x


SETTINGS = {
    "plain": dict(r=3, lora_alpha=6, target_modules=["q", "blocks.1"]),
    "patterns": dict(
        r=3, lora_alpha=6, target_modules="all-linear", rank_pattern={"blocks.1": 5}, alpha_pattern={"q": 9}
    ),
    "rslora": dict(r=4, lora_alpha=6, target_modules=["q"], use_rslora=True, lora_dropout=0.1),
    "lora_only": pytest.param(
        dict(r=2, lora_alpha=2, target_modules=["q"], bias="lora_only"),
        marks=pytest.mark.skipif(
            peft.__version__.startswith("0.18."), reason="PEFT 0.18 saves these biases under names it does not read"
        ),
    ),
    "all biases": dict(r=2, lora_alpha=2, target_modules=["q"], bias="all"),
}


def randomise(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p)) if "lora_" in name else p.add_(torch.randn_like(p))
    return model.eval()


def peft_model(settings):
    settings = dict(settings)
    if settings["target_modules"] == "all-linear":
        settings["target_modules"] = r".*(q|blocks\.\d)"
    return randomise(peft.get_peft_model(Net(), peft.LoraConfig(**settings)))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_ours_loads_in_peft(settings, tmp_path):
    ours = randomise(fastlora.add_lora(Net(), **settings))
    fastlora.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    loaded = peft.get_peft_model_state_dict(theirs)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    x = torch.randn(4, 8, dtype=torch.float64)
    assert same(ours(x), theirs.eval()(x), longest=12)


@pytest.mark.parametrize("into_existing", [False, True], ids=["new layers", "existing layers"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_peft_loads_in_ours(settings, into_existing, tmp_path):
    theirs = peft_model(settings)
    theirs.save_pretrained(tmp_path)
    model = fastlora.add_lora(Net(), **settings) if into_existing else Net()
    fastlora.load_adapter(model, tmp_path)
    x = torch.randn(4, 8, dtype=torch.float64)
    assert same(model.eval()(x), theirs(x), longest=12)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trainable if n.endswith("lora_A")} == {f"{n}.lora_A" for n, _ in lora_layers(model)}
    fastlora.save_adapter(model, tmp_path / "again")
    first, again = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_bf16_adapters_survive_bit_for_bit(tmp_path):
    ours = randomise(fastlora.add_lora(Net(), r=2, adapter_dtype=torch.bfloat16))
    fastlora.save_adapter(ours, tmp_path)
    other = fastlora.load_adapter(Net(), tmp_path, adapter_dtype=torch.bfloat16)
    for (_, a), (_, b) in zip(lora_layers(ours), lora_layers(other), strict=True):
        assert torch.equal(a.lora_A, b.lora_A) and a.lora_A.dtype == b.lora_A.dtype == torch.bfloat16


def test_an_interrupted_save_keeps_the_old_adapter(tmp_path, monkeypatch):
    model = randomise(fastlora.add_lora(Net(), r=2))
    fastlora.save_adapter(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with torch.no_grad():
        next(lora_layers(model))[1].lora_A.zero_()
    with pytest.raises(OSError, match="disk full"):
        fastlora.save_adapter(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def constant(value):
    """An adapter of which weights, rank and alpha are all the same number."""
    model = fastlora.add_lora(Net(), r=value, lora_alpha=value, target_modules=["q", "blocks.1"])
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_A.fill_(value)
            layer.lora_B.fill_(value)
    return model


def constant_of(config, tensors):
    """The number of the adapter that these are of; not one if they are of several."""
    (value,) = {t.unique().item() for t in tensors.values()} | {config["r"], config["lora_alpha"]}
    return value


def save_in_turn(models, folder):
    """A process that saves one model after the other, again and again."""
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                for model in models:
                    fastlora.save_adapter(model, folder)
        finally:
            os._exit(1)
    return pid


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, "a saver failed"


@pytest.mark.parametrize("kills", [15, pytest.param(500, marks=pytest.mark.slow)])
def test_killed_savers_leave_one_adapter(kills, tmp_path, one_thread):
    """Two savers at once, killed at any moment: the files that PEFT opens by their names are of one save."""
    models = [constant(value) for value in (1, 2, 3)]
    draw = random.Random(0)
    fastlora.save_adapter(models[0], tmp_path)
    (tmp_path / "README.md").write_text("kept")
    for _ in range(kills):
        savers = [save_in_turn(models, tmp_path), save_in_turn(models[::-1], tmp_path)]
        time.sleep(draw.uniform(0.0, 0.1))
        for pid in savers:
            kill(pid)
        constant_of(json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS))
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    constant_of(vars(theirs.peft_config["default"]), peft.get_peft_model_state_dict(theirs))
    fastlora.save_adapter(models[0], tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_loading_while_others_save(tmp_path, one_thread):
    models = [constant(value) for value in (1, 2, 3)]
    fastlora.save_adapter(models[0], tmp_path)
    savers = [save_in_turn(models, tmp_path), save_in_turn(models[::-1], tmp_path)]
    seen = set()
    try:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            model = fastlora.load_adapter(Net(), tmp_path)
            for _, layer in lora_layers(model):
                config = {"r": layer.r, "lora_alpha": layer.lora_alpha}
                seen.add(constant_of(config, {"a": layer.lora_A, "b": layer.lora_B}))
    finally:
        for pid in savers:
            kill(pid)
    assert seen == {1, 2, 3}


def test_a_replaced_config_is_read_again_with_its_weights(tmp_path, monkeypatch):
    """A save that ends between the two reads, every time or once."""
    fastlora.save_adapter(constant(1), tmp_path)
    reads, read = [], adapter_files._read_tensors

    def save_first(file):
        if len(reads) < times:
            reads.append(file)
            fastlora.save_adapter(constant(len(reads) % 2 + 1), tmp_path)
        return read(file)

    monkeypatch.setattr(adapter_files, "_read_tensors", save_first)
    times = 1
    layer = fastlora.load_adapter(Net(), tmp_path).q
    assert layer.r == layer.lora_alpha == 2 and layer.lora_A.unique().item() == 2
    times = 1000
    with pytest.raises(ValueError, match="replaced faster than it can be read"):
        fastlora.load_adapter(Net(), tmp_path)


def test_adapters_that_share_memory_are_saved(tmp_path):
    model = constant(2)
    model.q.lora_A = nn.Parameter(model.q.lora_A.detach())
    model.get_submodule("blocks.1").lora_A = nn.Parameter(model.get_submodule("blocks.1").lora_B.detach().t())
    fastlora.save_adapter(model, tmp_path)
    assert fastlora.load_adapter(Net(), tmp_path).get_submodule("blocks.1").lora_A.unique().item() == 2


def spoil_config(**changes):
    def spoil(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return spoil


def truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def garble(folder):
    (folder / WEIGHTS).write_bytes(b"\x80\x04not safetensors at all")


def to_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def change_tensors(change):
    def spoil(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "corrupt or not a safetensors file"),
        (garble, "corrupt or not a safetensors file"),
        (to_pickle, "adapter_model.bin, a pickle, which can run code"),
        (lambda folder: (folder / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
        (lambda folder: (folder / CONFIG).unlink(), "has no adapter_config.json"),
        (lambda folder: (folder / CONFIG).write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "must describe a LORA adapter"),
        (spoil_config(peft_type="LOHA"), "must describe a LORA adapter, got 'LOHA'"),
        (spoil_config(lora_alpha="x"), "lora_alpha must be a finite number, got x"),
        (spoil_config(use_dora=True), "config says use_dora=True; 'q' has no magnitude"),
        (spoil_config(use_qalora=True), "uses use_qalora: load it with PEFT"),
        (spoil_config(modules_to_save=["norm"]), "uses modules_to_save"),
        (change_tensors(lambda t: t.pop(B)), "lora_A but no lora_B for q"),
        (change_tensors(lambda t: t.update({A: torch.zeros(2, 9)})), "shapes .*the layer needs"),
        (change_tensors(lambda t: t.update({B: torch.zeros(12, 3)})), "shapes .*the layer needs"),
        (change_tensors(lambda t: t.update({"base_model.model.q.magnitude": torch.zeros(2)})), "not LoRA weights"),
        (change_tensors(lambda t: t.update({"base_model.model.q.base_layer.bias": torch.zeros(3)})), "does not fit"),
        (
            change_tensors(lambda t: t.update({A.replace("q", "z"): t.pop(A), B.replace("q", "z"): t.pop(B)})),
            "for 'z', which this model does not have",
        ),
        (
            change_tensors(lambda t: t.update({A.replace("q", "norm"): t.pop(A), B.replace("q", "norm"): t.pop(B)})),
            "config and weights are for different layers; they differ in norm, q",
        ),
    ],
)
def test_what_cannot_be_loaded_leaves_the_model_alone(spoil, message, tmp_path):
    fastlora.save_adapter(randomise(fastlora.add_lora(Net(), r=2, target_modules=["q"])), tmp_path)
    spoil(tmp_path)
    model = Net()
    with pytest.raises(ValueError, match=message):
        fastlora.load_adapter(model, tmp_path)
    assert not any(lora_layers(model)) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["adapter.bin", "adapter.pt", "missing"])
def test_only_folders_are_loaded(name, tmp_path):
    with pytest.raises(ValueError, match="pickle" if "." in name else "is not a folder"):
        fastlora.load_adapter(Net(), tmp_path / name)


def test_an_adapter_for_other_layers_is_refused(tmp_path):
    fastlora.save_adapter(fastlora.add_lora(Net(), r=2, target_modules=["q"]), tmp_path)
    with pytest.raises(ValueError, match=r"differ in blocks\.0"):
        fastlora.load_adapter(fastlora.add_lora(Net(), r=2, target_modules=["blocks.0"]), tmp_path)


def test_saving_needs_adapters(tmp_path):
    with pytest.raises(ValueError, match="no LoRALinear layers"):
        fastlora.save_adapter(Net(), tmp_path)
    with pytest.raises(ValueError, match="this is a PEFT model"):
        fastlora.save_adapter(peft_model(SETTINGS["plain"]), tmp_path)
    assert not list(tmp_path.iterdir())
