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
    assert {row["arch"] for row in rows} == {"sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"}
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

    for row in tma:
        if row["tile"] == {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "BLOCK_R": 16}:
            assert row["clocks"]["tensor core"] == 2 * 128 * 256 * 64 / 4096, "4096 FLOPs a clock"
            assert row["clocks"]["L2"] == 2 * (128 + 256) * 64 / 32, "32 bytes a clock"
            assert row["clocks"]["issue"] < row["clocks"]["tensor core"], "issuing it holds nothing up"


SASS = """
        /*2370*/                   HGMMA.64x256x16.F32.BF16 R24, R152, gdesc[UR12], R24, gsb0 ; /* 0x03e0000c98187df0 */
                      /* 0x000fe20008001818 */
        /*2380*/                   NOP ; /* 0x0000000000007918 */
                      /* 0x000fc00000000000 */
        /*2390*/              @!P5 BRA 0x2370 ; /* 0xfffffff00094d947 */
                      /* 0x000fe6000383ffff */
"""


def test_instructions_and_their_stalls_are_read():
    from fastlora.benchmarks import aot

    found = aot._program(SASS)
    assert [(each.address, each.name, each.stall) for each in found] == [
        (0x2370, "HGMMA.64x256x16.F32.BF16", 1), (0x2390, "BRA", 3),
    ]  # fmt: skip
    clocks = aot._clocks(found, {}, 8, "sm_90")
    assert clocks == {"issue": 4, "stalls": 4, "tensor core": 2 * 2 * 64 * 256 * 16 / 4096, "L2": 0}


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
    known = "sm_80, sm_86, sm_90, sm_100, sm_120, gfx942, gfx1100 or all"
    assert f"must be of {known}, got 'sm_42'" in capsys.readouterr().err
