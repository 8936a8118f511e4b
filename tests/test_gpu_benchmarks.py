"""`benchmarks/gpu.py` on a CPU: every step on tiny sizes with interpreted kernels, what interruptions leave, goals."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import peft  # noqa: F401  before CUDA is pretended: annotations of its modules name torch.cuda's types
import pytest
import torch

from fastlora.benchmarks import gpu, gpu_steps, gpu_tests, records, report, tuning
from fastlora.benchmarks.cases import modules
from fastlora.benchmarks.cases.shapes import SHAPES
from fastlora.benchmarks.gpu import goal_lines, goals

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="makes a CPU pass for a GPU"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("bitsandbytes_eager"),
]
ARGS = SimpleNamespace(commit=None, tiny=True)
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def restored(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "SIZE", tuning.SIZE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(out, *more):
    return gpu.main(["--device", "cpu", "--tiny", "--out", str(out), *more])


def rows(out, step):
    return records.read_rows(out / "cpu" / f"{step}.csv")


@pytest.mark.parametrize("step", ["environment", "rates"])
def test_step(step, tmp_path, capsys):
    assert run(tmp_path, "--only", step) == 0
    assert f"{step}: complete" in capsys.readouterr().out
    found = rows(tmp_path, step)
    excused = ("missing", "not applicable")  # providers that are not installed, or not for this base
    assert found and all((row.get("error") or "missing").startswith(excused) for row in found)
    state = json.loads((tmp_path / "cpu" / "gpu.json").read_text())[step]
    assert state["complete"] and state["environment"]["tiny"] and state["environment"]["torch"] == torch.__version__
    assert str(ROOT) not in (tmp_path / "cpu" / "gpu.json").read_text()
    assert run(tmp_path, "--only", step) == 0
    assert f"{step}: complete, from" in capsys.readouterr().out, "and is not measured again"


@pytest.fixture
def one_layer(monkeypatch):
    """Of the block's linears only one, which takes a fraction of the time."""
    one = modules.Case("linear", "tiny", "q,k,v,o,gate,up,down", 0, 0, "", N=32, K=64, count=7)
    monkeypatch.setattr(gpu_steps, "layers_of", lambda run, **fields: [replace(one, **fields)])


@pytest.mark.slow
def test_sweep_compares_every_provider(one_layer, tmp_path):
    assert run(tmp_path, "--only", "sweep") == 0
    found = rows(tmp_path, "sweep")
    for base in ("bf16", "nf4"):
        here = [row for row in found if row["base"] == base]
        assert {row["provider"] for row in here} == {provider.name for provider in gpu_steps.providers_of(base)}
        for mode in ("forward", "step"):
            timed = [row for row in here if row["mode"] == mode]
            assert {"frozen", "peft", "addmm", "fastlora"} <= {row["provider"] for row in timed}
            assert all(0 < r["p20"] <= r["p50"] <= r["p80"] and r["roofline"] > 0 for r in timed)
            assert all(0 < r["relative_error"] < 0.01 for r in timed)
    timed = [r for r in found if r["provider"].startswith("fastlora") and r["mode"] == "step"]
    assert {(r["base"], r["provider"]): r["plan"] for r in timed} == {
        ("bf16", "fastlora"): "tail", ("bf16", "fastlora tail one_pass"): "tail",
        ("bf16", "fastlora two_pass"): "tail", ("bf16", "fastlora base_last one_pass"): "base_last",
        ("nf4", "fastlora"): "fused", ("nf4", "fastlora one_pass"): "fused", ("nf4", "fastlora two_pass"): "fused",
    }  # fmt: skip
    assert all(r["predicted"] > 0 for r in timed)


