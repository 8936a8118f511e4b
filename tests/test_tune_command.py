"""``fastlora tune`` without a GPU: by a clock that knows what everything costs."""

import json
import math
from functools import partial

import pytest
import torch

from fastlora import kernel_ops, ops, plans
from fastlora.benchmarks import tuning
from fastlora.benchmarks.cases.ops import kernels, op_cases
from fastlora.benchmarks.commands import tune
from fastlora.cli import main
from fastlora.costs import Problem
from fastlora.plans import Table

pytest.importorskip("triton")

from fastlora.kernels import tiles

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="makes a CPU pass for a GPU"),
    pytest.mark.usefixtures("bitsandbytes_eager", "cache"),
]


class Device:
    """Stands for kernels on a device: results are torch's, and every launch takes the seconds that a test says."""

    def __init__(self, seconds, broken=()):
        self.seconds, self.broken, self.spent, self.timed = seconds, broken, 0.0, []

    def launch(self, op, composition, *args):
        x = args[0]
        plan, sizes = "", (x.shape[0], *(args[1].shape if op == "lora_matmul" else ()))
        if op in plans.PLANS:
            like = args[3] if op == "lora_matmul" else args[2]
            N = args[1].shape[0] if op == "lora_matmul" else 0
            plan = plans.choose(op, kernel_ops._problem(x, N, like.shape[1]), "cpu")
        used = (op, plan) if plan == "base_last" else (op, plan, tiles.tile(op, *sizes))
        self.spent += self.seconds(*used)
        self.timed.append(used)
        result = composition(*args)
        if used in self.broken:
            result = result * 1.1
        return result

    def clock(self, run):
        before = self.spent
        run()
        return self.spent - before or 1.0


@pytest.fixture
def pretend(monkeypatch):
    """Let the command find a GPU that is a `Device`."""

    def install(seconds, broken=()):
        device = Device(seconds, broken)
        for op in ("shrink", "lora_matmul", "lora_grad", "decode_4bit"):
            monkeypatch.setitem(kernel_ops._LAUNCHERS, op, partial(device.launch, op, getattr(ops, op)))
        monkeypatch.setattr(tune, "gpu", lambda: (torch.device("cpu"), "cpu"))
        monkeypatch.setattr(tuning, "gpu_clock", device.clock)
        monkeypatch.setattr(tuning, "SIZE", 64)
        return device

    return install


def even(op, plan="", tile=None):
    return 1.0


SHAPE = ("--shape", "32,48,64", "--r", "4", "--base", "bf16")


def test_the_faster_plan_is_kept_and_chosen_from_then_on(pretend, cache, capsys):
    pretend(lambda op, plan="", tile=None: 3.0 if plan == "tail" else 2.0)
    c = Problem(32, 48, 64, 4)
    assert plans.choose("lora_matmul", c, "cpu") == "tail", "by the rule"
    assert main(["tune", *SHAPE]) == 0
    printed = capsys.readouterr()
    assert "What changed" in printed.out and "tail" in printed.out and "1.50x" in printed.out
    assert str(cache) in printed.err
    assert plans.choose("lora_matmul", c, "cpu") == "base_last", "by measurement"
    assert plans.choose("lora_matmul", Problem(20, 48, 64, 4), "cpu") == "base_last", "of the same power of two"
    assert plans.key("lora_matmul", Problem(33, 48, 64, 4)) not in plans.table("cpu").plans
    assert main(["tune", *SHAPE]) == 0
    assert "Nothing changed" in capsys.readouterr().out


def test_noise_changes_nothing(pretend, cache, capsys):
    pretend(lambda op, plan="", tile=None: 1.0 if plan != "base_last" else 0.99)
    assert main(["tune", *SHAPE]) == 0
    assert "Nothing changed" in capsys.readouterr().out
    found = plans.read_tables(cache)["cpu"]
    assert found.plans[plans.key("lora_matmul", Problem(32, 48, 64, 4))] == "tail"
    assert not found.tiles


def distance(tile):
    """Doublings from the tile that the pretended device likes best, two steps away from the table's."""
    return abs(math.log2(tile.BLOCK_M / 64)) + abs(math.log2(tile.BLOCK_K / 16))


def tile_seconds(op, plan="", tile=None):
    return 10.0 + distance(tile) if op == "shrink" else 1.0


def test_the_best_tile_is_climbed_to_and_launched_from_then_on(pretend, cache, capsys):
    device = pretend(tile_seconds)
    usual = tiles.tile("shrink", 32)
    assert distance(usual) == 2
    assert main(["tune", *SHAPE]) == 0
    assert "M64 K16" in capsys.readouterr().out
    with kernels(torch.device("cpu")):
        torch.ops.fastlora.shrink(torch.randn(32, 64).bfloat16(), torch.randn(4, 64), 1.0)
    assert distance(device.timed[-1][2]) == 0
    with tiles.watch() as used:
        tiles.tile("shrink", 32)
    assert distance(used["shrink", (32,)]) == 0
    assert tiles.tile("shrink", 64) == usual


