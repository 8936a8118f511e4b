"""The protocol of the benchmarks on synthetic clocks, and who is refused a timing."""

import itertools
import sys
from dataclasses import replace
from statistics import median
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from fastlora.benchmarks import accuracy, decode, pictures, protocol, providers, records, roofline
from fastlora.benchmarks.cases import modules
from fastlora.benchmarks.cases.modules import Case
from fastlora.benchmarks.protocol import Way
from fastlora.costs import H100

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("bitsandbytes_eager")]
CPU = torch.device("cpu")
LINEAR = modules.linear_cases("tiny", M=16, r=4, base="bf16")[0]
BLOCK = Case("block", "tiny", "block", M=16, r=4, base="bf16")


class Machine:
    """A clock that is told how long a call takes, on a machine that slows down, has slow phases and is interrupted."""

    def __init__(self, seconds):
        self.seconds, self.now = seconds, 0
        self.random = torch.Generator().manual_seed(0)

    def chance(self):
        return torch.rand((), generator=self.random).item()

    def __call__(self, way):
        calls = []
        for _ in range(5):
            self.now += 1
            phase = 2.0 if (self.now // 120) % 2 else 1.0
            interruption = 10.0 if self.chance() < 0.05 else 1.0
            slower = phase * interruption * (1 + 0.1 * self.chance()) * (1 + self.now / 300)
            calls.append(self.seconds[way.call] * slower)
        return calls


class TestMethod:
    def ways(self, **seconds):
        calls = {name: (lambda _, n=name: n) for name in seconds}
        clock = Machine({calls[name]: value for name, value in seconds.items()})
        return {name: Way(call) for name, call in calls.items()}, clock

    def test_against_itself_it_is_one(self):
        ways, clock = self.ways(a=1e-3, b=1e-3, c=1e-3)
        turns = protocol.interleave(ways, clock, 21)
        # A call varies by up to a tenth, of which the median over 21 rounds leaves about a hundredth.
        assert protocol.ratio(turns["a"], turns["b"]) == pytest.approx(1, abs=0.03)
        assert protocol.ratio(turns["c"], turns["a"]) == pytest.approx(1, abs=0.03)

    def test_what_is_slower_is_found_to_be(self):
        ways, clock = self.ways(a=1e-3, b=1.2e-3)
        turns = protocol.interleave(ways, clock, 21)
        # As above, times 1.2.
        assert protocol.ratio(turns["b"], turns["a"]) == pytest.approx(1.2, abs=0.04)

    def test_one_after_the_other_would_not_do(self):
        ways, clock = self.ways(a=1e-3, b=1e-3)
        a, b = ([clock(ways[name]) for _ in range(21)] for name in "ab")
        assert protocol.ratio(b, a) > 1.2, "this machine is one that interleaving is needed on"

    def test_turns_rotate(self):
        order = []
        ways = {name: Way.of(lambda: None) for name in "abc"}
        names = {way: name for name, way in ways.items()}
        protocol.interleave(ways, lambda way: order.append(names[way]) or [1.0], 4)
        assert "".join(order) == "abcbcacababc"

    def test_quantiles_are_of_all_calls(self):
        found = protocol.quantiles([[1.0, 2.0], [3.0, 4.0, 5.0]])
        assert found == pytest.approx({"p20": 1.8, "p50": 3.0, "p80": 4.2})

    def test_what_is_prepared_is_not_timed(self, monkeypatch):
        now = itertools.count()
        monkeypatch.setattr(protocol, "timer", lambda: float(next(now)))
        monkeypatch.setattr(protocol, "TURN", 0)
        way = Way(lambda state: state.append("called"), lambda: [next(now) for _ in range(100)])
        assert protocol.cpu_clock(way) == [1.0]

    def test_a_turn_fills_its_time(self, monkeypatch):
        times = itertools.count(step=protocol.TURN / 4)
        monkeypatch.setattr(protocol.time, "monotonic", lambda: next(times))
        assert len(protocol.cpu_clock(Way.of(lambda: None))) == 4

    def test_clock_of_a_gpu(self, monkeypatch):
        events = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                events.append("event")

            def elapsed_time(self, end):
                return 3.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        active = SimpleNamespace(
            get_empty_cache_for_benchmark=lambda: None, clear_cache=lambda cache: events.append("flush")
        )
        monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=active))
        monkeypatch.setattr("triton.testing.do_bench", lambda call, **how: [call() and 2.0])
        assert protocol.gpu_clock(Way.of(lambda: True)) == [2e-3]
        way = Way(lambda state: events.append("call"), lambda: events.append("prepare"))
        assert protocol.gpu_clock(way) == [3e-3] * 10
        assert events[:5] == ["prepare", "flush", "event", "call", "event"]


