import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import interpreter
import pytest
import torch

from fastlora import costs, plans
from fastlora.benchmarks import roofline
from fastlora.benchmarks.accuracy import same
from fastlora.benchmarks.cases.shapes import SHAPES
from fastlora.costs import H100, Problem
from fastlora.kernels.limits import takes_fused
from fastlora.plans import Table, choose

pytest.importorskip("triton")

GPU = "NVIDIA H100 80GB HBM3"


pytestmark = pytest.mark.usefixtures("cache")


def test_every_plan_chosen_is_possible():
    for op in plans.PLANS:
        for M in (0, 1, 64, 65, 8192):
            for r in (0, 1, 16, 512):
                for p in (0.0, 0.1):
                    problem = Problem(M, 4096, 4096, r, p)
                    assert choose(op, problem) in plans.possible(op, problem)
                    assert set(plans.possible(op, problem)) <= set(plans.PLANS[op])


def test_fused_is_possible_where_its_kernel_is():
    for M in (0, 1, 17, 32, 64, 65):
        for r in (0, 5, 16, 17, 32, 64, 128, 129):
            for K in (64, 72, 96):
                for blocksize in (32, 64, 128):
                    fused = "fused" in plans.possible("linear_4bit", Problem(M, 64, K, r, blocksize=blocksize))
                    assert fused == takes_fused(M, K, r, blocksize)


def test_a_group_of_many_is_left_to_the_vendor():
    assert plans.possible("lora_matmul", Problem(64, 64, 256, 64, parts=3)) == ("tail", "base_last")
    assert choose("lora_matmul", Problem(64, 64, 256, 64, parts=4)) == "base_last"
    with plans.use(lora_matmul="tail"), pytest.raises(ValueError, match="use base_last"):
        choose("lora_matmul", Problem(64, 64, 256, 64, parts=4))


def test_a_measured_plan_that_cannot_carry_out_a_problem_is_not_chosen(cache):
    problem = Problem(16, 4096, 4096, 16)
    plans.write_tables(cache, {GPU: Table(plans={plans.key("linear_4bit", problem): "fused"})})
    assert choose("linear_4bit", problem, GPU) == "fused"
    assert choose("linear_4bit", replace(problem, blocksize=32), GPU) == "merged"


def test_the_rule_is_the_fastest_prediction():
    for rates in (costs.H100, costs.A100):
        device = GPU if rates is costs.H100 else "another"
        for op, names in plans.PLANS.items():
            for M in (16, 1024):
                problem = Problem(M, 4096, 4096, 64)
                seconds = {
                    name: costs.predict(op, name, problem, rates).seconds
                    for name in names
                    if name in plans.possible(op, problem)
                }
                assert seconds[choose(op, problem, device)] == min(seconds.values())


def test_rules_follow_from_what_moves():
    def lora_matmul(gap=0.05, **sizes):
        rates = replace(H100, kernel_gemm=H100.gemm * (1 - gap), kernel_gemm_fp32=H100.gemm_fp32 * (1 - gap))
        c = Problem(**{"M": 8192, "N": 4096, "K": 4096, "r": 16} | sizes)
        return min(plans.PLANS["lora_matmul"], key=lambda p: costs.predict("lora_matmul", p, c, rates).seconds)

    assert lora_matmul(gap=0.02) == "tail"
    assert lora_matmul(gap=0.10) == "base_last", "a pass over y is less than a tenth of the base product"
    assert lora_matmul(gap=0.10, N=14336) == "base_last", "and of a wide one too"
    assert lora_matmul(gap=0.10, M=16) == "tail", "few tokens: both read the weight, one launch is less than two"
    assert choose("lora_matmul", Problem(8192, 4096, 4096, 16, itemsize=4)) == "base_last", "fp32 is the vendor's"
    assert choose("lora_grad", Problem(8192, 0, 4096, 16)) == "one_pass"
    assert choose("lora_grad", Problem(8192, 0, 4096, 128)) == "two_pass", "partial dxa outweighs a second read of dy"
    assert choose("linear_4bit", Problem(8192, 4096, 4096, 16)) == "merged"
    assert choose("linear_4bit", Problem(8192, 4096, 4096, 16, p=0.1)) == "decoded"
    assert choose("linear_4bit", Problem(1, 4096, 4096, 16)) == "fused"
    assert choose("linear_4bit", Problem(1, 4096, 4096, 0)) == "fused", "without an adapter too"