class TestOnlyOnAGPU:
    """What no CPU runs, with the device pretended: it shall not fail on the day for a typo."""

    @pytest.fixture
    def given(self, tmp_path):
        device = SimpleNamespace(type="cuda", index=0)
        return gpu.Run(device, "a GPU", tmp_path, True, 1e12, False, {}, set())

    @pytest.fixture
    def cuda(self, monkeypatch):
        """Streams that are none, and graphs whose replay is the call again, into the results of the first."""

        class Graph:
            def replay(self):
                for old, new in zip(self.results, self.call(), strict=True):
                    old.data.copy_(new.data)

        nothing = SimpleNamespace(wait_stream=lambda other: None)
        pretended = {
            "is_available": lambda: False, "Stream": lambda: nothing, "current_stream": lambda: nothing,
            "stream": lambda stream: nullcontext(), "CUDAGraph": Graph, "graph": lambda graph: nullcontext(),
            "synchronize": lambda device=None: None, "current_device": lambda: 0,
        }  # fmt: skip
        for name, function in pretended.items():
            monkeypatch.setattr(torch.cuda, name, function)
        capture = gpu_steps.capture

        def captured(call):
            graph, results = capture(call)
            graph.call, graph.results = call, results
            return graph, results

        monkeypatch.setattr(gpu_steps, "capture", captured)
        monkeypatch.setattr("triton.testing.do_bench", lambda call, **how: [call(), 3.0, 1.0, 2.0][1:])

    def test_graphs(self, given, cuda, monkeypatch):
        # the tensors are on a CPU all the same
        torch_device = torch.device("cpu")
        monkeypatch.setattr(gpu_steps, "torch", SimpleNamespace(**vars(torch)))
        for name in ("eye", "ones", "zeros"):
            make = getattr(torch, name)
            monkeypatch.setattr(
                gpu_steps.torch, name, lambda *a, make=make, device, **k: make(*a, device=torch_device, **k)
            )
        monkeypatch.setattr(gpu_steps, "make_subject", lambda case, device: modules.make_subject(case, torch_device))
        found = {case: measure() for case, measure in gpu_steps.step_graph(given)}
        assert list(found) == ["masks", "bf16 M=4", "nf4 M=4"]
        outcomes = [row["outcome"] for rows in found.values() for row in rows if "outcome" in row]
        assert outcomes == [True] * 5
        times = [row for rows in found.values() for row in rows if "p50" in row]
        assert all((row["p20"], row["p50"], row["p80"]) == pytest.approx((1.4e-3, 2e-3, 2.6e-3)) for row in times)

    def test_clocks(self, monkeypatch):
        line = "580.95.05, 1980 MHz, 1980 MHz, 2619 MHz, 92.20 W, 700.00 W, 31\n"
        asked = []
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(
            records.subprocess, "run", lambda command, **how: asked.append(command) or SimpleNamespace(stdout=line)
        )
        found = records.clocks(SimpleNamespace(type="cuda"))
        assert found["driver_version"] == "580.95.05" and found["temperature.gpu"] == "31"
        assert all(argument.startswith(("nvidia-smi", "--id", "--query", "--format")) for argument in asked[0])

    def test_clocks_without_the_tool(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setenv("PATH", "")
        assert records.clocks(SimpleNamespace(type="cuda")) == {}

    def test_kernels_of_a_profile(self):
        def event(key, seconds, device):
            return SimpleNamespace(
                key=key, count=2, self_device_time_total=seconds * 1e6, self_cpu_time_total=0.0,
                device_type=SimpleNamespace(name=device),
            )  # fmt: skip

        events = [event("aten::mm", 9.0, "CPU"), event("gemm", 3.0, "CUDA"), event("shrink", 1.0, "CUDA")]
        assert gpu_steps.kernel_rows(events, on_gpu=True) == [
            {"kernel": "gemm", "calls": 2, "seconds": 3.0, "share": 0.75, "error": None},
            {"kernel": "shrink", "calls": 2, "seconds": 1.0, "share": 0.25, "error": None},
        ]

    def test_a_row_of_launches(self, cuda, monkeypatch):
        monkeypatch.setattr(tuning, "torch", SimpleNamespace(**vars(torch)))
        monkeypatch.setattr(tuning.torch, "zeros", lambda n, device: torch.zeros(n))
        replays = []
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph))
        seconds = tuning._launch_seconds(SimpleNamespace(type="cuda"), lambda run: run() or 1.0)
        assert seconds == 1 / tuning.LAUNCHES and len(replays) == 1

    def test_the_clock(self, monkeypatch):
        asked = []
        monkeypatch.setattr("triton.testing.do_bench", lambda run, **how: asked.append(how) or 2.0)
        assert tuning.gpu_clock(lambda: None) == 2e-3
        assert asked[0]["return_mode"] == "median"


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", ["smoke", "correctness", "decode", "experts", "graph", "tune", "sweep", "profile", "compare"]
)
def test_slow_step(step, tmp_path):
    test_step(step, tmp_path, SimpleNamespace(readouterr=lambda: SimpleNamespace(out=f"{step}: complete, from")))