def run(case, names, modes=("step",)):
    chosen = [providers.PROVIDERS[name] for name in names]
    return list(protocol.run(case, chosen, CPU, H100, rounds=1, modes=modes))[-1][1]


def errors(rows):
    return {row["provider"]: row["error"] for row in rows}


class TestProviders:
    @pytest.fixture(autouse=True)
    def not_installed(self, monkeypatch):
        for package in ("torchtune", "unsloth", "liger_kernel"):
            monkeypatch.setitem(sys.modules, package, None)

    def install(self, monkeypatch, name, **attributes):
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        for key, value in attributes.items():
            setattr(sys.modules[name], key, value)

    @pytest.mark.one_case_in(3)
    @pytest.mark.parametrize("case", [LINEAR, BLOCK], ids=str)
    @pytest.mark.parametrize("base", ["bf16", "fp32", "nf4", "fp4"])
    def test_everyone_is_exact_and_timed(self, case, base):
        names = [name for name in providers.PROVIDERS if not name.endswith("+compile")]
        rows = run(replace(case, base=base), names, protocol.MODES)
        found = errors(rows)
        assert list(dict.fromkeys(row["provider"] for row in rows if row["error"])) + [
            name for name in names if found[name] is None
        ] == sorted(names, key=lambda name: found[name] is None), "nobody is dropped silently"
        four_bit = base in ("nf4", "fp4")
        refused = {"unsloth", "liger", "torchtune"} | ({"bitsandbytes"} if not four_bit else set())
        assert {name for name in names if found[name]} == refused
        assert found["unsloth"].startswith("missing: ") and found["liger"].startswith("missing: ")
        assert found["torchtune"].startswith("not applicable: " if four_bit else "missing: ")
        for row in (row for row in rows if row["error"] is None):
            assert 0 < row["p20"] <= row["p50"] <= row["p80"] and row["speedup"] > 0 and row["of_limit"] > 0
            assert row["tflops"] > 0 and row["gbytes"] > 0 and row["launches"] > 0 and row["peak_bytes"] > 0

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_dropout(self, checkpointing):
        case = replace(BLOCK, dropout=0.25, checkpointing=checkpointing)
        rows = run(case, ("frozen", "peft", "addmm", "fastlora"))
        expected = dict.fromkeys(("frozen", "peft", "fastlora")) | {"addmm": "not applicable: has no dropout"}
        assert errors(rows) == expected
        saved = {row["provider"]: row["saved_bytes"] for row in rows}
        if checkpointing:
            assert saved["peft"] == saved["fastlora"] == saved["frozen"]
        else:
            assert saved["fastlora"] < saved["peft"]

    def test_a_model(self):
        rows = run(Case("model", "tiny", "model", M=16, r=4, base="bf16"), ("frozen", "peft", "fastlora"))
        assert errors(rows) == {"frozen": None, "peft": None, "fastlora": None}

    @pytest.mark.slow
    def test_compiled(self):
        rows = run(LINEAR, ("peft", "peft+compile", "fastlora+compile"))
        assert errors(rows) == {"peft": None, "peft+compile": None, "fastlora+compile": None}

    def test_torchtune(self, monkeypatch):
        class LoRALinear(nn.Module):
            """The documented interface."""

            def __init__(self, in_dim, out_dim, rank, alpha, dropout=0.0, use_bias=False):
                super().__init__()
                self.weight = nn.Parameter(torch.empty(out_dim, in_dim), requires_grad=False)
                self.lora_a, self.lora_b = nn.Linear(in_dim, rank, bias=False), nn.Linear(rank, out_dim, bias=False)
                self.scaling = alpha / rank

            def forward(self, x):
                return nn.functional.linear(x, self.weight) + self.scaling * self.lora_b(self.lora_a(x))

        self.install(monkeypatch, "torchtune.modules.peft", LoRALinear=LoRALinear)
        assert errors(run(BLOCK, ("peft", "torchtune"))) == {"peft": None, "torchtune": None}

    def test_liger(self, monkeypatch):
        swiglu = {"liger_swiglu": lambda a, b: nn.functional.silu(a) * b}
        self.install(monkeypatch, "liger_kernel.transformers.functional", **swiglu)
        assert errors(run(BLOCK, ("peft", "liger"))) == {"peft": None, "liger": None}
        assert errors(run(LINEAR, ("peft", "liger")))["liger"].startswith("not applicable: has no adapted linear")

    def test_unsloth(self, monkeypatch):
        def layer_of(layer, x):
            s, a, b = layer.scaling["default"], layer.lora_A["default"], layer.lora_B["default"]
            return layer.base_layer(x) + (s * b(a(x.float()))).to(x.dtype)

        def mlp(self, x):
            h = nn.functional.silu(layer_of(self.gate_proj, x)) * layer_of(self.up_proj, x)
            return layer_of(self.down_proj, h)

        functions = {"apply_lora_o": lambda owner, x: layer_of(owner.o_proj, x), "apply_lora_mlp_swiglu": mlp}
        self.install(monkeypatch, "unsloth.kernels.fast_lora", **functions)
        for case in (LINEAR, BLOCK):
            assert errors(run(case, ("peft", "unsloth"))) == {"peft": None, "unsloth": None}