def measure(cache, op="lora_matmul", plan="tail", problem=None, **more):
    problem = problem or Problem(5000, 4096, 4096, 16)
    plans.write_tables(cache, {GPU: Table(plans={plans.key(op, problem): plan}, **more)})


def test_measured_beats_the_rule_and_forced_beats_both(cache):
    problem = Problem(5000, 4096, 4096, 16)
    assert choose("lora_matmul", problem, GPU) == "base_last"
    measure(cache)
    assert choose("lora_matmul", problem, GPU) == "tail"
    assert choose("lora_matmul", replace(problem, M=8192), GPU) == "tail", "the same power of two"
    for other in (replace(problem, M=4096), replace(problem, r=8), replace(problem, N=1024)):
        assert choose("lora_matmul", other, GPU) == plans.by_rule("lora_matmul", other, GPU)
    assert choose("lora_matmul", problem, "another") == "base_last"
    with plans.use(lora_matmul="base_last", lora_grad="two_pass"):
        assert choose("lora_matmul", problem, GPU) == "base_last"
        with plans.use(lora_matmul="tail"):
            assert choose("lora_grad", problem) == "two_pass"
            assert choose("lora_matmul", problem) == "tail"
    assert choose("lora_grad", problem) == "one_pass"


def test_dropout_has_measurements_of_its_own(cache):
    problem = Problem(16, 4096, 4096, 16)
    measure(cache, "linear_4bit", "merged", problem)
    assert choose("linear_4bit", problem, GPU) == "merged"
    assert choose("linear_4bit", replace(problem, p=0.1), GPU) == "decoded", "a mask cannot be merged"


def test_measured_rates_decide_the_rule(cache):
    problem = Problem(8192, 4096, 4096, 16)
    assert choose("lora_matmul", problem, GPU) == "base_last"
    plans.write_tables(cache, {GPU: Table(rates=replace(H100, kernel_gemm=H100.gemm, measured=True))})
    assert choose("lora_matmul", problem, GPU) == "tail"


def test_a_table_survives_its_file(cache):
    table = Table(
        rates=replace(H100, measured=True),
        plans={plans.key("lora_grad", Problem(4096, 0, 4096, 16, 0.1)): "two_pass"},
        tiles={("shrink", (16,)): {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2}},
        versions={"triton": "3.6.0"},
        environment={"date": "today"},
    )
    plans.write_tables(cache, {GPU: table, "another": Table()})
    assert plans.read_tables(cache) == {GPU: table, "another": Table()}
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def edited(edit):
    """The text of a table with one thing wrong."""

    def write(cache):
        measure(cache, rates=H100, tiles={("shrink", (16,)): {"BLOCK_M": 64}})
        found = json.loads(cache.read_text())
        edit(found, found["devices"][GPU])
        return json.dumps(found)

    return write


