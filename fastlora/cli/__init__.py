"""The command ``fastlora``. torch and transformers are imported only once a command runs."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from fastlora.cli.arguments import UsageError, build_parser

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (something needed is not installed) or 130 (Ctrl-C).

    Raises SystemExit, with code 2, for arguments that cannot be used.
    """
    args = build_parser().parse_args(argv)
    quieten()
    try:
        if args.command == "info":
            from fastlora.cli.info import run
        elif args.command == "inspect":
            from fastlora.cli.inspect import run
        elif args.command == "tune":
            from fastlora.cli.tune import run
        elif args.command == "bench":
            from fastlora.cli.bench import run
        elif args.command == "profile":
            from fastlora.cli.profile import run
        else:
            from fastlora.cli.compare import run
        return run(args)
    except UsageError as error:
        return args.parser.error(str(error))
    except ModuleNotFoundError as error:
        print(f"{args.parser.prog}: needs {error.name}: pip install 'fastlora-kernels[cli]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


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