def test_a_tile_that_is_wrong_gets_no_timing(pretend, cache, capsys):
    """Its neighbour would have been the best of all."""
    usual = tiles.tile("shrink", 32)
    best = [t for t in tuning.neighbours(usual) if t.BLOCK_M == 64]
    device = pretend(lambda op, plan="", tile=None: 0.1 if tile in best else 1.0, {("shrink", "", t) for t in best})
    assert main(["tune", *SHAPE]) == 0
    printed = capsys.readouterr()
    assert "Nothing changed" in printed.out
    assert "not timed: shrink M64" in printed.err and "the baseline's is" in printed.err
    # once to find out that it is wrong
    assert sum(used == ("shrink", "", best[0]) for used in device.timed) == 1


def test_what_nobody_writes_is_wrong(pretend, capsys, monkeypatch):
    """It could hold the right result of the tile before, had memory not been poisoned."""
    device = pretend(even)
    launch = device.launch

    def writes_half(op, composition, *args):
        result = launch(op, composition, *args)
        if op != "shrink" or tiles.tile("shrink", 32).BLOCK_M == 32:
            return result
        out = torch.empty_like(result)
        out[::2] = result[::2]
        return out

    monkeypatch.setitem(kernel_ops._LAUNCHERS, "shrink", partial(writes_half, "shrink", ops.shrink))
    assert main(["tune", *SHAPE, "--json"]) == 0
    rejected = json.loads(capsys.readouterr().out)["rejected"]
    assert any(line.startswith("shrink M64") and "error of result 0 nan" in line for line in rejected)


