"""An adapter loads in PEFT, and back, as exactly the layers, ranks, alphas and dropout that were saved."""

import json
import random

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

import fastlora
from fastlora.adapter_config import AdapterConfig
from fastlora.adapter_files import CONFIG
from fastlora.benchmarks.accuracy import same
from fastlora.model import from_pattern, lora_layers


class Tree(nn.Module):
    """Linear layers of these dotted names, called one after another in the order of the names."""

    def __init__(self, names):
        super().__init__()
        for name in names:
            *path, leaf = name.split(".")
            owner = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            owner.add_module(leaf, nn.Linear(6, 6))
        self.names = names
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3

    def forward(self, x):
        for name in self.names:
            x = x + torch.tanh(self.get_submodule(name)(x))
        return x


NESTED = ["fc", "block.fc", "block.block.fc", "block.other", "blocks.0.fc", "blocks.1.fc", "blocks.10.fc", "0", "x.0"]
ODD = [
    "f+c",
    "s.f+c",
    "a|b",
    "a",
    "b",
    "(q",
    "q",
    "[0-9]",
    "7",
    "x*",
    "xx",
    "$",
    "\\d",
    "all-linear",
    "é.fc",
    "f c",
]
MANY = [f"layers.{i}.{part}" for i in range(12) for part in ("fc", "out.fc", "fc2")]


def save_some(names, chosen, folder, draw):
    """Adapt the chosen layers, each with a rank and an alpha of its own."""
    model = Tree(names)
    fastlora.add_lora(
        model,
        r=2,
        lora_alpha=3,
        lora_dropout=draw.choice([0.0, 0.25]),
        use_rslora=draw.random() < 0.3,
        target_modules="|".join(map(exactly, chosen)),
        rank_pattern={f"^{exactly(name)}": draw.choice([1, 2, 4]) for name in chosen},
        alpha_pattern={f"^{exactly(name)}": draw.choice([3, 8, 0.5]) for name in chosen},
    )
    assert {name for name, _ in lora_layers(model)} == set(chosen)
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator, dtype=torch.float64)
    fastlora.save_adapter(model, folder)
    return model.eval()


def exactly(name):
    return "".join(f"[{c}]" if c not in "\\^." else f"\\{c}" for c in name)


def meaning(model):
    return {n: (m.r, m.lora_alpha, m.scaling, m.lora_dropout) for n, m in lora_layers(model)}


def meaning_in_peft(model):
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {
        n: (m.r["default"], m.lora_alpha["default"], m.scaling["default"], getattr(m.lora_dropout["default"], "p", 0.0))
        for n, m in layers.items()
    }


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("names", [NESTED, ODD, MANY], ids=["nested", "odd", "many"])
def test_round_trip(names, seed, tmp_path):
    draw = random.Random(seed)
    ours = save_some(names, draw.sample(names, draw.randrange(1, len(names))), tmp_path, draw)
    x = torch.randn(3, 6, dtype=torch.float64)

    theirs = peft.PeftModel.from_pretrained(Tree(names), tmp_path)
    assert meaning_in_peft(theirs) == meaning(ours)
    assert same(theirs(x), ours(x), torch.float32), "up to 36 layers in a row, in fp64"

    again = fastlora.load_adapter(Tree(names), tmp_path).eval()
    assert meaning(again) == meaning(ours) and torch.equal(again(x), ours(x))
    for _, layer in lora_layers(again):
        layer.lora_A.data.zero_()
        layer.lora_dropout, layer.scaling = 0.5, 7.0
    fastlora.load_adapter(again, tmp_path)  # over adapters that are there
    assert meaning(again) == meaning(ours) and torch.equal(again(x), ours(x))

    theirs.save_pretrained(tmp_path / "theirs")
    from_theirs = fastlora.load_adapter(Tree(names), tmp_path / "theirs").eval()
    assert meaning(from_theirs) == meaning(ours) and torch.equal(from_theirs(x), ours(x))


def test_targets_are_a_list_of_names_where_that_is_enough(tmp_path):
    save_some(NESTED, ["block.fc", "block.other"], tmp_path, random.Random(0))
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == "block\\.fc|block\\.other"
    save_some(NESTED, ["block.block.fc", "block.other"], tmp_path, random.Random(0))
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == ["block.block.fc", "block.other"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: setattr(layer, "lora_dropout", 0.5), "one lora_dropout for all layers"),
        (lambda layer: layer.set_scaling(3, use_rslora=True), "one use_rslora for all layers"),
        (lambda layer: setattr(layer, "scaling", 0.7), "'fc' rank 2 and scaling 1.5; it has rank 2 and scaling 0.7"),
        (lambda layer: setattr(layer, "lora_alpha", float("nan")), "alpha_pattern must be"),
        (lambda layer: layer.to("meta"), "'fc' has no values here"),
    ],
)
def test_what_the_format_cannot_say_is_not_saved(change, message, tmp_path):
    model = fastlora.add_lora(Tree(NESTED), r=2, lora_alpha=3)
    change(model.fc)
    with pytest.raises(ValueError, match=message):
        fastlora.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_the_key_of_another_is_not_saved(tmp_path):
    """PEFT takes a key that is a module's name, though it is no expression that matches it."""
    model = fastlora.add_lora(Tree(["q", "^q", "x", "y"]), r=2)
    model.q.set_scaling(7)
    with pytest.raises(ValueError, match=r"would give '\^q' rank 2 and scaling 3.5"):
        fastlora.save_adapter(model, tmp_path)


def test_a_single_layer_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="this model is a single layer"):
        fastlora.save_adapter(fastlora.LoRALinear(4, 4), tmp_path)


parts = st.sampled_from(["fc", "q", "0", "10", "layers", "h"])
dotted = st.lists(parts, min_size=1, max_size=5).map(".".join)
regexes = st.one_of(dotted, st.sampled_from([".*fc", r".*\.\d+\.q", "(fc|q)", "^fc", "layers.*", "f", ""]))


@given(
    name=dotted,
    target=st.one_of(regexes.filter(bool), st.lists(dotted, min_size=1, max_size=3)),
    exclude=st.one_of(st.none(), regexes, st.lists(dotted, max_size=2)),
    indices=st.one_of(st.none(), st.integers(0, 10), st.lists(st.sampled_from([0, 10]), max_size=2)),
    pattern=st.one_of(st.none(), parts, st.lists(parts, max_size=2)),
    keys=st.lists(regexes, max_size=3),
)
def test_our_rules_are_those_of_peft(name, target, exclude, indices, pattern, keys):
    if isinstance(target, str):
        indices = pattern = None
    elif indices is None:
        pattern = None
    config = dict(
        target_modules=target, exclude_modules=exclude, layers_to_transform=indices, layers_pattern=pattern, r=3
    )
    theirs = bool(check_target_module_exists(peft.LoraConfig(**config), name))
    ours = name in AdapterConfig.from_dict(config).adapted(Tree([name]))
    assert ours == theirs
    values = {key: i for i, key in enumerate(keys)}
    assert from_pattern(values, name, -1) == values.get(get_pattern_key(values, name), -1)