def test_what_is_missing_is_listed(one_layer, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps.importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path, "--only", "sweep") == 0
    found = [row for row in rows(tmp_path, "sweep") if row["base"] == "nf4"]
    assert {row["error"] for row in found} == {"missing: bitsandbytes is not installed"}
    assert len(found) == len(gpu_steps.providers_of("nf4")) and all(row["p50"] is None for row in found)


class TestBudget:
    @pytest.fixture
    def cases(self, monkeypatch):
        """A step of four cases; ``cases.fail`` ends the third."""
        found = SimpleNamespace(measured=[], fail=None, spend=0.0)

        def step(run):
            for case in "abcd":
                if case not in run.done:
                    run.case = case
                    if case == "c" and found.fail:
                        raise found.fail
                    found.measured.append(case)
                    if case == "b":
                        run.deadline -= found.spend
                    yield case, [{"value": ord(case) / 7}]

        monkeypatch.setattr(gpu_steps, "step_rates", step)
        return found

    def test_spent_it_writes_and_the_next_call_goes_on(self, cases, tmp_path, capsys):
        assert run(tmp_path, "--only", "rates", "--minutes", "1e-6") == 1
        assert "the next call goes on" in capsys.readouterr().out
        assert [r["case"] for r in rows(tmp_path, "rates")] == ["a"]
        assert run(tmp_path, "--only", "rates") == 0
        assert [r["case"] for r in rows(tmp_path, "rates")] == ["a", "b", "c", "d"]
        assert cases.measured == ["a", "b", "c", "d"]
        assert rows(tmp_path, "rates")[0]["value"] == pytest.approx(ord("a") / 7, rel=1e-5)

    def test_a_step_whose_turn_is_spent_goes_on_after_the_others(self, cases, tmp_path, monkeypatch):
        cases.spend = 1e9
        monkeypatch.setattr(gpu, "STEPS", ("rates", "graph"))
        monkeypatch.setattr(gpu_steps, "step_graph", lambda run: cases.measured.append("graph") or iter([("g", [{}])]))
        assert run(tmp_path, "--from", "rates") == 0
        assert cases.measured == ["a", "b", "graph", "c", "d"]

    @pytest.mark.parametrize("at", [None, "b"])
    def test_a_device_that_breaks_between_cases(self, at, tmp_path, monkeypatch):
        """As in `tune`, which measures before it names the rows: the case that is done is not the one that failed."""

        def step(run):
            yield "a", [{"value": 1.0}]
            run.case = at or run.case
            raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr(gpu_steps, "step_rates", step)
        monkeypatch.setattr(gpu, "_broken", lambda device: True)
        monkeypatch.setattr(gpu.os, "execv", lambda program, arguments: None)
        assert run(tmp_path, "--only", "rates") == 1
        found = rows(tmp_path, "rates")
        assert [row["case"] for row in found] == ["a", *([at] if at else [])]
        assert found[0]["value"] == 1 and not found[0].get("error")

    def test_a_case_that_fails_is_a_row_with_its_error(self, tmp_path, monkeypatch, capsys):
        def step(run):
            for case in "ab":
                yield case, lambda case=case: [{"value": 1.0 / (case == "b")}]

        monkeypatch.setattr(gpu_steps, "step_rates", step)
        assert run(tmp_path, "--only", "rates") == 0
        found = rows(tmp_path, "rates")
        assert found[0]["error"].startswith("ZeroDivisionError") and found[1]["value"] == 1
        assert "complete, 1 cases failed" in capsys.readouterr().out
        monkeypatch.setattr(gpu, "STEPS", ("rates",))
        assert gpu.to_try({"rates": found})[0].startswith("rates: a failed: ZeroDivisionError")

    def test_nothing_is_lost_before_there_is_something_new(self, cases, tmp_path):
        assert run(tmp_path, "--only", "rates") == 0
        cases.fail = KeyboardInterrupt()
        original, gpu_steps.step_rates = gpu_steps.step_rates, lambda run: (_ for _ in ()).throw(KeyboardInterrupt())
        try:
            assert run(tmp_path, "--only", "rates", "--again") == 130
        finally:
            gpu_steps.step_rates = original
        assert len(rows(tmp_path, "rates")) == 4
        (tmp_path / "cpu" / "rates.csv").unlink()
        cases.fail = None
        assert run(tmp_path, "--only", "rates") == 0 and len(rows(tmp_path, "rates")) == 4, "a file that is gone"

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"rates": {}}', '{"rates": {"environment": {}}}'])
    def test_a_damaged_state_is_none(self, cases, text, tmp_path):
        (tmp_path / "cpu").mkdir()
        (tmp_path / "cpu" / "gpu.json").write_text(text)
        assert run(tmp_path, "--summary") == 0
        assert run(tmp_path, "--only", "rates") == 0

    def test_again_measures_all_again(self, cases, tmp_path):
        for _ in range(2):
            assert run(tmp_path, "--only", "rates", "--again") == 0
        assert cases.measured == list("abcdabcd")
        assert len(rows(tmp_path, "rates")) == 4

    def test_interrupted_it_writes(self, cases, tmp_path):
        cases.fail = KeyboardInterrupt()
        assert run(tmp_path, "--only", "rates") == 130
        assert [r["case"] for r in rows(tmp_path, "rates")] == ["a", "b"]

    def test_what_another_commit_began_is_measured_again(self, cases, tmp_path, monkeypatch):
        cases.spend = 1e9
        environment = gpu._environment
        for commit in ("one", "one", "other"):
            monkeypatch.setattr(gpu, "_environment", lambda *args, c=commit: environment(*args) | {"commit": c})
            run(tmp_path, "--only", "rates", "--minutes", "1e-6")
        assert cases.measured == ["a", "b", "a"]
        assert [r["case"] for r in rows(tmp_path, "rates")] == ["a"]

    def test_a_failure_keeps_what_was_measured_and_the_other_steps_run(self, cases, tmp_path, capsys, monkeypatch):
        """A step that fails between its cases."""
        cases.fail = RuntimeError("no such luck")
        monkeypatch.setattr(gpu, "STEPS", ("rates", "graph"))
        assert run(tmp_path, "--from", "rates") == 1
        printed = capsys.readouterr()
        assert "rates: failed, RuntimeError: no such luck" in printed.out and "graph: complete" in printed.out
        assert [r["case"] for r in rows(tmp_path, "rates")] == ["a", "b"]
        cases.fail = None
        assert run(tmp_path, "--only", "rates") == 0
        assert len(rows(tmp_path, "rates")) == 4

    def test_a_case_that_breaks_the_device_is_passed_over_in_a_new_process(self, cases, tmp_path, monkeypatch):
        cases.fail = RuntimeError("an illegal memory access was encountered")
        started = []

        def execv(program, arguments):
            started.extend(arguments[2:])
            raise SystemExit

        monkeypatch.setattr(gpu, "_broken", lambda device: True)
        monkeypatch.setattr(gpu.os, "execv", execv)
        with pytest.raises(SystemExit):
            run(tmp_path, "--from", "rates", "--again")
        assert started[-2:] == ["--from", "rates"] and "--again" not in started
        with pytest.raises(SystemExit):
            run(tmp_path, "--only=rates", "--again")
        assert started[-1] == "--only=rates", "and nothing that goes on with it for ever"
        cases.fail = None
        assert run(tmp_path, "--only", "rates") == 0
        found = rows(tmp_path, "rates")
        assert [r["case"] for r in found] == ["a", "b", "c", "d"]
        assert "illegal memory access" in found[2]["error"] and found[2]["value"] is None