CORRUPT = {
    "no json": lambda cache: "{",
    "not text": lambda cache: "\udcff",
    "empty": lambda cache: "",
    "a list": lambda cache: "[]",
    "nothing in it": lambda cache: "{}",
    "of another version": edited(lambda found, device: found.update(version=1)),
    "unknown plan": edited(lambda found, device: device["plans"][0].update(plan="fastest")),
    "unknown op": edited(lambda found, device: device["plans"][0].update(op="gemm")),
    "size as text": edited(lambda found, device: device["plans"][0].update(M="8192")),
    "no size": edited(lambda found, device: device["plans"][0].pop("N")),
    "unknown rate": edited(lambda found, device: device["rates"].update(speed=1.0)),
    "no rate": edited(lambda found, device: device["rates"].pop("gemm")),
    "rate of zero": edited(lambda found, device: device["rates"].update(gemm=0)),
    "unknown tile": edited(lambda found, device: device["tiles"][0]["tile"].update(BLOCK=1)),
    "version that is no text": edited(lambda found, device: device["versions"].update(triton=3)),
    "versions as text": edited(lambda found, device: device.update(versions="3.6")),
    "tile of 48": edited(lambda found, device: device["tiles"][0]["tile"].update(BLOCK_M=48)),
    "tile of 2^20": edited(lambda found, device: device["tiles"][0]["tile"].update(BLOCK_K=1 << 20)),
    "tile of 0": edited(lambda found, device: device["tiles"][0]["tile"].update(BLOCK_M=0)),
    "three warps": edited(lambda found, device: device["tiles"][0]["tile"].update(num_warps=3)),
    "no stages": edited(lambda found, device: device["tiles"][0]["tile"].update(num_stages=0)),
    "tile of a size between": edited(lambda found, device: device["tiles"][0].update(sizes=[17])),
    "negative size": edited(lambda found, device: device["plans"][0].update(K=-1)),
    "deep": lambda cache: "[" * 100_000,
    "tile as text": edited(lambda found, device: device["tiles"][0].update(tile="large")),
}


@pytest.mark.parametrize("write", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_or_foreign_file_is_reported_once_and_ignored(write, cache):
    text = write(cache)
    cache.parent.mkdir(exist_ok=True)
    cache.write_text(text, errors="surrogateescape")
    plans.forget()
    problem = Problem(5000, 4096, 4096, 16)
    with pytest.warns(UserWarning, match="plans.json") as caught:
        assert choose("lora_matmul", problem, GPU) == "base_last"
    assert len(caught) == 1 and "ignores" in str(caught[0].message)
    with warnings.catch_warnings(action="error"):
        assert choose("lora_matmul", replace(problem, M=1), GPU) == "tail"


def test_no_file_is_nothing_to_report(cache):
    with warnings.catch_warnings(action="error"):
        choose("lora_matmul", Problem(5000, 4096, 4096, 16), GPU)


@pytest.mark.parametrize("home", ["", "relative"])
def test_without_a_cache_directory_of_ones_own_the_usual_one(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(plans.cache_file()) == "/home/someone/.cache/fastlora/plans.json"


def test_import_reads_nothing(cache):
    cache.parent.mkdir()
    cache.write_text("{")
    code = "import warnings; warnings.simplefilter('error'); import sys, fastlora; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


@pytest.mark.parametrize("wrong", [{"lora_matmul": "fastest"}, {"shrink": "tail"}])
def test_a_plan_that_does_not_exist_is_an_error(wrong):
    (op, plan), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"lora_matmul=tail, .* got {op}={plan}"), plans.use(**wrong):
        pass


def test_a_forced_plan_that_cannot_is_an_error_and_not_another_plan():
    with plans.use(linear_4bit="fused"):
        assert choose("linear_4bit", Problem(16, 64, 64, 4)) == "fused"
        with pytest.raises(ValueError, match=r"linear_4bit=fused cannot carry out .*M=8192.*: use merged or decoded"):
            choose("linear_4bit", Problem(8192, 64, 64, 4))


class TestTiles:
    @pytest.mark.parametrize("other", [{"triton": "1.0"}, {"fastlora": "0.0"}], ids=str)
    def test_of_another_compiler_are_reported_once_and_ignored_plans_are_not(self, other, cache):
        tile = {("shrink", (16,)): {"BLOCK_M": 16, "BLOCK_K": 64}}
        measure(cache, tiles=tile, versions=plans.versions() | other)
        with pytest.warns(UserWarning, match="fastlora ignores the tiles measured on NVIDIA H100") as caught:
            assert not plans.table(GPU).tiles
        assert len(caught) == 1 and "fastlora tune" in str(caught[0].message)
        assert choose("lora_matmul", Problem(5000, 4096, 4096, 16), GPU) == "tail"
        measure(cache, tiles=tile, versions=plans.versions())
        assert plans.table(GPU).tiles == tile

    def test_measured_beats_the_table_and_forced_beats_both(self, cache):
        from fastlora import kernel_ops
        from fastlora.kernels import tiles

        usual = tiles.tile("shrink", 16)
        measured = {"BLOCK_M": 16, "BLOCK_K": 64, "num_warps": 2, "num_stages": 5}
        plans.write_tables(cache, {"cpu": Table(tiles={("shrink", (16,)): measured}, versions=plans.versions())})
        kernel_ops.launcher("shrink", "shrink")
        assert tiles.tile("shrink", 16) == tiles.Tile(**measured) == tiles.tile("shrink", 9)
        assert tiles.tile("shrink", 32) == usual
        with tiles.use("shrink", usual):
            assert tiles.tile("shrink", 16) == usual
        tiles.force_family("sm_90")  # what is compiled for another device has not been measured here
        try:
            assert tiles.tile("shrink", 16) != tiles.Tile(**measured)
        finally:
            tiles.force_family(None)
        assert tiles.tile("shrink", 16) == tiles.Tile(**measured)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="launches in Triton's interpreter")
    def test_a_measured_tile_is_launched(self, cache):
        from fastlora import kernel_ops
        from fastlora.kernels import tiles

        interpreter.repair()
        measured = {"BLOCK_M": 16, "BLOCK_K": 16}
        plans.write_tables(cache, {"cpu": Table(tiles={("shrink", (16,)): measured}, versions=plans.versions())})
        x, a = torch.randn(40, 48).bfloat16(), torch.randn(4, 48)
        truth = 2 * x.double() @ a.double().t()
        with tiles.watch() as used:
            xa = kernel_ops.launcher("shrink", "shrink")(x, a, 2.0)
        assert same(xa, truth, torch.bfloat16)  # the kernel keeps 16 bits of a
        assert used == {("shrink", (16,)): tiles.Tile(**measured)}


