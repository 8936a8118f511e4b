"""`fastlora bench`, `--against` another revision, and the regression benchmarks, on tiny layers."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from fastlora.benchmarks import against, arguments, pictures, protocol, providers, records
from fastlora.benchmarks.cases.models import compute_dtype, default_bases
from fastlora.benchmarks.commands import bench
from fastlora.cli import main

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("bitsandbytes_eager")]
ROOT = Path(__file__).parents[1]
TINY = ("--model-shape", "tiny", "--m", "8,16", "--r", "2", "--rounds", "1", "--modes", "step")


@pytest.fixture(autouse=True)
def small_rates(monkeypatch):
    monkeypatch.setattr(protocol, "measure_rates", partial(protocol.measure_rates, size=64))


@pytest.mark.parametrize(
    "verb",
    ["linear", "experts", "generate", *(pytest.param(v, marks=pytest.mark.slow) for v in ("decode", "block", "model"))],
)
def test_writes_rows_environment_and_picture(verb, tmp_path, capsys):
    if verb == "experts" and transformers.__version__.startswith("5.0."):
        pytest.skip("transformers 5.0 says nothing of the layout of experts")
    bases, names = ("nf4", "bitsandbytes,fastlora") if verb == "decode" else ("bf16", "frozen,peft,fastlora")
    chosen = [*TINY, "--base", bases, "--providers", names, "--out", str(tmp_path)]
    chosen += ["--model-shape", "tiny-moe"] if verb == "experts" else []
    assert main(["bench", verb, *chosen, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["complete"] and report["environment"]["torch"] == torch.__version__
    assert report["environment"]["allocator"].endswith("(mallopt)") or sys.platform != "linux"
    assert report["rates"]["measured"] and report["rates"]["copy"] > 0
    rows = records.read_rows(tmp_path / f"{verb}.csv")
    assert len(rows) == len(report["rows"]) and all(row["error"] is None and row["p50"] > 0 for row in rows)
    assert json.loads((tmp_path / f"{verb}.json").read_text())["verb"] == verb
    assert (tmp_path / f"{verb}.png").read_bytes().startswith(b"\x89PNG")
    assert not any(str(ROOT) in (tmp_path / f"{verb}.{end}").read_text() for end in ("csv", "json"))


def test_table_says_who_was_not_timed(tmp_path, capsys):
    chosen = [*TINY, "--base", "bf16", "--providers", "frozen,peft,bitsandbytes,fastlora", "--out", str(tmp_path)]
    assert main(["bench", "block", *chosen]) == 0
    printed = capsys.readouterr().out
    assert "tiny block, bf16, M=8, r=2" in printed and "tiny block, bf16, M=16, r=2" in printed
    assert printed.count("not timed: bitsandbytes + adapter: not applicable: only for 4-bit bases") == 1


def test_a_wrong_provider_fails_the_command(tmp_path, capsys, monkeypatch):
    def wrong(module, case):
        module.register_forward_hook(lambda module, args, y: 1.02 * y)
        return module

    monkeypatch.setitem(providers.PROVIDERS, "addmm", replace(providers.PROVIDERS["addmm"], make=wrong))
    chosen = [*TINY, "--base", "bf16", "--providers", "peft,addmm", "--out", str(tmp_path)]
    assert main(["bench", "block", *chosen]) == 1
    assert "not timed: addmm style: wrong: error of y" in capsys.readouterr().out


def test_csv(tmp_path, capsys):
    chosen = [*TINY, "--base", "bf16", "--providers", "peft", "--out", str(tmp_path)]
    assert main(["bench", "block", *chosen, "--csv"]) == 0
    assert capsys.readouterr().out == (tmp_path / "block.csv").read_text()


def test_interrupted_it_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    run = protocol.run

    def interrupted(case, *more):
        if case.M == 16:
            raise KeyboardInterrupt
        yield from run(case, *more)

    monkeypatch.setattr(protocol, "run", interrupted)
    chosen = [*TINY, "--base", "bf16", "--providers", "peft", "--out", str(tmp_path)]
    assert main(["bench", "block", *chosen]) == 130
    assert [row["M"] for row in records.read_rows(tmp_path / "block.csv")] == [8]
    assert not json.loads((tmp_path / "block.json").read_text())["complete"]
    assert not (tmp_path / "block.png").exists() and "Interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["linear", "--providers", "me"], "--providers must be of frozen, peft"),
        (["linear", "--model-shape", "gpt-9"], "--model-shape must be of llama-3-8b"),
        (["everything"], "invalid choice"),
        (["decode", "--base", "bf16"], "--base must be nf4 or fp4"),
        (["experts", "--base", "nf4"], "--dropout must be 0 and --base dense"),
        (["experts", "--base", "bf16", "--dropout", "0.1"], "--dropout must be 0 and --base dense"),
        (["experts", "--model-shape", "tiny"], "--model-shape must be of moe-8"),
        (["linear", "--model-shape", "tiny-moe"], "bench linear: --model-shape must be of llama-3-8b"),
        (["decode", "--against", "HEAD"], "--against compares linear, block, experts and model"),
        (["generate", "--against", "HEAD"], "--against compares linear, block, experts and model"),
        (["block", "--against", "HEAD", "--providers", "peft"], "--against compares"),
        (["block", "--against", "no-such-revision"], "--against no-such-revision: there is no such revision"),
        (["block", "--modes", "sideways"], "--modes must be of forward, backward, step"),
    ],
)
def test_unusable_arguments(chosen, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *chosen, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_quick_sets_have_curves_of_five_points_on_a_small_and_a_large_layer():
    args = arguments.build_parser().parse_args(["bench", "linear", "--quick"])
    cases = bench.cases_of(args, torch.device("cpu"))
    assert {case.M for case in cases} == {1, 16, 64, 256, 1024}
    assert {case.shape for case in cases} == {"smollm2-135m", "llama-3.2-1b"}
    assert {case.base for case in cases} == set(default_bases("cpu"))
    assert all(case.dtype == compute_dtype("cpu") for case in cases), "bf16 only where a CPU has instructions for it"


def test_the_command_names_what_the_harness_has():
    assert set(providers.PROVIDERS) == set(pictures.MARKERS) == set(pictures.COLOURS)
    assert arguments.MODES == protocol.MODES


class TestAgainst:
    @pytest.mark.slow
    @pytest.mark.skipif(against.git("rev-parse", "HEAD") is None, reason="needs a git checkout")
    def test_another_revision(self, tmp_path, capsys, monkeypatch):
        folder = tmp_path / "temporary"
        folder.mkdir()
        monkeypatch.setattr(against.tempfile, "tempdir", str(folder))
        chosen = ["--model-shape", "tiny", "--m", "8", "--base", "bf16", "--rounds", "2", "--modes", "step"]
        assert main(["bench", "block", *chosen, "--against", "HEAD", "--out", str(tmp_path), "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        assert row["error"] is None and row["other_p50"] > 0 and row["this_p50"] > 0 and row["speedup"] > 0
        assert row["other_saved_bytes"] == row["this_saved_bytes"]
        assert against.git("rev-parse", "HEAD").startswith(row["against"])
        assert (tmp_path / "block-against.png").exists() and (tmp_path / "block-against.csv").exists()
        assert not list(folder.iterdir()), "nothing is left behind"

    def test_a_revision_without_the_modules_that_benchmarks_import(self, tmp_path, capsys, monkeypatch):
        def git(*command):  # a worktree of a revision from before fastlora/costs.py
            if command[:2] == ("worktree", "add"):
                shutil.copytree(ROOT / "kernels", Path(command[-2]) / "kernels")
                package = shutil.copytree(ROOT / "fastlora", Path(command[-2]) / "fastlora", symlinks=True)
                (package / "costs.py").unlink()
            return "0123abcd"

        monkeypatch.setattr(against, "git", git)
        monkeypatch.setattr(against, "_extension", lambda *_: pytest.fail("compiled in vain"))
        with pytest.raises(SystemExit) as stop:
            main(["bench", "block", "--against", "old", "--out", str(tmp_path)])
        message = capsys.readouterr().err
        assert stop.value.code == 2 and "--against old: the benchmarks of this checkout do not run" in message
        assert "costs" in message and "Choose a later one" in message

    def test_a_worker_that_ends_says_why(self, tmp_path):
        (tmp_path / "fastlora").mkdir()
        (tmp_path / "fastlora" / "__init__.py").write_text("raise ImportError('too old')")
        with against.Worker(tmp_path) as worker, pytest.raises(against.RevisionError, match="too old"):
            worker.ask(device="cpu")


@pytest.mark.slow
class TestRegressions:
    """`pytest benchmarks`, in a process of its own."""

    PLUGIN = """
