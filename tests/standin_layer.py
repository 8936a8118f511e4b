"""Print the Python functions that q_proj, k_proj and their backward pass through to launch kernels: see `standin_cuda`.

The ops on CPU tensors launch what they would launch on an H100; nothing is computed. ``python -m tests.standin_layer``
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from fastlora import kernel_ops, plans
from tests.standin_cuda import install

sys.path.insert(0, str(Path(__file__).parent))  # helpers of tests are imported by their own names

from python_calls import calls_of_a_step


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder))
        with kernel_ops.on_cpu_tensors(), plans.use(lora_matmul="tail", lora_grad="one_pass"):
            print(json.dumps(calls_of_a_step(torch.bfloat16)))


if __name__ == "__main__":
    main()
