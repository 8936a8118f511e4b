"""torch.compile makes no more graphs of a patched model than of plain PEFT's: whole or by layer, for any length."""

import copy

import oracle
import pytest
import torch
from peft import LoraConfig, get_peft_model
from supported import in_4_bits
from torch._dynamo.testing import CompileCounterWithBackend

import fastlora

pytestmark = [pytest.mark.usefixtures("one_thread", "compiling"), pytest.mark.filterwarnings("ignore")]

MODELS = {"fp32": lambda: oracle.llama(layers=2), "NF4": in_4_bits("nf4")}
LENGTHS = (8, 12, 16)  # of which the third needs no graph of its own


def graphs(model, whole: bool, lengths: tuple[int, ...]) -> list[int]:
    """How many there are after steps with texts of these lengths, and after an evaluation without gradients."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter) if whole else model
    for layer in [] if whole else model.base_model.model.model.layers:
        layer.compile(backend=counter)
    found = []
    for length in lengths:
        ids = torch.arange(length).expand(2, -1)
        run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append(counter.frame_count)
    model.eval()
    with torch.no_grad():
        run(input_ids=ids, use_cache=False)
    return [*found, counter.frame_count]


SLOW = [(base, whole, LENGTHS) for base in MODELS for whole in (True, False)]


@pytest.mark.parametrize(
    "base, whole, lengths",
    [("fp32", False, LENGTHS[:1]), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
)
def test_no_more_graphs_than_of_peft(base, whole, lengths):
    config = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
    model = get_peft_model(MODELS[base](), config).train()
    patched = copy.deepcopy(model)
    fastlora.patch(patched)
    ours, theirs = graphs(patched, whole, lengths), graphs(model, whole, lengths)
    assert all(a <= b for a, b in zip(ours, theirs, strict=True)), f"{ours}, PEFT {theirs}"
    assert len(lengths) == 1 or ours[1] == ours[2]
