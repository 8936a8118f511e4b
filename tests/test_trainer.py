"""transformers' Trainer with models of add_lora, 4-bit ones among them: trained, saved, resumed."""

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TrainingArguments

import fastlora
from fastlora.adapter_files import CONFIG, WEIGHTS
from fastlora.benchmarks import accuracy
from fastlora.model import lora_layers

pytestmark = pytest.mark.usefixtures("one_thread", "bitsandbytes_eager")


class Trainer(fastlora.AdapterCheckpoints, transformers.Trainer):
    pass


def tiny_llama():
    shape = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2))


def quantised_in_place(folder):
    model = tiny_llama()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            new = Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
            new.load_state_dict(layer.state_dict())
            model.set_submodule(name, new.to("cpu"))
    return model


def quantised_by_transformers(folder):
    if not (folder / "config.json").exists():
        tiny_llama().save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


MODELS = {
    "dense": lambda folder: tiny_llama(),
    "in place": quantised_in_place,
    "by transformers": quantised_by_transformers,
}


def adapted(model):
    torch.manual_seed(1)
    return fastlora.add_lora(model, r=4, lora_alpha=8, lora_dropout=0.1)


def trainer(model, folder, steps, cls=Trainer, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **settings,
    )
    ids = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    return cls(model, arguments, train_dataset=data, eval_dataset=data)


def adapters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_a_resumed_run_is_the_uninterrupted_one(make, tmp_path):
    whole = adapted(make(tmp_path / "base"))
    trainer(whole, tmp_path / "whole", 4).train()

    first = adapted(make(tmp_path / "base"))
    trainer(first, tmp_path / "run", 2).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    weights = {file.name for file in checkpoint.iterdir() if file.suffix in (".safetensors", ".bin")}
    assert weights == {WEIGHTS, "training_args.bin"} and (checkpoint / CONFIG).exists()
    assert (checkpoint / WEIGHTS).stat().st_size < sum(p.numel() for p in adapters(first).values()) * 4 + 8192

    resumed = adapted(make(tmp_path / "base"))
    trainer(resumed, tmp_path / "run", 4).train(resume_from_checkpoint=str(checkpoint))
    assert same(adapters(resumed), adapters(whole)) and not same(adapters(resumed), adapters(first))


def test_the_model_stays_what_it_is(tmp_path):
    """transformers itself does not take its adapters for PEFT's, and it is saved whole by its own method."""
    model = adapted(quantised_by_transformers(tmp_path / "base"))
    before = dict(vars(model))
    trainer(model, tmp_path, 2)
    assert model._hf_peft_config_loaded is False and vars(model).keys() - before.keys() <= {"_fsdp_wrapped_module"}
    # transformers 5.24 asks first for a version of PEFT
    with pytest.raises((ValueError, ImportError), match=r"No adapter loaded|PEFT you are using is not compatible"):
        model.active_adapters()


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model = adapted(tiny_llama())
    run = trainer(model, tmp_path, 4, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    run.train()
    best = fastlora.load_adapter(tiny_llama(), Path(run.state.best_model_checkpoint))
    assert same(adapters(model), adapters(best))


def test_what_it_saves_loads_in_peft(tmp_path):
    model = adapted(tiny_llama())
    run = trainer(model, tmp_path, 2)
    run.train()
    run.save_model(tmp_path / "end")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "end").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert accuracy.same(theirs(input_ids=ids).logits, model.eval()(input_ids=ids).logits, longest=128)


def test_without_it_a_4bit_model_is_refused(tmp_path):
    """Should this fail, Trainer has learned to look for adapters that are not PEFT's."""
    model = adapted(quantised_by_transformers(tmp_path / "base"))
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path, 2, cls=transformers.Trainer)


def test_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no LoRALinear layers"):
        trainer(tiny_llama(), tmp_path, 2)


def test_a_copy_of_the_model_has_adapters_too(tmp_path):
    model = adapted(tiny_llama())
    trainer(model, tmp_path, 2)
    assert len(list(lora_layers(copy.deepcopy(model)))) == 14
