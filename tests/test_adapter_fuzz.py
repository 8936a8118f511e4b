"""Whatever a folder holds: it is loaded, or refused with ValueError and the model is as it was."""

import contextlib
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import nn

import fastlora
from fastlora.adapter_files import CONFIG, WEIGHTS
from fastlora.model import lora_layers

SETTINGS = {"r": 2, "lora_alpha": 4, "target_modules": ["fc", "up"], "rank_pattern": {"up": 3}, "bias": "all"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.up, self.norm = nn.Linear(5, 7), nn.Linear(7, 5), nn.LayerNorm(7)
        self.norm.eval()
        self.up.bias.requires_grad_(False)

    def forward(self, x):
        return self.up(self.norm(self.fc(x)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    fastlora.save_adapter(fastlora.add_lora(Net(), **SETTINGS), folder)
    return folder


def state(model):
    """Everything that an error must leave alone, comparable with ==."""
    modules = {name: (id(m), type(m), m.training, m.__dict__.get("forward")) for name, m in model.named_modules()}
    values = {n: (id(p), p.requires_grad, p.detach().numpy().tobytes()) for n, p in model.named_parameters()}
    settings = {n: (m.lora_alpha, m.scaling, m.lora_dropout, m.use_rslora) for n, m in lora_layers(model)}
    return modules, values, settings


def load(folder, adapted):
    """Load into a new model; if that is refused, check that it is as it was."""
    model = fastlora.add_lora(Net(), **SETTINGS) if adapted else Net()
    before = state(model)
    try:
        fastlora.load_adapter(model, folder)
    except ValueError as error:
        assert state(model) == before
        return str(error)
    for _, layer in lora_layers(model):
        assert layer.scaling == layer.scaling and abs(layer.scaling) < float("inf")
    assert model(torch.ones(2, 5)).shape == (2, 5)
    return None


numbers = st.one_of(
    st.integers(-3, 9),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 2**63, 1e308, 5e-324, True, False]),
)
words = st.sampled_from(
    ["fc", "up", "norm", "", "(", "f+(", "a{99999999999}", "(?i)fc", "fc|up", ".*", "all-linear", "LORA"]
)
scalars = st.one_of(st.none(), numbers, words, st.text(max_size=5))
values = st.one_of(scalars, st.lists(scalars, max_size=3), st.dictionaries(words, scalars, max_size=3))
KEYS = (
    *SETTINGS,
    *("alpha_pattern", "lora_dropout", "use_rslora", "peft_type", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "init_lora_weights", "use_dora", "modules_to_save", "fan_in_fan_out", "new_config", "unknown"),
)
fuzz = settings(max_examples=150, suppress_health_check=list(HealthCheck))


@pytest.mark.filterwarnings("ignore:r=:UserWarning", "ignore:Possible nested set:FutureWarning")
@fuzz
@given(changes=st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=3), adapted=st.booleans())
def test_any_config(changes, adapted, folder, tmp_path_factory):
    spoiled = tmp_path_factory.mktemp("spoiled")
    config = json.loads((folder / CONFIG).read_text())
    (spoiled / CONFIG).write_text(json.dumps({**config, **changes}))
    (spoiled / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    load(spoiled, adapted)


@fuzz
@given(data=st.data(), name=st.sampled_from([CONFIG, WEIGHTS]), adapted=st.booleans())
def test_any_bytes(data, name, adapted, folder, tmp_path_factory):
    spoiled = tmp_path_factory.mktemp("spoiled")
    for file in (CONFIG, WEIGHTS):
        content = bytearray((folder / file).read_bytes())
        if file == name:
            at = data.draw(st.integers(0, len(content) - 1))
            piece = data.draw(st.one_of(st.binary(max_size=4), st.sampled_from([b"", b"\xff", b"9", b"-", b"[" * 4])))
            content[at : at + data.draw(st.integers(0, 20))] = piece
        (spoiled / file).write_bytes(content)
    load(spoiled, adapted)


floating = [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
dtypes = [*floating, torch.int8, torch.int64, torch.bool]
for newer in (torch.complex64, torch.uint16):
    with contextlib.suppress(KeyError):  # safetensors 0.5 does not save them
        save({"": torch.zeros(1, dtype=newer)})
        dtypes.append(newer)
keys = st.sampled_from(
    [f"base_model.model.{name}" for name in ("fc.lora_A.weight", "up.lora_B.weight", "fc.base_layer.bias", "fc.bias")]
    + [f"base_model.model.{name}" for name in ("norm.bias", "norm.base_layer.bias", "norm.weight", ".lora_A.weight")]
    + ["fc.lora_A.weight", "base_model.model.norm.lora_A.weight", "base_model.model.fc.lora_A.default.weight", ""]
)
shapes = st.one_of(st.lists(st.integers(0, 7), max_size=3), st.sampled_from([[2, 5], [7, 2], [3, 7], [5, 3], [7]]))


@fuzz
@given(
    tensors=st.dictionaries(keys, st.tuples(shapes, st.sampled_from(dtypes)), max_size=3),
    removed=st.sets(keys, max_size=1),
    adapted=st.booleans(),
)
def test_any_tensors(tensors, removed, adapted, folder, tmp_path_factory):
    spoiled = tmp_path_factory.mktemp("spoiled")
    (spoiled / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    content = {k: v for k, v in load_file(folder / WEIGHTS).items() if k not in removed}
    content |= {key: torch.ones(shape).to(dtype) for key, (shape, dtype) in tensors.items()}
    save_file(content, spoiled / WEIGHTS)
    refused = load(spoiled, adapted)
    if any(dtype not in floating for _, dtype in tensors.values()):
        assert refused is not None and "floating-point" in refused


def spoil_deep(path):
    path.write_text('{"peft_type": "LORA", "r": ' + "[" * 100_000)


def spoil_latin(path):
    path.write_bytes(path.read_text().replace("LORA", "L\xd6RA").encode("latin-1"))


def spoil_utf16(path):
    path.write_bytes(path.read_text().encode("utf-16"))


def spoil_digits(path):
    path.write_text(path.read_text().replace('"r": 2', '"r": ' + "9" * 5000))


def make_folder(path):
    path.unlink()
    path.mkdir()


def make_loop(path):
    path.unlink()
    path.symlink_to(path.name)


def make_empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("adapted", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        *((spoil, CONFIG) for spoil in (spoil_deep, spoil_latin, spoil_utf16, spoil_digits)),
        *((spoil, name) for spoil in (make_folder, make_loop, make_empty) for name in (CONFIG, WEIGHTS)),
    ],
)
def test_what_is_no_adapter(spoil, name, adapted, folder, tmp_path):
    for file in (CONFIG, WEIGHTS):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    assert load(tmp_path, adapted) is None
    spoil(tmp_path / name)
    assert load(tmp_path, adapted) is not None


@pytest.mark.parametrize("path", ["x" * 5000, "nul\0", "", "README.md/x"])
def test_what_is_no_folder(path):
    model = Net()
    with pytest.raises(ValueError):
        fastlora.load_adapter(model, path and f"/{path}")


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "loftq", "lora_ga", "pissa_niter_4"])
def test_what_changes_the_base_weights_when_peft_loads_it_is_refused(init, folder, tmp_path):
    config = json.loads((folder / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "init_lora_weights": init}))
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    assert "init_lora_weights must be" in load(tmp_path, False)