class TestWrong:
    """Each a provider that is refused, however fast it is."""

    def judge(self, wrong):
        subject = modules.make_subject(LINEAR, CPU)
        provider = replace(providers.PROVIDERS["fastlora"], make=wrong)
        return protocol.Gate(subject).judge(provider, provider.build(subject))[1]

    def forward(self, change):
        def wrong(module, case):
            right = module.layer.forward
            module.layer.forward = lambda x: change(right(x))
            return module

        return wrong

    def test_it_has_a_row_without_times(self, monkeypatch):
        provider = replace(providers.PROVIDERS["fastlora"], make=self.forward(lambda y: 1.02 * y))
        monkeypatch.setitem(providers.PROVIDERS, "fastlora", provider)
        rows = run(LINEAR, ("peft", "fastlora"))
        assert "wrong: error of y" in errors(rows)["fastlora"] and errors(rows)["peft"] is None
        assert [row["p50"] is None for row in rows] == [row["provider"] == "fastlora" for row in rows]

    def test_one_gradient(self):
        def wrong(module, case):
            module.layer.lora_B["default"].weight.register_hook(lambda grad: 1.02 * grad)
            return module

        assert self.judge(wrong).startswith("wrong: error of layer.lora_B")

    def test_without_its_adapter(self):
        def wrong(module, case):
            base, a, b = module.layer.base_layer, module.layer.lora_A["default"], module.layer.lora_B["default"]
            module.layer.forward = lambda x: base(x) + 0 * (a.weight.sum() + b.weight.sum()).to(x.dtype)
            return module

        assert "wrong: error of y" in self.judge(wrong)

    def test_many_layers_may_not_all_be_a_little_worse_nor_one_much(self):
        names = ["y", *(f"{i}.lora_A" for i in range(20))]
        bars, floors = dict.fromkeys(names, 1e-2), dict.fromkeys(names, 4e-3)

        def reason(*errors):
            return accuracy.judge(dict(zip(names, errors, strict=True)), bars, floors, protocol._kind)

        assert reason(*[1.8e-2] * 21) is None, "1.5 times the baseline's, and the floor"
        assert reason(1e-2, *[1e-2] * 19, 2.5e-2) is None, "one of many, by chance"
        assert "error of 19.lora_A" in reason(1e-2, *[1e-2] * 19, 5e-2)
        assert "error of lora_A" in reason(1e-2, *[2.2e-2] * 20)
        assert "error of y" in reason(2.2e-2, *[1e-2] * 20)
        assert "error of y nan" in reason(float("nan"), *[1e-2] * 20)

    @pytest.mark.parametrize("again", [False, True])
    def test_one_gradient_of_many_is_judged_with_other_inputs(self, again):
        """What is too far off once is chance; what is again is wrong."""
        subject = modules.make_subject(Case("model", "tiny", "model", M=16, r=4, base="bf16"), CPU)
        gate, provider = protocol.Gate(subject), providers.PROVIDERS["peft"]
        module = provider.build(subject)
        name, weight = next((n, p) for n, p in module.named_parameters() if "1.self_attn.v_proj.lora_A" in n)
        floor = accuracy.floor(subject.case.dtype, *subject.case.terms_and_elements)
        noise = iter([3.2 * gate.bar[name] + floor, *[20 * gate.bar[name] * again] * 2])

        def spoil(grad):
            added = torch.randn_like(grad)
            return grad + next(noise) * grad.norm() / added.norm() * added

        weight.register_hook(spoil)
        reason = gate.judge(provider, module)[1]
        assert reason.startswith(f"wrong: error of {name}") if again else reason is None
        assert len(list(noise)) == again, "one with other inputs is enough to be wrong, both are needed to be right"

    def test_shape(self):
        subject = modules.make_subject(LINEAR, CPU)
        gate, module = protocol.Gate(subject), subject.adapted
        gate.exact = {True: gate.exact[True] | {"y": gate.exact[True]["y"][:-1]}}
        assert gate.judge(providers.PROVIDERS["peft"], module)[1].startswith("wrong: shapes")

    def test_one_that_fails_is_listed_with_its_reason(self, monkeypatch):
        provider = replace(providers.PROVIDERS["fastlora"], make=self.forward(lambda y: y[:-1]))
        monkeypatch.setitem(providers.PROVIDERS, "fastlora", provider)
        found = errors(run(LINEAR, ("peft", "fastlora")))
        assert found["fastlora"].startswith("failed: RuntimeError: ") and found["peft"] is None

    def test_what_nobody_wrote(self):
        def unwritten(y):
            y.data[3:4] = torch.empty_like(y.data[3:4])
            return y

        assert "wrong: error of y nan" in self.judge(self.forward(unwritten))