def test_a_tile_that_does_not_fit_is_passed_over(pretend, capsys):
    def seconds(op, plan="", tile=None):
        if tile is not None and tile.BLOCK_M > 32:
            raise RuntimeError("out of resource: shared memory\nRequired: ...")
        return 1.0

    pretend(seconds)
    assert main(["tune", *SHAPE, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert any("RuntimeError: out of resource: shared memory" in line for line in report["rejected"])


def test_problems_of_one_entry_are_decided_together(pretend, cache):
    """dx of a square layer shares the entry of its forward: the sum counts, not the last to be measured."""
    device = pretend(even)
    seen = set()

    def launch(composition, *args):
        transposed = args[1].stride(0) == 1
        seen.add(transposed)
        costs = {"tail": 1.0, "base_last": 5.0} if transposed else {"tail": 2.0, "base_last": 1.0}
        device.seconds = lambda op, plan="", tile=None: costs.get(plan, 1.0)
        return device.launch("lora_matmul", composition, *args)

    kernel_ops._LAUNCHERS["lora_matmul"] = partial(launch, ops.lora_matmul)
    assert main(["tune", "--shape", "32,64,64", "--r", "4", "--base", "bf16"]) == 0
    assert seen == {True, False}
    assert plans.read_tables(cache)["cpu"].plans[plans.key("lora_matmul", Problem(32, 64, 64, 4))] == "tail"


def test_json_is_all_of_stdout(pretend, cache, capsys):
    pretend(lambda op, plan="", tile=None: 3.0 if plan == "tail" else 2.0)
    assert main(["tune", *SHAPE, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == "cpu" and report["rates"]["measured"] is True
    (change,) = [c for c in report["changes"] if c["problems"] == "M=32 N=48 K=64 r=4"]
    assert (change["kind"], change["op"], change["before"], change["after"]) == (
        "plan", "lora_matmul", "tail", "base_last",
    )  # fmt: skip
    assert (change["seconds_before"], change["seconds_after"]) == (3.0, 2.0)
    assert {"date", "torch", "triton", "commit"} <= report["environment"].keys()
    assert plans.read_tables(cache)["cpu"].environment == report["environment"]


def test_rates_are_those_of_the_clock(pretend, cache):
    pretend(even)
    assert main(["tune", *SHAPE]) == 0
    rates = plans.read_tables(cache)["cpu"].rates
    # every call takes one second on this device, a row of launches too
    assert rates.copy == 2 * 4 * (16 * 64) * (64 // 4)
    assert rates.gemm == 2 * 64 * 32 * 32
    assert rates.kernel_gemm == 2 * 64 * 32 * (32 + 3 * 16)  # fp32 adapters: three products in half precision
    assert rates.gemm_fp32 == 2 * 16 * 32 * 32
    assert rates.launch == 1 / tuning.LAUNCHES
    assert rates.multiprocessors == 4 and rates.measured


def test_other_devices_and_other_problems_are_kept(pretend, cache):
    other = plans.key("lora_grad", Problem(4096, 0, 4096, 16))
    plans.write_tables(cache, {"another": Table(plans={other: "two_pass"}), "cpu": Table(plans={other: "two_pass"})})
    pretend(even)
    assert main(["tune", *SHAPE]) == 0
    found = plans.read_tables(cache)
    assert found["another"].plans == {other: "two_pass"}
    assert found["cpu"].plans[other] == "two_pass" and len(found["cpu"].plans) > 1


@pytest.mark.filterwarnings("ignore:fastlora ignores its measured plans")
def test_a_file_of_another_version_is_reported_and_replaced(pretend, cache, capsys):
    cache.parent.mkdir()
    cache.write_text('{"version": 99, "devices": {}}')
    pretend(even)
    assert main(["tune", *SHAPE]) == 0
    assert "the file has 99; it will be replaced" in capsys.readouterr().err.replace("\n", " ")
    assert "cpu" in plans.read_tables(cache)


def test_interrupted_it_keeps_what_was_measured(pretend, cache, capsys):
    device = pretend(even)

    def interrupt(op, plan="", tile=None):
        if op == "lora_grad" and any(used[0] == "shrink" for used in device.timed[10:]):
            raise KeyboardInterrupt
        return tile_seconds(op, plan, tile)

    device.seconds = interrupt
    assert main(["tune", *SHAPE]) == 130
    assert "Interrupted" in capsys.readouterr().err
    found = plans.read_tables(cache)["cpu"]
    assert found.rates and ("shrink", (32,)) in found.tiles
    assert tiles._source("cpu") == plans.table("cpu"), "and what was being tried is no longer in use"


def test_out_names_the_file(pretend, cache, tmp_path):
    pretend(even)
    assert main(["tune", *SHAPE, "--out", str(tmp_path / "here.json")]) == 0
    assert "cpu" in plans.read_tables(tmp_path / "here.json")
    assert not cache.exists()


def test_steps_that_are_done_are_passed_over(pretend):
    device = pretend(even)
    problems = op_cases([(32, 48, 64)], [4], torch.bfloat16, False)
    steps = [text for _, _, text in tuning.Tuner(torch.device("cpu"), device.clock, "cpu").run(problems)]
    assert len(steps) == len(set(steps)) > 4 and steps[-1] == "done"
    device.timed.clear()
    tuner = tuning.Tuner(torch.device("cpu"), device.clock, "cpu")
    list(tuner.run(problems, steps))
    assert len(device.timed) == sum(len(case.plans) for case in problems), "each once, to see which tiles are used"
    assert tuner.found.table == Table(versions=plans.versions())


class TestDryRun:
    def test_needs_no_gpu(self, capsys):
        assert main(["tune", "--model", "llama-3-8b", "--dry-run", "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)
        assert listed["device"] == "H100" and listed["rates"]["measured"] is False
        by_op = {(row["op"], row["plan"]) for row in listed["plans"]}
        assert {(op, plan) for op, names in plans.PLANS.items() for plan in names} <= by_op
        assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in listed["plans"])

    def test_says_that_nothing_was_run(self, capsys):
        assert main(["tune", "--shape", "8192,4096,4096", "--dry-run"]) == 0
        printed = capsys.readouterr().out
        assert "H100, by modelled rates: nothing was run" in printed and "(chosen)" in printed

    def test_of_a_folder_with_a_config(self, tmp_path, capsys):
        config = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 32,
                  "num_key_value_heads": 2}  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        sizes = ("--tokens", "7", "--base", "bf16")
        assert main(["tune", "--model", str(tmp_path), "--dry-run", "--json", *sizes]) == 0
        rows = json.loads(capsys.readouterr().out)["plans"]
        forward = {row["problem"] for row in rows if row["op"] == "lora_matmul" and "dx" not in row["problem"]}
        siblings = {row["problem"] for row in rows if "+" in row["problem"]}
        assert siblings == {"M=7 N=128+64+64 K=64 r=16, dx", "M=7 N=160+160 K=64 r=16, dx"}
        assert forward == {
            f"M=7 N={N} K={K} r=16" for N, K in ((128, 64), (64, 64), (64, 128), (160, 64), (64, 160))
        }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model llama-3-8b", "needs a GPU that torch sees"),
        ("", "one of --model and --shape must say"),
        ("--model llama-9", "--model must be of llama-3-8b, llama-2-7b,"),
        ("--shape 1,2", "--shape must be M,N,K, three positive integers, got '1,2'"),
        ("--shape 1,2,0", "--shape must be M,N,K"),
        ("--shape 8,8,8 --base int8", "--base must be of bf16, fp16, fp32, nf4, got 'int8'"),
        ("--shape 8,8,8 --r 0", "--r must be an integer of at least 1"),
    ],
    ids=lambda value: value if value.startswith("--") and " " in value and "must" not in value else "",
)
def test_unusable_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune", *arguments.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune", "--help"])
    assert stop.value.code == 0
    assert "example:\n  fastlora tune" in capsys.readouterr().out
