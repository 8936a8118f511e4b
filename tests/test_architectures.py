"""Models of transformers train, evaluate and merge patched as they do with plain PEFT: a dozen by default, all if slow.

Which run is printed by ``python tests/architectures.py``.
"""

import pytest
import torch
import transformers
from architectures import EQUAL, Result, build, compare, difference, loss_of, model_types, summary
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.peft import patch

FAST = {  # model type: the number of MLP blocks that are computed as one in the tiny model
    "llama": 2,
    "gpt2": 2,
    "gemma2": 2,
    "olmo": 2,  # clamps q, k and v in place
    "phi3": 2,  # gate and up are one layer
    "opt": 0,  # its layers are those of the decoder layer
    "bert": 0,  # the MLP is no module of its own
    "t5": 4,  # relu
    "whisper": 0,
    "clip": 4,  # quick_gelu
    "qwen2_vl": 4,  # text (silu), and images as patches (quick_gelu)
    "mamba": 0,
    "wav2vec2": 2,  # masks features in place
    "longformer": 0,  # divides q in place
}
FEWEST = 350  # of transformers 5.23's model types; fewer mean that the rules for tiny models no longer fit


def _agrees(result: Result) -> None:
    assert result.status == EQUAL, f"{result}\n{result.trace}"
    assert result.patched > 0, f"no layer of {result.model_type} is patched"


@pytest.fixture(scope="module", autouse=True)
def on_one_thread(one_thread):
    """Tiny models only lose by being shared out."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", FAST)
def test_a_family_agrees_with_plain_peft(model_type):
    if model_type == "qwen2_vl" and transformers.__version__.startswith("5.0."):
        pytest.skip("the configuration of transformers 5.0 has no mrope_section unless it is given")
    result = compare(model_type)
    _agrees(result)
    assert result.fused == FAST[model_type], result.not_fused
    assert result.keeps_no_activation


GROUPS = {  # model type: how many layers the products for the gradients of one x take in, in a tiny model of two blocks
    "llama": [2, 2, 3],  # gate and up; q, k and v, but not of the first block, whose x needs no gradient
    "cohere": [2, 3],  # parallel attention and MLP: one x for both
    "phi": [3],
    "deepseek_v3": [2],  # q_a and kv_a
    "minicpm3": [2, 2, 2],
    "speech_to_text": [2, 2, 3, 3],  # k and v of cross-attention
}
NOT_IN_5_0 = {
    "phi": "the configuration of transformers 5.0 has no pad_token_id",
    "deepseek_v3": "PEFT 0.18 adapts its MLPs too, whose layers share an x",
    "minicpm3": "transformers 5.0 has no such model",
}


class GroupedProducts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "fastlora::lora_matmul_group":
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", GROUPS)
def test_layers_with_one_x_share_its_gradient(model_type):
    if model_type in NOT_IN_5_0 and transformers.__version__.startswith("5.0."):
        pytest.skip(NOT_IN_5_0[model_type])
    model, inputs = build(model_type)
    layers = [name for name, m in model.named_modules() if type(m) is torch.nn.Linear and "head" not in name]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=layers))
    patch(model)
    loss = loss_of(model, inputs)
    with GroupedProducts() as products:
        loss.backward()
    assert sorted(products.sizes) == GROUPS[model_type]


_RESULTS: dict[str, Result] = {}


def pytest_generate_tests(metafunc):
    if "any_model_type" in metafunc.fixturenames:  # the list takes seconds to make
        slow = metafunc.config.getoption("--slow")
        metafunc.parametrize("any_model_type", model_types() if slow else ["every-family"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_family_agrees_with_plain_peft(any_model_type):
    result = _RESULTS[any_model_type] = compare(any_model_type)
    if not result.ran:
        pytest.skip(f"{result.status}: {result.reason[:200]}")
    _agrees(result)


@pytest.mark.slow
def test_enough_families_ran(capsys):
    """Comes after every family: a rule that no longer fits would only skip models."""
    if set(_RESULTS) != set(model_types()):
        pytest.skip("not every family was tried in this process")
    results = list(_RESULTS.values())
    with capsys.disabled():
        print("\n" + summary(results))
    assert sum(result.ran for result in results) >= FEWEST


def test_a_difference_is_of_norms_and_sees_what_is_not_finite():
    ones = torch.ones(4)
    assert difference(1.5 * ones, ones) == 0.5
    assert difference(0.5 * ones, 0 * ones, floor=10.0) == 0.1
    infinite = torch.tensor([1.0, float("-inf")])
    assert difference(infinite, infinite) == 0.0
    assert difference(torch.tensor([1.0, 2.0]), infinite) == float("inf")
