"""Count the Python functions that a call of a patched layer passes through."""

import sys
from collections.abc import Callable
from typing import Any

import peft
import torch
from blocks import HIDDEN, Attention, randomise
from torch.autograd import Variable

import fastlora


def calls_in(function: Callable[[], Any]) -> list[str]:
    """The Python functions that run, in order, without ``function`` itself."""
    names: list[str] = []

    def note(frame, event, arg):
        if event == "call":
            names.append(f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_qualname}")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names[1:]


def calls_of_a_step(dtype: torch.dtype = torch.float32) -> dict[str, list[str]]:
    """Those of q_proj, of k_proj on the same x, and of the backward of both, once the layers know each other."""
    attention = Attention(kv=HIDDEN).to(dtype)
    model = randomise(peft.get_peft_model(attention, peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj"])))
    fastlora.patch(model)
    for _ in range(3):
        x = torch.randn(2, 5, HIDDEN, dtype=dtype).requires_grad_() * 1
        calls = _calls(attention.q_proj, attention.k_proj, x)
    return calls


def _calls(q_proj, k_proj, x) -> dict[str, list[str]]:
    y: list[torch.Tensor] = []
    calls = {"q": calls_in(lambda: y.append(q_proj(x))), "k": calls_in(lambda: y.append(k_proj(x)))}
    loss = y[0].sum() + y[1].sum()
    arguments = (loss,), (torch.ones_like(loss),), False, False, ()

    def backward():  # loss.backward() without its own Python
        Variable._execution_engine.run_backward(*arguments, allow_unreachable=True, accumulate_grad=True)

    return calls | {"backward": calls_in(backward)}