class TestNumbers:
    def test_least_is_that_of_the_layer(self):
        case = Case("linear", "tiny", "q", M=64, r=8, base="bf16", N=128, K=32)
        flops, moved, seconds = roofline.least(case, "step", True, H100)
        assert flops == 2 * 64 * (2 * 128 * 32 + 3 * 8 * (128 + 32))
        assert moved == 2 * (64 * (32 + 128) + 64 * (2 * 32 + 128) + 2 * 128 * 32)
        assert seconds == pytest.approx(moved / H100.copy)
        modes = [roofline.least(case, mode, True, H100)[0] for mode in ("forward", "backward")]
        assert flops == sum(modes)
        assert roofline.least(case, "step", False, H100)[0] == 2 * 64 * 2 * 128 * 32, "frozen: no adapter"
        packed = roofline.least(replace(case, base="nf4"), "forward", False, H100)[1]
        assert packed < roofline.least(case, "forward", False, H100)[1]

    def test_a_block_is_its_seven_layers(self):
        layers = modules.linear_cases("tiny", M=16, r=4, base="bf16")
        parts = sum(case.count * roofline.least(case, "step", True, H100)[0] for case in layers)
        assert roofline.least(BLOCK, "step", True, H100)[0] == parts
        assert sum(case.count for case in layers) == 7

    def test_a_row_follows_from_its_turns(self):
        turns = {("peft", "step"): [[4.0], [6.0]], ("frozen", "step"): [[1.0], [2.0]], ("x", "step"): [[2.0], [2.0]]}
        found = protocol.derived(LINEAR, "step", "x", turns, H100)
        assert found["speedup"] == median([2.0, 3.0]) and found["of_limit"] == median([2.0, 1.0])
        flops, moved, floor = roofline.least(LINEAR, "step", True, H100)
        assert (found["p50"], found["calls"]) == (2.0, 2)
        assert found["tflops"] == flops / 2 / 1e12 and found["gbytes"] == moved / 2 / 1e9
        assert found["roofline"] == floor / 2

    def test_truth_is_of_the_quantised_weights(self):
        subject = modules.make_subject(replace(LINEAR, base="nf4"), CPU)
        exact, theirs = modules.truth(subject, True), subject.results(subject.adapted)
        assert exact.keys() == theirs.keys()
        bf16 = 4 * torch.finfo(torch.bfloat16).eps  # the roundings of PEFT's layer
        assert all(accuracy.relative_error(theirs[name], exact[name]) < bf16 for name in exact)
        assert all(t.dtype == torch.float32 for t in exact.values())

    def test_pictures_add_up_the_layers_of_a_block(self):
        def row(provider, count, p50):
            measured = {"p50": p50, "roofline": 0.5, "saved_bytes": 10, "peak_bytes": 20}
            return LINEAR.row() | {"provider": provider, "count": count, "mode": "step"} | measured

        rows = [row("peft", 2, 1.0), row("peft", 5, 2.0), row("fastlora", 2, 1.0)]
        (found,) = pictures.totals(rows, "step").values()
        assert found == {"peft": {"layers": 7, "p50": 12.0, "saved_bytes": 70, "peak_bytes": 140, "floor": 6.0}}


