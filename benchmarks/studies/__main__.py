"""All studies, one after the other: ``python -m benchmarks.studies``."""

import sys

from fastlora.benchmarks.studies import common

if __name__ == "__main__":
    sys.exit(common.main(*common.STUDIES))
