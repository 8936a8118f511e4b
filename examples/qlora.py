"""Fine-tune a 4-bit model (QLoRA) with PEFT and bitsandbytes, computed by fastlora.

Without --model it quantises a tiny Llama with random weights, offline; with --model a folder of transformers. The data
are random tokens: examples/peft_lora.py reads a text.
"""

import argparse
import tempfile

import peft
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import fastlora


def main(argv: list[str] | None = None) -> float:
    """Train, and return the last loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder (default: a tiny Llama with random weights)")
    parser.add_argument("--quant-type", choices=("nf4", "fp4"), default="nf4")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="tokens a sequence")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--checkpointing", action="store_true", help="compute each block again in backward")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:  # transformers quantises what it loads, so there has to be something to load
            config = LlamaConfig(
                vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
            )
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            args.model or folder, quantization_config=quantization, device_map={"": device}
        )
    model = peft.prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=args.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},  # the kind that does not repeat the last product
    )
    lora = peft.LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules="all-linear")
    model = peft.get_peft_model(model, lora)
    print(fastlora.patch(model))

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    model.train()
    batch = torch.randint(0, model.config.vocab_size, (args.batch, args.tokens), device=device)
    for step in range(args.steps):
        with torch.autocast(device, dtype=torch.bfloat16):  # prepare_model_for_kbit_training made the norms fp32
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    print(fastlora.report(model))
    return loss.item()


if __name__ == "__main__":
    main()
