"""Patched models trained on two processes: sharded or not, the losses are those of PEFT on one, and what runs is fused.

Both processes train all cases in one go (`sharded_runs`); each test looks at one of them. In fp64 the losses of all
stacks agree to a few units in the last place, so a wrong gradient cannot hide.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from supported import README, read, what_ran

STEPS = 20


@dataclass(frozen=True)
class Case:
    stack: str = "one process"  # or DDP, FSDP2, FSDP1
    base: str = "fp64"  # or nf4, or dora: that in fp64, or fp32 computed in bf16 by FSDP2's mixed precision: "mixed"
    patch: str = "before"  # wrapping, or after; anything else is plain PEFT
    reshard: bool = True
    checkpointing: bool = False
    unit: str = "block"  # that FSDP2 shards by itself: a block, an MLP, or a layer
    steps: int = STEPS

    def __str__(self) -> str:
        words = [self.stack, self.base, self.patch]
        words += ["kept whole"] * (not self.reshard) + ["checkpointing"] * self.checkpointing
        return " ".join(words + [f"by {self.unit}"] * (self.unit != "block"))


DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "dora": torch.float64,
    "nf4": torch.float32,
    "mixed": torch.bfloat16,
}  # that a base computes in
PLAIN = [
    Case(patch="no"),
    Case(base="nf4", patch="no"),
    Case(base="dora", patch="no"),
    Case("FSDP2", "mixed", patch="no"),
]
FP32 = Case(base="fp32", patch="no")  # DeepSpeed's optimizer computes in it, and ZeRO-3 takes no fp64
BY_DEEPSPEED = [
    Case(stack, base, patch, checkpointing=base == "nf4")
    for stack in ("ZeRO-2", "ZeRO-3")
    for base, patch in (("fp32", "before"), ("fp32", "after"), ("nf4", "after"))
]
FUSED = [
    Case(),
    Case("DDP"),
    Case("DDP", "nf4"),
    Case("FSDP2"),
    Case("FSDP2", "mixed"),
    Case("FSDP2", "nf4", patch="after", checkpointing=True),
    Case("FSDP2", "dora", patch="after"),
]
BY_LAYER = [Case("FSDP2", unit="layer"), Case("FSDP2", "nf4", patch="after", unit="layer")]
FLAT = [Case("FSDP1", checkpointing=True), Case("FSDP1", "nf4")]
# The table in README.md: its row and its column. What is said of fp32 is seen in fp64.
CELLS = {
    ("DDP", "fp32"): FUSED[1],
    ("DDP", "NF4"): FUSED[2],
    ("FSDP2", "fp32"): FUSED[3],
    ("FSDP2", "bf16"): FUSED[4],
    ("FSDP2", "NF4"): FUSED[5],
    ("FSDP2, each layer a unit", "fp32"): BY_LAYER[0],
    ("FSDP2, each layer a unit", "NF4"): BY_LAYER[1],
    ("FSDP1", "fp32"): FLAT[0],
    ("FSDP1", "NF4"): FLAT[1],
    **{(case.stack, {"fp32": "fp32", "nf4": "NF4"}[case.base]): case for case in BY_DEEPSPEED},
}
MORE = [
    Case("FSDP2", *each)
    for each in itertools.product(
        ("fp64", "dora", "nf4", "mixed"), ("before", "after"), (True, False), (True, False), ("block", "MLP")
    )
]
MORE += [Case("DDP", base, checkpointing=c) for base in ("fp64", "nf4") for c in (True, False)]
MORE = [case for case in MORE if case not in FUSED]


def trained(cases: list[Case], folder: Path) -> dict:
    command = [sys.executable, "-m", "tests.sharded_runs", str(folder), json.dumps([asdict(case) for case in cases])]
    root = Path(__file__).parents[1]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=1200)
    assert ran.returncode == 0, ran.stderr
    results = json.loads((folder / "results.json").read_text())
    return {str(case): result for case, result in zip(cases, results, strict=True)}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    return trained([*PLAIN, *FUSED, *BY_LAYER, *FLAT], tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def more_results(tmp_path_factory) -> dict:
    return trained([*PLAIN, *MORE], tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def deepspeed_results(tmp_path_factory) -> dict:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: make test-deepspeed")
    return trained([FP32, PLAIN[1], *BY_DEEPSPEED], tmp_path_factory.mktemp("runs"))


def counted(result: dict, kind: str, what: str) -> int:
    return sum(calls[what] for calls in result[kind].values())


def check_losses(case: Case, results: dict) -> dict:
    """They are those of plain PEFT on the same base, within the rounding of the dtype it computes in."""
    result = results[str(case)]
    assert "error" not in result, result["error"]
    (plain,) = (each for each in (*PLAIN, FP32) if each.base == case.base)
    expected = torch.tensor(results[str(plain)]["losses"], dtype=torch.float64)
    losses = torch.tensor(result["losses"], dtype=torch.float64)
    assert len(losses) == STEPS and losses[-1] < losses[0] / 2, "it learns"
    bound = 8 * torch.finfo(DTYPES[case.base]).eps
    # Each loss, not their norm: the last ones are small, and show what training has added up.
    torch.testing.assert_close(losses, expected, rtol=bound, atol=0)
    return result


def check_fused(case: Case, results: dict) -> None:
    result = check_losses(case, results)
    assert not result["warnings"] and not result["said"]["skipped"] and not result["said"]["not_fused"]
    assert len(result["layers"]) == result["unpatched"] == 14 and len(result["mlps"]) == 2
    assert counted(result, "layers", "own") == counted(result, "mlps", "own") == 0
    assert counted(result, "mlps", "fused") == 2 * STEPS
    assert counted(result, "layers", "fused") >= 14 * STEPS  # more if blocks are recomputed
    is_sharded = case.stack == "FSDP2" and case.patch == "after"
    assert len(result["said"]["sharded"]) == (14 if is_sharded else 0)
    assert ("14 of the patched layers are sharded now, and fused" in result["text"]) == is_sharded


def cell(result: dict) -> str:
    """What README.md's table says of a case with this result."""
    layers, mlps = ([SimpleNamespace(**calls) for calls in result[kind].values()] for kind in ("layers", "mlps"))
    return what_ran(layers, mlps)


