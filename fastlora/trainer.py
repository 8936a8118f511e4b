"""Checkpoints of adapters alone in transformers' Trainer, for models of `add_lora`."""

import os
from typing import Any

import torch
from torch import nn

from fastlora.adapter_files import load_adapter, save_adapter
from fastlora.model import lora_layers


class AdapterCheckpoints:
    """Makes a Trainer train a model of `add_lora`: its checkpoints hold the adapter and not the model.

    Put it before the Trainer, or any subclass of it::

        class Trainer(fastlora.AdapterCheckpoints, transformers.Trainer): ...

    Without it, Trainer refuses a 4-bit model ("purely quantized": it looks for PEFT's adapters), and writes the whole
    of any other model at every checkpoint. With it, ``save_model`` and every checkpoint write what `save_adapter`
    writes, ``train(resume_from_checkpoint=...)`` and ``load_best_model_at_end`` read it by `load_adapter`, and the
    optimizer's state is kept as ever. A model without adapters is refused with ValueError. FSDP and DeepSpeed, which
    save and load by themselves, are not supported: use PEFT and `patch` with them.
    """

    # Of the Trainer that this class is put before.
    args: Any
    accelerator: Any
    data_collator: Any
    model: Any
    processing_class: Any
    state: Any

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, nn.Module) or not any(lora_layers(model)):
            raise ValueError("the model has no LoRALinear layers: call fastlora.add_lora(model) first")
        # Trainer reads this attribute of a quantised model to see whether there are adapters that can train. It is not
        # left set: elsewhere in transformers it also means that they are PEFT's.
        model.__dict__["_hf_peft_config_loaded"] = True
        try:
            super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]  # of the Trainer
        finally:
            del model.__dict__["_hf_peft_config_loaded"]
        for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
            if getattr(self, name, False):
                raise ValueError("AdapterCheckpoints does not work with FSDP or DeepSpeed: use PEFT and fastlora.patch")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        save_adapter(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), folder)
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        load_adapter(self.accelerator.unwrap_model(model, keep_torch_compile=False), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
