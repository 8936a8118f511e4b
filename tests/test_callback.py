"""`fastlora.Callback` in transformers' Trainer: when it patches and what it logs. Importing fastlora stays light."""

import logging
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import fastlora
from fastlora.callback import _logger

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = peft.LoraConfig(r=4, target_modules="all-linear")


def tiny_llama():
    shape = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2))


def adapted():
    return peft.get_peft_model(tiny_llama(), LORA)


class WrapsItself(transformers.Trainer):
    """As TRL's trainers do: the model is adapted before Trainer's own __init__ runs."""

    def __init__(self, model, args, peft_config=None, **settings):
        super().__init__(peft.get_peft_model(model, peft_config), args, **settings)


def trainer(model, folder, cls=transformers.Trainer, steps=2, accumulation=1, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    ids = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    return cls(model, args=arguments, train_dataset=data, **settings)


@pytest.fixture
def logged():
    """What fastlora logs in transformers' way."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()  # the default, which other tests change
    _logger.addHandler(handler)
    yield records
    _logger.removeHandler(handler)
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("cls", [transformers.Trainer, WrapsItself])
def test_one_line_patches_and_reports_once(cls, tmp_path, logged):
    settings = {"peft_config": LORA} if cls is WrapsItself else {}
    model = tiny_llama() if settings else adapted()
    run = trainer(model, tmp_path, cls, steps=3, accumulation=2, callbacks=[fastlora.Callback()], **settings)
    assert len(fastlora.report(run.model).layers) == 14, "patched before training, and before anything is sharded"
    assert not logged
    run.train()
    assert len(logged) == 1
    assert "14 LoRA layers patched, 0 left to PEFT" in logged[0]
    assert "14 layers: 28 calls fused, 0 by the module's own forward" in logged[0], "the calls of the first step"
    assert {calls.fused for calls in fastlora.report(run.model).mlps.values()} == {6}, "it stays patched"


def test_its_losses_are_those_without_it(tmp_path):
    losses = []
    for callbacks in ([], [fastlora.Callback(strict=True)]):
        run = trainer(adapted(), tmp_path, steps=3, callbacks=callbacks)
        losses.append(run.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_added_to_a_finished_trainer(tmp_path, logged):
    run = trainer(adapted(), tmp_path)
    run.add_callback(fastlora.Callback)
    run.train()
    assert "14 layers: 14 calls fused" in logged[0]


def test_a_model_made_anew_by_model_init(tmp_path, logged):
    run = trainer(None, tmp_path, model_init=adapted, callbacks=[fastlora.Callback()])
    run.train()
    assert "14 layers: 14 calls fused" in logged[0]


def test_only_the_main_process_reports(tmp_path, logged, monkeypatch):
    monkeypatch.setattr(transformers.Trainer, "is_world_process_zero", lambda self: False)
    run = trainer(adapted(), tmp_path, callbacks=[fastlora.Callback()])
    run.train()
    assert not logged and len(fastlora.report(run.model).layers) == 14


def test_strict_and_nothing_to_patch(tmp_path, logged):
    model = adapted()
    model.base_model.model.model.layers[0].mlp.up_proj.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="its base layer has hooks"):
        trainer(model, tmp_path, callbacks=[fastlora.Callback(strict=True)])
    trainer(tiny_llama(), tmp_path, steps=1, callbacks=[fastlora.Callback()]).train()
    assert "nothing to patch: the model has no PEFT LoRA layers" in logged[0]


def test_it_is_logged_as_the_trainer_logs(logged):
    assert _logger.name.startswith("transformers.") and _logger.isEnabledFor(logging.WARNING)


def test_importing_fastlora_imports_neither_transformers_nor_peft():
    code = "import sys, fastlora; print([m for m in ('transformers', 'peft', 'accelerate') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr
