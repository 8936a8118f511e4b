"""Fine-tune without PEFT: add adapters to any PyTorch model, train, save, load and merge them.

Without --model it adapts a tiny Llama with random weights, offline; with --model a folder of transformers. PEFT loads
the adapter that is saved, and fastlora.load_adapter loads one that PEFT saved.
"""

import argparse
import copy
import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastlora


def main(argv: list[str] | None = None) -> float:
    """Train, and return the last loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder (default: a tiny Llama with random weights)")
    parser.add_argument("--target-modules", default="all-linear", help='names with commas, or "all-linear"')
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--save", help="a folder for the adapter (default: a temporary one)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    else:
        config = LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
        )
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    base = copy.deepcopy(model)
    targets = args.target_modules if args.target_modules == "all-linear" else args.target_modules.split(",")
    fastlora.add_lora(model, r=args.r, lora_alpha=2 * args.r, target_modules=targets, lora_dropout=0.05)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    model.train()
    batch = torch.randint(0, model.config.vocab_size, (2, 64))
    for step in range(args.steps):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    print(fastlora.report(model))

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.save or temporary
        fastlora.save_adapter(model, folder)
        again = fastlora.load_adapter(base, folder)
    model.eval(), again.eval()
    with torch.no_grad():
        same = torch.equal(model(input_ids=batch).logits, again(input_ids=batch).logits)
    print(f"the loaded adapter computes the same: {same}")
    fastlora.merge(model, unload=True)  # plain layers again, with the adapter in their weights
    return loss.item()


if __name__ == "__main__":
    main()
