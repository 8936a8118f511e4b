"""One line that patches the model of any trainer built on transformers' Trainer."""

from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from fastlora.calls import report
from fastlora.peft import PatchReport, patch

_logger = logging.get_logger("transformers.fastlora")  # has the handler and the verbosity of the Trainer's messages


class Callback(TrainerCallback):
    """Patches the model that a Trainer trains, and logs after its first step what ran fused.

    For transformers' Trainer and its subclasses, such as those of TRL, which wrap the model with PEFT themselves::

        trainer = trl.SFTTrainer(model, peft_config=lora, ..., callbacks=[fastlora.Callback()])

    The model is patched when the trainer has been made, before anything is sharded, and once more when training begins:
    the callback may be added to a finished trainer, and ``model_init`` makes another model. It stays patched: `unpatch`
    undoes it. The report is logged once, by the main process, through transformers' logging. ``strict`` is that of
    `patch`.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.patched: PatchReport | None = None  # until it is logged

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.patched = patch(kwargs["model"], self.strict)

    on_train_begin = on_init_end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.patched is not None and state.is_world_process_zero:
            _logger.warning(f"{self.patched}\n{report(kwargs['model'])}")  # a level that is shown by default
        self.patched = None
