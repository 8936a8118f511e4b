"""``fastlora inspect`` compiles for GPUs that are not here, in a process of its own: here kernels are interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlora.benchmarks.records import read_rows
from fastlora.cli import main

pytest.importorskip("triton")


def inspect(*args):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "fastlora", "inspect", *args]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def compiled(*args):
    """The rows that were printed. Nothing spills, fits not or lost its tensor-core instructions, or this fails."""
    result = inspect(*args, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
def test_an_elementwise_kernel_on_every_architecture():
    rows = compiled("--kernel", "swiglu")
    assert {row["arch"] for row in rows} == {"sm_80", "sm_86", "sm_90", "sm_100", "gfx942"}
    for row in rows:
        assert row["registers"] > 0 and row["instructions"] > 50 and row["occupancy"] > 0
        assert not row["tensor_core"]
        wide = "dwordx2" if row["arch"] == "gfx942" else "LDG.128"
        assert row["loads"][wide] == (2 if row["case"] == "forward" else 3)


@pytest.mark.slow
def test_hopper_multiplies_and_copies_with_its_own_instructions():
    rows = [row for row in compiled("--arch", "sm_90", "--kernel", "lora_matmul") if row["op"] == "lora_matmul"]
    tma = [row for row in rows if row["kernel"] == "_lora_matmul_tma_kernel"]
    assert len(tma) >= 8
    for row in tma:
        assert row["tensor_core"].keys() == {"HGMMA"}
        assert row["loads"]["UTMALDG"] and row["stores"] == {"UTMASTG": 1}
        assert row["loop"] < 150


def per_weight(row, instructions):
    return row[instructions] * row["threads"] * row["warps"] / (row["tile"]["BLOCK_N"] * row["tile"]["BLOCK_K"])


@pytest.mark.slow
def test_decoding_loads_and_stores_whole_vectors_in_few_instructions():
    rows = compiled("--arch", "sm_90", "--kernel", "decode_4bit")
    usual = [row for row in rows if "rows" not in row["case"]]
    assert len(usual) >= 5
    for row in usual:
        assert row["loads"]["LDG.128"] >= 2
        assert row["stores"].keys() == {"STG.128"}
    counts = {row["case"]: per_weight(row, "instructions") for row in usual}
    assert counts["merged, r=16, bf16 adapters"] <= 10
    assert counts["merged, r=16, fp32 adapters"] <= 10
    assert counts["nested"] <= 7


@pytest.mark.slow
def test_few_tokens_are_multiplied_in_few_instructions_a_weight():
    rows = compiled("--arch", "sm_90", "--kernel", "nf4_matmul")
    counts = {row["case"]: per_weight(row, "loop") for row in rows if row["kernel"] == "_nf4_matmul_kernel"}
    assert counts["M=1"] <= 5
    assert counts["M=1, r=16, bf16 adapters"] <= 6
    assert all(row["tensor_core"]["HGMMA"] for row in rows if row["kernel"] == "_nf4_matmul_kernel")


@pytest.mark.slow
def test_every_kernel_and_tile_on_every_architecture():
    assert len(compiled()) > 200


@pytest.mark.slow
def test_table_and_errors(tmp_path):
    path = tmp_path / "new" / "kernels.csv"
    result = inspect("--arch", "sm_80,gfx942", "--kernel", "swiglu", "--csv", str(path))
    assert result.returncode == 0
    rows = read_rows(path)
    assert {(row["arch"], row["case"]) for row in rows} == {
        (arch, case) for arch in ("sm_80", "gfx942") for case in ("forward", "backward")
    }
    assert all(row["registers"] > 0 and row["spills"] == 0 and row["triton"] for row in rows)
    assert "sm_80: at most 166912 bytes" in result.stdout and "backward" in result.stdout
    result = inspect("--kernel", "flash")
    assert result.returncode == 2
    assert "--kernel must be of shrink, lora_matmul" in result.stderr.splitlines()[-1]


def test_interpreted_kernels_cannot_be_inspected(capsys):
    with pytest.raises(SystemExit) as error:
        main(["inspect", "--kernel", "swiglu"])
    assert error.value.code == 2
    assert "interpreted here" in capsys.readouterr().err


def test_unknown_architecture(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "--arch", "sm_42"])
    assert "must be of sm_80, sm_86, sm_90, sm_100, gfx942 or all, got 'sm_42'" in capsys.readouterr().err
