"""The command ``fastlora``. Its verbs measure, and stand in ``fastlora.benchmarks``; one is imported once it runs."""

import sys
from collections.abc import Sequence
from importlib import import_module

from fastlora.benchmarks.arguments import INTERRUPTED, UsageError, build_parser, quieten


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (something needed is not installed) or 130 (Ctrl-C).

    Raises SystemExit, with code 2, for arguments that cannot be used.
    """
    args = build_parser().parse_args(argv)
    quieten()
    try:
        return import_module(f"fastlora.benchmarks.commands.{args.command}").run(args)
    except UsageError as error:
        return args.parser.error(str(error))
    except ModuleNotFoundError as error:
        print(f"{args.parser.prog}: needs {error.name}: pip install 'fastlora-kernels[cli]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
