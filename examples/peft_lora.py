"""Fine-tune a causal language model with PEFT's LoRA, computed by fastlora.

Without --model it trains a tiny Llama with random weights on random tokens, offline. With --model it takes a folder of
transformers, and --text a file to train on.
"""

import argparse

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import fastlora


def main(argv: list[str] | None = None) -> float:
    """Train, and return the last loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder (default: a tiny Llama with random weights)")
    parser.add_argument("--text", help="a text file to train on (default: random tokens)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="tokens a sequence")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--save", help="a folder for the adapter")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    else:
        config = LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
        )
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    lora = peft.LoraConfig(r=args.r, lora_alpha=2 * args.r, lora_dropout=args.dropout, target_modules="all-linear")
    model = peft.get_peft_model(model.to(device), lora)
    print(fastlora.patch(model))

    if args.text:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        with open(args.text, encoding="utf-8") as file:
            stream = tokenizer(file.read(), return_tensors="pt").input_ids[0]
    else:
        stream = torch.randint(0, model.config.vocab_size, (4 * args.batch * args.tokens,))
    sequences = stream[: len(stream) // args.tokens * args.tokens].view(-1, args.tokens)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    model.train()
    for step in range(args.steps):
        batch = sequences[torch.randint(len(sequences), (args.batch,))].to(device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    print(fastlora.report(model))
    if args.save:
        model.save_pretrained(args.save)  # PEFT's own files, the same as without fastlora
    return loss.item()


if __name__ == "__main__":
    main()
