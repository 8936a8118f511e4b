"""What the source distribution and the wheel contain, built without the CPU kernels; `make wheel` builds with them."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = ("fastlora", "benchmarks", "kernels", "tests")
BUILD = "import setuptools.build_meta as backend, sys; getattr(backend, sys.argv[1])(sys.argv[2])"


def build(what, source, out):
    environment = os.environ | {"FASTLORA_CPU_CAPABILITY": "none"}
    command = [sys.executable, "-c", BUILD, f"build_{what}", str(out)]
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The names in the source distribution, and in the wheel that is built from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    build("sdist", source, out)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    (unpacked,) = (folder for folder in out.iterdir() if folder.is_dir())
    build("wheel", unpacked, out)
    (wheel,) = out.glob("*.whl")
    in_source = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    return in_source, set(zipfile.ZipFile(wheel).namelist())


def modules():
    """Every module of the package, those of the linked folders kernels and benchmarks too."""
    for folder in ("", "kernels", "benchmarks"):
        root = ROOT / "fastlora" / folder
        yield from (path.relative_to(ROOT).as_posix() for path in root.rglob("*.py"))


@pytest.mark.slow
def test_the_wheel_has_every_module_and_nothing_else(built):
    files = {name for name in built[1] if ".dist-info/" not in name}
    assert files == set(modules())
    assert {"fastlora/kernels/launch.py", "fastlora/benchmarks/commands/bench.py"} <= files


def test_the_source_distribution_has_what_a_build_needs_and_no_results(built):
    kernels = {f"kernels/cpu/{path.name}" for path in (ROOT / "kernels" / "cpu").iterdir()}
    assert {*FILES, *kernels, *modules()} <= built[0]
    assert not [name for name in built[0] if "results/" in name or name.startswith("tests/")]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_files_of_tests_that_the_makefile_runs_are_there():
    targets = "wheel", "test-torch-ops", "test-interpreted", "test-quantised", "test-deepspeed"
    done = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True, check=True)
    names = set(re.findall(r"tests/test_\w+\.py", done.stdout))
    assert names and all((ROOT / name).exists() for name in names), names
