"""How many Python functions a call of a patched layer passes through: what the host pays besides PyTorch's own work."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from python_calls import calls_of_a_step

from fastlora import ops

OF_TRITON = ("driver.py", "compiler.py", "_allocation.py", "knobs.py", "standin_cuda.py")  # what a launch costs there


@pytest.mark.skipif(ops.NO_CPU_KERNELS is not None, reason="torch's compositions are Python")
def test_a_call_passes_few_functions(request):
    if request.config.getoption("--kernels-in-interpreter"):
        pytest.skip("the interpreter is Python")
    calls = calls_of_a_step()
    for call, most in {"q": 20, "k": 16, "backward": 16}.items():
        assert len(calls[call]) <= most, calls[call]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, as Triton's launchers do")
def test_launching_kernels_passes_few_functions():
    """On a stand-in for a GPU's driver, in a process of its own: here kernels are interpreted."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.standin_layer"]
    ran = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1])
    assert ran.returncode == 0, ran.stderr
    for call, most in {"q": 60, "k": 45, "backward": 90}.items():
        ours = [name for name in json.loads(ran.stdout)[call] if name.partition(":")[0] not in OF_TRITON]
        assert len(ours) <= most, ours
