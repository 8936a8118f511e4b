"""``python -m fastlora`` is the command ``fastlora``."""

import sys

from fastlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
