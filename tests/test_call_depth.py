"""How many Python functions a call of a patched layer passes through: what the host pays besides PyTorch's own work."""

import pytest
from python_calls import calls_of_a_step

from fastlora import ops


@pytest.mark.skipif(ops.NO_CPU_KERNELS is not None, reason="torch's compositions are Python")
def test_a_call_passes_few_functions(request):
    if request.config.getoption("--kernels-in-interpreter"):
        pytest.skip("the interpreter is Python")
    calls = calls_of_a_step()
    for call, most in {"q": 20, "k": 16, "backward": 16}.items():
        assert len(calls[call]) <= most, calls[call]