import time
from dataclasses import replace
from fastlora.benchmarks import providers

def changed(module, case):
    module = providers.fastlora(module, case)
    right = module.layer.forward
    def forward(x):
        {effect}
    module.layer.forward = forward
    return module

providers.PROVIDERS["fastlora"] = replace(providers.PROVIDERS["fastlora"], make=changed)
"""

    def pytest(self, folder, *more):
        command = [
            sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider",
            "--model-shape", "tiny", "--m", "16", "-k", "bf16-fastlora", f"--benchmark-storage={folder}", *more,
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(folder)}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)

    def test_one_that_got_slower_fails_and_one_that_is_wrong_is_not_timed(self, tmp_path):
        right = self.pytest(tmp_path, "--benchmark-save=before")
        assert right.returncode == 0 and "time in frozen layer's" in right.stdout, right.stdout + right.stderr
        (saved,) = tmp_path.rglob("*before.json")
        kept = json.loads(saved.read_text())
        assert "node" not in kept["machine_info"] and kept["benchmarks"][0]["extra_info"]["frozen_seconds"] > 0

        (tmp_path / "changed.py").write_text(self.PLUGIN.format(effect="time.sleep(0.02); return right(x)"))
        slow = self.pytest(tmp_path, "-p", "changed", "--benchmark-compare", "--benchmark-compare-fail=median:100%")
        assert slow.returncode != 0 and "Performance has regressed" in slow.stdout + slow.stderr

        (tmp_path / "changed.py").write_text(self.PLUGIN.format(effect="return 1.02 * right(x)"))
        wrong = self.pytest(tmp_path, "-p", "changed", "--benchmark-save=wrong")
        assert wrong.returncode != 0 and "wrong: error of y" in wrong.stdout
        assert not list(tmp_path.rglob("*wrong.json"))