class TestResume:
    TESTS = """
import pytest, time

@pytest.mark.parametrize("i", range(6))
def test_it(i):
    assert i != 3
    if i == 4:
        pytest.skip("not this one")
"""

    def pytest(self, folder, *more):
        (folder / "test_it.py").write_text(self.TESTS)
        plugins = [
            "-p",
            "benchmarks.gpu_tests",
            "-p",
            "no:cacheprovider",
            "-c",
            "pytest.ini",
            "--rootdir",
            str(folder),
        ]
        command = [sys.executable, "-m", "pytest", "-q", *plugins, "--outcomes", str(folder / "notes"), *more]
        (folder / "pytest.ini").write_text("[pytest]\n")
        ran = subprocess.run(
            [*command, "test_it.py"], cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        return ran.returncode, {o["test"].partition("::")[2]: o for o in gpu_tests.read(folder / "notes")}

    def test_goes_on_where_time_ran_out(self, tmp_path):
        code, found = self.pytest(tmp_path, "--seconds", "-1")
        assert code == gpu_tests.STOPPED and list(found) == ["test_it[0]"]
        code, found = self.pytest(tmp_path, "--seconds", "100")
        assert code == 1 and len(found) == 6
        outcomes = [found[f"test_it[{i}]"]["outcome"] for i in range(6)]
        assert outcomes == ["passed", "passed", "passed", "failed", "skipped", "passed"]
        assert "assert 3 != 3" in found["test_it[3]"]["reason"] and "not this one" in found["test_it[4]"]["reason"]
        assert self.pytest(tmp_path, "--seconds", "100")[0] == 5, "nothing is left"

    def test_shards_are_all_tests_once(self, tmp_path):
        assert len(self.pytest(tmp_path, "--seconds", "100", "--shard", "0/2")[1]) == 3
        assert len(self.pytest(tmp_path, "--seconds", "100", "--shard", "1/2")[1]) == 6

    def test_a_test_that_ended_its_process_is_noted_and_not_repeated(self, tmp_path):
        (tmp_path / "notes").write_text('{"test": "test_it.py::test_it[0]", "outcome": "did not end"}\n{"test": "cut')
        code, found = self.pytest(tmp_path, "--seconds", "100")
        assert code == 1 and found["test_it[0]"]["outcome"] == "did not end" and len(found) == 6


def test_correctness_counts_a_hanging_test_against_the_budget(tmp_path, monkeypatch):
    class Hanging:
        killed = False

        def __init__(self, command, **kwargs):
            pass

        def communicate(self, timeout=None):
            if timeout is not None:
                raise subprocess.TimeoutExpired("pytest", timeout)
            return "", None

        def kill(self):
            Hanging.killed = True

    monkeypatch.setattr(gpu_tests, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Hanging}))
    assert run(tmp_path, "--only", "correctness") == 1
    assert Hanging.killed and json.loads((tmp_path / "cpu" / "gpu.json").read_text())["correctness"]["error"] is None