@pytest.mark.parametrize("place", CELLS, ids=" on ".join)
def test_readme_says_what_ran(place, request):
    case = CELLS[place]
    results = request.getfixturevalue("deepspeed_results" if case in BY_DEEPSPEED else "results")
    assert read(README.read_text())[place] == cell(results[str(case)]), "run python tests/supported.py"


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_layers_and_mlps_run_fused(case, results):
    check_fused(case, results)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=str)
def test_every_combination_runs_fused(case, more_results):
    check_fused(case, more_results)


@pytest.mark.parametrize("case", BY_LAYER, ids=str)
def test_layers_that_are_sharded_one_by_one_run_fused_one_by_one(case, results):
    result = check_losses(case, results)
    assert counted(result, "layers", "fused") == 14 * STEPS and counted(result, "layers", "own") == 0
    assert counted(result, "mlps", "own") == 2 * STEPS and counted(result, "mlps", "fused") == 0
    assert len(result["warnings"]) == 1 and "one of its layers has hooks" in result["warnings"][0]
    assert result["unpatched"] == 14
    if case.patch == "after":
        assert len(result["said"]["not_fused"]) == 2 and not result["said"]["fused"]


@pytest.mark.parametrize("case", BY_DEEPSPEED, ids=str)
def test_deepspeed_trains_with_the_losses_of_peft(case, deepspeed_results):
    result = check_losses(case, deepspeed_results)
    assert cell(result) == ("fused" if case.stack == "ZeRO-2" else "PEFT")
    reasons = ["its base layer is sharded by itself", "one of its layers has hooks"] if case.stack == "ZeRO-3" else []
    assert len(result["warnings"]) == len(reasons)
    assert all(any(reason in warning for warning in result["warnings"]) for reason in reasons)


@pytest.mark.parametrize("case", FLAT, ids=str)
def test_a_flat_parameter_is_left_to_peft_with_one_warning(case, results):
    result = check_losses(case, results)
    assert counted(result, "layers", "fused") == 0 and counted(result, "layers", "own") >= 14 * STEPS
    assert len(result["warnings"]) == 1 and "its base weight is in a flat parameter of FSDP1" in result["warnings"][0]