class TestDecode:
    CASE = replace(modules.linear_cases("tiny", M=0, r=4, base="nf4")[0], verb="decode")

    def test_everyone_is_exact(self):
        rows = decode.run(self.CASE, decode.candidates(self.CASE, decode.operands(self.CASE, CPU)), CPU, H100, 1)
        found = [(row["provider"], row["mode"]) for row in rows]
        both = [(provider, mode) for provider in ("fastlora", "bitsandbytes") for mode in decode.MODES]
        assert found == [("copy", "copy"), *both]
        assert all(row["error"] is None and row["gbytes"] > 0 for row in rows)

    def test_a_wrong_one_is_refused(self):
        found = list(decode.candidates(self.CASE, decode.operands(self.CASE, CPU)))
        right = found[0].call
        found[0] = replace(found[0], call=lambda: right() * 1.02)
        rows = decode.run(self.CASE, found, CPU, H100, 1)
        assert "wrong: error of result 0" in rows[1]["error"] and rows[1]["p50"] is None
        assert rows[2]["error"] is None


def test_rows_come_back_as_they_were(tmp_path):
    rows = [{"name": "a, b", "x": 0.125, "n": 3, "yes": True, "none": None}]
    records.write_rows(tmp_path / "rows.csv", rows)
    assert records.read_rows(tmp_path / "rows.csv") == rows
    assert records.read_rows(tmp_path / "none.csv") == []
    assert records.to_json({"a": [float("nan"), 1.5]}).split() == ["{", '"a":', "[", "null,", "1.5", "]", "}"]