def test_tests_of_a_step_that_is_measured_again_run_again(tmp_path, monkeypatch):
    notes = tmp_path / "cpu" / "smoke-0.jsonl"
    notes.parent.mkdir()
    notes.write_text('{"test": "a", "outcome": "failed", "seconds": 1.0, "reason": "then"}\n')
    ends = iter([(0, ""), (3, "internal error")])
    monkeypatch.setattr(gpu_tests, "_pytest", lambda *args: next(ends))
    state = {
        "complete": False,
        "error": None,
        "seconds": 1.0,
        "environment": gpu._environment(torch.device("cpu"), ARGS),
    }
    gpu.write_state(tmp_path / "cpu", {"smoke": state})
    assert run(tmp_path, "--only", "smoke") == 0
    assert rows(tmp_path, "smoke") == [{"case": "a", "outcome": "failed", "seconds": 1, "reason": "then"}]
    assert run(tmp_path, "--only", "smoke", "--again") == 1, "pytest could not run"
    assert not notes.exists()
    assert [row["reason"] for row in rows(tmp_path, "smoke")] == ["then"], "until there is something in its place"


class TestGoals:
    def results(self, **seconds):
        """A sweep in which every layer takes these seconds, by base and provider."""
        found = {}
        for name, (N, K) in SHAPES["llama-3-8b"].linears().items():
            found.setdefault((N, K), []).append(name)
        sweep = [
            {"base": base, "provider": provider, "M": 8192, "r": 16, "mode": "step", "count": len(names), "p50": each}
            for (base, provider), each in seconds.pop("sweep").items()
            for names in found.values()
        ]
        return {"sweep": sweep, **seconds}

    def of(self, **results):
        return {goal.text: (goal.got, goal.met) for goal in goals(self.results(**results))}

    def test_met_and_missed(self):
        sweep = {
            ("bf16", "frozen"): 1.0, ("bf16", "peft"): 1.4, ("bf16", "addmm"): 1.1, ("bf16", "fastlora"): 1.05,
            ("nf4", "frozen"): 1.3, ("nf4", "peft"): 2.0, ("nf4", "fastlora"): 1.4,
        }  # fmt: skip
        found = self.of(sweep=sweep)
        assert found["bf16: faster than eager PEFT"] == (pytest.approx(1.4 / 1.05), True)
        assert found["bf16: faster than the addmm style"] == (pytest.approx(1.1 / 1.05), False)
        assert found["bf16: time over the frozen layers"] == (pytest.approx(1.05), True)
        assert found["NF4: faster than PEFT + bitsandbytes"] == (pytest.approx(2 / 1.4), True)
        assert found["NF4: time over PEFT's bf16 LoRA"] == (pytest.approx(1.0), True)
        assert found["decode: share of copy bandwidth"] == (None, None)
        text = "\n".join(goal_lines(goals(self.results(sweep=sweep))))
        assert "<= 1.10   1.05  met" in text and ">= 1.12   1.05  MISSED" in text and "not measured" in text

    def test_a_whole_model(self):
        known = {"model": "llama-2-7b", "tokens": 2048, "dropout": 0, "how": None}
        seconds = {("bf16", "frozen"): 2.0, ("bf16", "peft"): 3.0, ("bf16", "fastlora"): 2.1, ("nf4", "fastlora"): 3.3}
        compare = [known | {"base": base, "provider": name, "p50": p50} for (base, name), p50 in seconds.items()]
        compare += [row | {"how": "checkpointed", "p50": 9.0} for row in compare] + [{"case": "a", "error": "b"}]
        found = self.of(sweep={}, compare=compare)
        assert found["Llama-2-7B, bf16: time over the frozen model"] == (pytest.approx(1.05), True)
        assert found["Llama-2-7B, NF4: time over PEFT's bf16 LoRA"] == (pytest.approx(1.1), False)

    def test_they_are_in_the_report(self, tmp_path):
        sweep = {("bf16", "frozen"): 1.0, ("bf16", "peft"): 1.456, ("bf16", "addmm"): 1.2, ("bf16", "fastlora"): 1.12}
        records.write_rows(tmp_path / "sweep.csv", self.results(sweep=sweep)["sweep"])
        names = {"frozen": 1.0, "peft": 1.5, "fastlora": 1.2, "peft+compile": 1.3, "fastlora+compile": 1.0}
        peaks = {name: {"p50": p50, "peak_bytes": int(4e9 * p50)} for name, p50 in names.items()}
        compare = [{"case": "blocks", "provider": name, **found} for name, found in peaks.items()]
        records.write_rows(tmp_path / "compare.csv", compare)
        environment = gpu._environment(torch.device("cpu"), ARGS) | {"tiny": False}
        gpu.write_state(
            tmp_path, {"sweep": {"complete": True, "error": None, "seconds": 1.0, "environment": environment}}
        )
        text = "\n".join(report.gpu_section(tmp_path, tmp_path.parent))
        assert "| bf16: faster than eager PEFT | ≥ 1.25 | 1.30 | met |" in text
        assert "| bf16: time over the frozen layers | ≤ 1.10 | 1.12 | missed |" in text
        assert "| bf16 | 8192 | 16 | 7,000.00 | 10,192.00 | 8,400.00 | 7,840.00 | 1.30 | 1.12 |" in text
        assert "| blocks | time | 1,000.00 | 1,500.00 | 1,200.00 | 1.25 | 1.20 |" in text
        assert "| blocks | peak | 4.00 | 6.00 | 4.80 | 1.25 | 1.20 |" in text
        assert "| blocks, both compiled | time | 1,000.00 | 1,300.00 | 1,000.00 | 1.30 | 1.00 |" in text
        gpu.write_state(
            tmp_path, {"sweep": {"complete": True, "error": None, "environment": environment | {"tiny": True}}}
        )
        assert not list(report.gpu_section(tmp_path, tmp_path.parent))

    def test_what_to_try_next(self):
        row = {"case": "q", "mode": "step", "predicted": 1.0}
        sweep = [row | {"provider": "fastlora", "p50": 1.5}, row | {"provider": "fastlora tail one_pass", "p50": 1.2}]
        tests = [{"case": "test_it", "outcome": "failed", "reason": "1 != 2"}, {"case": "test", "outcome": "passed"}]
        assert gpu.to_try({"sweep": sweep, "smoke": tests}) == [
            "smoke: test_it failed: 1 != 2",
            "plan: q: fastlora tail one_pass takes 0.80 of what was chosen",
            "model: q: takes 1.50 times what was predicted",
        ]

    def test_part_of_a_block_is_not_measured(self):
        results = self.results(sweep={("bf16", "peft"): 2.0, ("bf16", "fastlora"): 1.0})
        results["sweep"] = results["sweep"][1:]
        assert all(goal.met is None for goal in goals(results))

    def test_bandwidth_is_of_the_seven_weights_together(self):
        copied = {"decode": [(6, 1e6, 1e-6), (1, 4e6, 2e-6)], "nf4_matmul M=1": [(7, 1e6, 1e-6)]}
        decode = [
            {"provider": "fastlora", "mode": mode, "count": count, "p50": p50, "roofline": moved / 2e12 / p50}
            for mode, weights in copied.items()
            for count, moved, p50 in weights
        ]
        decode += [{"provider": "fastlora", "mode": "nf4_matmul M=16", "count": 7, "p50": None, "roofline": None}]
        decode += [{**decode[0], "provider": "bitsandbytes"}]
        found = self.of(sweep={}, decode=decode)
        assert found["decode: share of copy bandwidth"] == (pytest.approx(10e6 / 8e-6 / 2e12), False)
        assert found["NF4, 1 token: share of copy bandwidth"] == (pytest.approx(0.5), False)
        assert found["NF4, 16 tokens: share of copy bandwidth"] == (None, None)

    def test_tests_that_fail_or_hang_count(self):
        outcomes = [{"outcome": o} for o in ("passed", "passed", "failed", "did not end")]
        assert self.of(sweep={}, correctness=outcomes)["tests on the device that pass"] == (0.5, False)

    def test_checks_of_graphs_that_fail_count(self):
        graph = [{"outcome": o} for o in (True, False, None)]
        assert self.of(sweep={}, graph=graph)["checks of CUDA graphs that hold"] == (0.5, False)

    @pytest.mark.slow
    def test_tiny_sizes_meet_no_goal(self, tmp_path, capsys):
        assert run(tmp_path, "--only", "decode") == 0
        assert run(tmp_path, "--summary") == 0
        printed = capsys.readouterr().out
        assert "no measurement" in printed and "met" not in printed.replace("no measurement", "")


def test_unusable_arguments(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "needs a GPU that torch sees" in capsys.readouterr().err
    for arguments in (["--device", "cpu"], ["--only", "everything"]):
        with pytest.raises(SystemExit) as stop:
            gpu.main([*arguments, "--out", str(tmp_path)])
        assert stop.value.code == 2
    assert not list(tmp_path.iterdir())


def test_runs_from_anywhere_without_being_installed(tmp_path):
    """And without what a machine with a GPU need not have."""
    script = ROOT / "benchmarks" / "gpu.py"
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys(("rich", "matplotlib", "hypothesis", "peft", "bitsandbytes"), None))
sys.argv[1:] = ["--device", "cpu", "--tiny", "--out", {str(tmp_path)!r}, "--only", "environment"]
runpy.run_path({str(script)!r}, run_name="__main__")
"""
    ran = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "a kernel runs and is right,True" in (tmp_path / "cpu" / "environment.csv").read_text()