@pytest.mark.parametrize("device", roofline.GPUS)
def test_the_plan_knows_of_half_empty_waves(device):
    """Where tiles would leave multiprocessors without work that memory does not wait for, the vendor's GEMM, which may
    cut the depth, is predicted to be faster."""
    pytest.importorskip("triton")
    rows = list(roofline.planned(device, SHAPES["llama-3-8b"]))
    assert len(rows) == 4 * len(roofline.TOKENS)
    for row in rows:
        assert row["plan"] == "base_last" or row["busy"] >= 0.85 or row["bound"] == "memory", row
    usual = {row["M"]: row["tile"] for row in rows if row["N"] == 1024}
    assert usual[512] != usual[16384], "eight rows of tiles do not fill a device"


def test_tiles_of_a_product_are_those_of_the_fewest_clocks():
    pytest.importorskip("triton")
    from fastlora.kernels import tiles
    from fastlora.kernels.waves import Product

    for family, N in (("sm_90", 1024), ("sm_80", 14336)):
        tiles.force_family(family)
        try:
            name = tiles.name_of_matmul(tiles.has_tma(), 2, False, False)
            for M in (1, 100, 512, 3000):
                found = tiles.tile(name, M, N, 4096)
                product = Product(M, N, 4096, family, {"sm_90": 132, "sm_80": 108}[family])
                clocks = {t: product.clocks(t.BLOCK_M, t.BLOCK_N) for t in tiles.rows_of(name, family)}
                assert clocks[found] == min(clocks.values())
        finally:
            tiles.force_family(None)


def test_clocks_of_a_product():
    """By hand: 128 x 128 FLOPs are 8 clocks a column on a multiprocessor of an H100, and its 512 bytes 8 clocks at its
    port's rate, 16 at its share of L2."""
    from fastlora.kernels.waves import ADAPTER, COPIES, Product

    product = Product(512, 1024, 1000, "sm_90", 132)
    assert product.clocks(128, 128) == 1000 * 8 + COPIES + ADAPTER, "32 tiles"
    assert product._replace(M=5 * 512).clocks(128, 128) == 2 * (1000 * 16 + COPIES + ADAPTER), "160 of them"
    assert product.clocks(128, 128, splits=2) == 500 * 8 + 8 * 128 * 128 / 64 + COPIES + ADAPTER, "64 halves"
