"""Supervised fine-tuning with TRL's SFTTrainer, computed by fastlora.

SFTTrainer puts PEFT's adapters into the model itself; the callback patches the result. Without --model it trains a tiny
Llama with random weights on random tokens, offline; with --model a folder of transformers. Needs: pip install trl
"""

import argparse

import peft
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fastlora


def main(argv: list[str] | None = None) -> float:
    """Train, and return the last loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder (default: a tiny Llama with random weights)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="tokens a sequence")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", default="trl-output", help="a folder for the adapter")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    processing = None  # SFTTrainer loads the tokenizer of the model's folder
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    else:
        config = LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
        )
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        processing = tiny_tokenizer()
    rows = torch.randint(3, model.config.vocab_size, (4 * args.batch, args.tokens)).tolist()

    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr,
            max_length=args.tokens,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=processing,
        peft_config=peft.LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules="all-linear"),
        callbacks=[fastlora.Callback()],  # patches the model, and logs after the first step what ran fused
    )
    loss = trainer.train().training_loss
    print(fastlora.report(trainer.model))
    trainer.save_model(args.output)
    return loss


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single words, which the rows of token ids do not need; SFTTrainer asks for one."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


if __name__ == "__main__":
    main()
