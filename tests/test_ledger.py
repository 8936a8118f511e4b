"""The ledger of saved bytes against models whose bytes can be counted by hand, and `fastlora profile`."""

import json

import peft
import pytest
import torch
import transformers
from blocks import HIDDEN, Block
from matplotlib.image import imread
from test_cli import save_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.benchmarks import ledger
from fastlora.benchmarks.training import saved_bytes
from fastlora.cli import main

M = 10
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def books_of(model, x, forward=None, optimizer=None):
    return ledger.record(model, lambda: (forward or model)(x).sum(), optimizer)


def test_a_layer_keeps_what_its_gradients_need():
    """x for da and xa for db; the layer before keeps nothing but its input, which is not the model's."""
    layer = fastlora.LoRALinear(32, 24, r=4, bias=False)
    model = nn.Sequential(nn.Linear(8, 32), layer)
    books = books_of(model, torch.randn(M, 8))
    assert books.by_module() == {"1": M * 32 * 4 + M * 4 * 4}
    assert {kept.made_by for kept in books.kept} == {"0", "1"}, "x is the first layer's, xa the second's"
    assert books.weights == 24 * 32 * 4 and books.adapters == (4 * 32 + 24 * 4 + 8 * 32 + 32) * 4
    assert books.gradients == books.adapters and books.optimizer == 0


def test_what_layers_share_is_counted_once():
    model = nn.Sequential(nn.Linear(8, HIDDEN), fastlora.add_lora(Block(), r=4, target_modules=TARGETS))
    model.requires_grad_(True)
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name or name.startswith("0."))
    books = books_of(model, torch.randn(2, 5, 8))
    own, shared = books.by_module(), books.shared()
    x = M * HIDDEN * 4
    assert own["1.attention.q_proj"] == x + M * 4 * 4
    assert own["1.attention.k_proj"] == own["1.attention.v_proj"] == M * 4 * 4
    assert shared["1.attention.k_proj"] == shared["1.attention.v_proj"] == x
    assert sum(own.values()) == books.saved


def test_is_what_saved_tensor_hooks_count():
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), Block())
    x = torch.randn(2, 5, HIDDEN)
    assert books_of(model, x).saved == saved_bytes(model, lambda: model(x).sum()) - x.nbytes


def test_optimizer_state_and_4bit_weights():
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, compress_statistics=True)
    base.weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, compress_statistics=True).to("cpu")
    layer = fastlora.LoRALinear.from_linear(base, r=4)
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B])
    books = books_of(layer, torch.randn(M, 64), optimizer=optimizer)
    state = base.weight.quant_state
    assert books.weights == 64 * 64 // 2 + sum(
        t.nbytes for t in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    )
    steps = 2 * 4  # a float each
    assert books.optimizer == 2 * books.adapters + steps
    assert all(p.grad is None for p in layer.parameters())


def test_checkpointing_keeps_inputs_and_computes_again():
    torch.manual_seed(0)
    models = [peft.get_peft_model(Block(), peft.LoraConfig(r=4, target_modules=TARGETS)) for _ in range(2)]
    fastlora.patch(models[1])
    first = nn.Linear(HIDDEN, HIDDEN)
    x = torch.randn(2, 5, HIDDEN)
    books = [
        books_of(model, x, lambda x, model=model: checkpoint(model, first(x), use_reentrant=False)) for model in models
    ]
    for each in books:
        kept = {k.made_by: k.bytes for k in each.kept}
        assert kept == {"outside of modules": M * HIDDEN * 4}, "its input, and nothing else of the block"
    theirs, ours = (each.recomputed for each in books)
    assert sum(theirs.values()) == 7 + 2 * 7 - 1, "every base product, and every a and b but the last b"
    assert sum(ours.values()) == 6 and ours["mlp"] == 2


def test_nothing_is_left_behind():
    before = torch.nn.modules.module._global_forward_pre_hooks.copy()

    class Failing(nn.Module):
        def forward(self, x):
            raise KeyError

    with pytest.raises(KeyError):
        books_of(Failing(), torch.randn(2))
    assert torch.nn.modules.module._global_forward_pre_hooks == before


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("base_model.model.model.layers.3.mlp.up_proj.lora_A.default", "model.layers.3.mlp.up_proj"),
        ("base_model.model.lm_head", "lm_head"),
        ("layers.0.q_proj.base_layer", "layers.0.q_proj"),
        ("base_model.model", "the model"),
        ("", "the model"),
    ],
)
def test_names(module, name):
    assert ledger.name_of(module) == name


def test_blocks_are_folded():
    assert ledger.fold("model.layers.11.mlp.experts.3") == "model.layers.*.mlp.experts.*"


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    model = save_model(tmp_path_factory.mktemp("models") / "tiny", 256)
    out = tmp_path_factory.mktemp("profile")
    arguments = [
        "--model",
        model,
        "--tokens",
        "32",
        "--r",
        "4",
        "--device",
        "cpu",
        "--base",
        "nf4",
        "--dropout",
        "0.05",
        "--quick",
    ]
    assert main(["profile", *arguments, "--out", str(out)]) == 0
    return arguments, out


def test_profile_writes_a_report_and_a_picture(profiled):
    _, out = profiled
    assert sorted(path.name for path in out.iterdir()) == ["memory.png", "profile.json", "time.png"]
    report = json.loads((out / "profile.json").read_text())
    frozen, theirs, ours = (report["memory"][name] for name in ("frozen", "peft", "fastlora"))
    assert frozen["adapters"] == frozen["gradients"] == frozen["optimizer state"] == 0
    assert ours["saved for backward"] < theirs["saved for backward"]
    assert ours["weights"] == theirs["weights"] and ours["optimizer state"] == theirs["optimizer state"] > 0
    for provider in (frozen, theirs, ours):
        assert sum(provider["saved"].values()) == provider["saved for backward"]
    assert "model.layers.0.mlp" in ours["saved"] and "model.layers.0.mlp.down_proj" in theirs["saved"]
    pixels = imread(out / "memory.png")
    assert pixels.shape[0] > 300 and pixels.shape[1] > 900


@pytest.mark.slow
def test_profile_prints_tables_or_json(profiled, tmp_path, capsys):
    arguments, _ = profiled
    assert main(["profile", *arguments, "--out", str(tmp_path), "--checkpointing"]) == 0
    printed = capsys.readouterr().out
    assert "saved for backward" in printed and "products computed again" in printed
    # With transformers 5.0 a block is checkpointed from outside, and what is kept counts for the whole model.
    assert "model.layers.*" in printed or transformers.__version__.startswith("5.0.")
    assert main(["profile", *arguments, "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["case"] == {"base": "nf4", "dropout": 0.05, "checkpointing": False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "bf16,nf4"], "--base must be of bf16"),
        (["--model", "nowhere"], "--model must be smollm2"),
        (["--out", "/dev/null/x"], "--out /dev/null/x cannot be used"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["profile", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