def test_nan_weights_load_as_they_are(folder, tmp_path):
    (tmp_path / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    content = load_file(folder / WEIGHTS)
    content["base_model.model.fc.lora_B.weight"][0, 0] = float("nan")
    (tmp_path / WEIGHTS).write_bytes(save(content))
    model = fastlora.load_adapter(Net(), tmp_path)
    assert model.fc.lora_B.isnan().sum() == 1


def test_other_models_that_are_refused(folder):
    merged = fastlora.merge(fastlora.add_lora(Net(), **SETTINGS))
    with torch.device("meta"):
        meta = Net()
    for model, message in ((merged, "is merged"), (meta, "meta device")):
        modules = list(model.modules())
        with pytest.raises(ValueError, match=message):
            fastlora.load_adapter(model, folder)
        assert list(model.modules()) == modules
    with pytest.raises(ValueError, match=r"floating-point dtype, got torch\.int8"):
        fastlora.load_adapter(Net(), folder, adapter_dtype=torch.int8)


@pytest.mark.parametrize("function", [fastlora.add_lora, fastlora.load_adapter])
def test_a_failure_while_layers_are_put_in_changes_nothing(function, folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("a probe that failed")

    monkeypatch.setattr(fastlora.model, "fuse_mlps", fail)
    model = Net()
    before = state(model)
    with pytest.raises(RuntimeError, match="a probe"):
        function(model, **({"r": 2} if function is fastlora.add_lora else {"folder": folder}))
    assert state(model) == before


def test_the_modes_of_a_layer_that_is_adapted_stay(folder):
    model = Net()
    model.fc.eval()
    fastlora.load_adapter(model, folder)
    assert not model.fc.training and not model.fc.base_layer.training and model.up.training and model.training
