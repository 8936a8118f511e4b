"""Models with dropout of their own train patched as with plain PEFT: one seed drops the same elements of both."""

import copy

import peft
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import fastlora
from fastlora.benchmarks.accuracy import same

K, H, VOCABULARY = 32, 96, 64
BART = dict(d_model=K, encoder_ffn_dim=H, decoder_ffn_dim=H, encoder_layers=1, decoder_layers=1)
HEADS = dict(encoder_attention_heads=4, decoder_attention_heads=4)
T5 = dict(d_model=K, d_ff=H, num_layers=1, num_heads=4, d_kv=8, decoder_start_token_id=0)
DISTILBERT = dict(dim=K, hidden_dim=H, n_heads=4, n_layers=1)
MODELS = {  # and how many MLP blocks are computed as one
    "gpt2": (lambda v: GPT2LMHeadModel(GPT2Config(n_embd=K, n_layer=1, n_head=4, **v)), 1),  # after the MLP
    "t5": (lambda v: T5ForConditionalGeneration(T5Config(**T5, feed_forward_proj="gated-gelu", **v)), 2),  # inside
    "distilbert": (lambda v: DistilBertForMaskedLM(DistilBertConfig(**DISTILBERT, **v)), 1),
    "bart": (lambda v: BartForConditionalGeneration(BartConfig(**BART, **HEADS, activation_dropout=0.1, **v)), 0),
}


@pytest.mark.one_case_in(2)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("make, blocks", MODELS.values(), ids=MODELS)
def test_losses_are_those_of_plain_peft(make, blocks, checkpointing):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    plain = peft.get_peft_model(make(dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)), config).train()
    ours = copy.deepcopy(plain)
    report = fastlora.patch(ours, strict=True)
    assert not report.skipped and len(report.fused) == blocks
    ids = torch.randint(3, VOCABULARY, (2, 11))
    losses = []
    for model in (ours, plain):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(1)
        losses.append(torch.zeros(6))
        for step in range(6):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1][step] = loss.detach()
    assert losses[1][-1] < losses[1][0], "it learns"
    assert same(*losses, longest=10 * H)
    calls = fastlora.report(ours)
    assert all(each.own == 0 < each.fused for each in (calls.layers | calls.mlps).values())
