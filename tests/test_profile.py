"""`fastlora profile`: where a step's time goes, and how long a sequence fits."""

import csv
import gzip
import json

import peft
import pytest
import torch
import transformers
from matplotlib.image import imread
from test_cli import adapts_experts, save_model
from torch.autograd import Function

import fastlora
from fastlora import ops
from fastlora.benchmarks import timeline, training
from fastlora.benchmarks.cases import models
from fastlora.benchmarks.commands import length
from fastlora.benchmarks.commands.profile import PICTURES, time_record
from fastlora.benchmarks.timeline import (
    ADAPTER,
    ATTENTION,
    BASE,
    CATEGORIES,
    DECODE,
    ELEMENTWISE,
    GAPS,
    LOSS,
    OPTIMIZER,
    Timeline,
)
from fastlora.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("frozen", "peft", "fastlora")
SIZES = ("--tokens", "32", "--r", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny", 256)


def trainers_of(base="fp32", dropout=0.0, checkpointing=False, **sizes):
    """The rank is the width of k and v, and all of them have the sizes of the vocabulary: shapes say nothing here."""
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    config = transformers.LlamaConfig(**{**shape, **sizes})
    model = models.to_base(transformers.LlamaForCausalLM(config), base)
    trainers = training.make_trainers(model, 64, dropout, checkpointing, False, 1e-4, 0)
    for trainer in trainers:
        trainer.model.enable_input_require_grads()  # so that all of them compute the same gradients of activations
    return trainers


def recorded(trainer):
    ids = torch.randint(0, 64, (2, 32))
    trainer.step(ids)
    line, trace = timeline.record(trainer.model, lambda: trainer.forward(ids), trainer.optimizer)
    return line, trace


@pytest.mark.parametrize(
    ("base", "dropout", "checkpointing"), [("bf16", 0.0, False), ("nf4", 0.0, False), ("nf4", 0.1, True)], ids=str
)
def test_every_moment_is_in_one_category(base, dropout, checkpointing):
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    for trainer in trainers_of(base, dropout, checkpointing):
        line, trace = recorded(trainer)
        (step,) = (event for event in trace["traceEvents"] if event.get("name") == "training step")
        assert line.wall == pytest.approx(1000 * step["dur"], abs=1)
        assert sum(line.by_category().values()) == sum(line.by_phase().values()) == line.wall
        spent = line.by_category()
        adapted = trainer.name != "frozen"
        assert (spent[ADAPTER] > 0) == (spent[OPTIMIZER] > 0) == adapted
        # a CPU's kernel of fastlora decodes inside its products, which are the base's
        inside = trainer.name == "fastlora" and ops.NO_CPU_KERNELS is None
        assert (spent[DECODE] > 0) == (base == "nf4" and not inside)
        assert all(spent[name] > 0 for name in (BASE, ATTENTION, ELEMENTWISE, LOSS, GAPS))
        for kind, called in line.ops.items():
            assert sum(spent_on for _, spent_on in called.values()) == spent[kind]
        assert line.spent["forward"][BASE] > 0 and line.spent["backward"][BASE] > 0
        assert (line.spent["backward"][ADAPTER] > 0) == adapted and line.spent["forward"][OPTIMIZER] == 0


def counted(trainer):
    """How many ops of each name are in each category of one step."""
    line, _ = recorded(trainer)
    return {(name, kind): times for kind, ops in line.ops.items() for name, (times, _) in ops.items()}


def products(count):
    """Matrix products by category."""
    found = dict.fromkeys((BASE, ADAPTER, LOSS), 0)
    for (name, kind), times in count.items():
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            found[kind] += times
    return found


def test_products_are_told_apart_by_where_they_are_called():
    """Seven layers in two blocks: an adapter has two products forward and four backward."""
    frozen, theirs, ours = map(counted, trainers_of())
    assert products(frozen) == {BASE: 2 * 7 * 2, LOSS: 2, ADAPTER: 0}
    assert products(theirs) == {BASE: 2 * 7 * 2, LOSS: 2, ADAPTER: 2 * 7 * 6}
    assert products(ours) == {BASE: 0, LOSS: 2, ADAPTER: 0}
    assert {key for key in ours if key[0].startswith("fastlora::lora_matmul")} == {
        ("fastlora::lora_matmul", BASE),
        ("fastlora::lora_matmul_group", BASE),
    }
    assert ours["fastlora::lora_grad", ADAPTER] == 2 * 7


def test_what_an_adapted_layer_does_besides_its_base_is_the_adapter():
    """PEFT scales the adapter's part and sums the two, forward and backward; the model's own sums are elementwise."""
    frozen, theirs, _ = map(counted, trainers_of())
    assert theirs["aten::mul", ADAPTER] == 2 * 7 * 2
    assert theirs["aten::mul", ELEMENTWISE] == frozen["aten::mul", ELEMENTWISE]
    assert ("aten::mul", ADAPTER) not in frozen

    def sums(count, kind):
        return count.get(("aten::add", kind), 0) + count.get(("aten::add_", kind), 0)

    assert sums(theirs, ELEMENTWISE) == sums(frozen, ELEMENTWISE)
    assert sums(theirs, ADAPTER) == 2 * 7 * 2, "of the two outputs, and of the two gradients of x"


def test_known_ops():
    frozen, theirs, ours = map(counted, trainers_of())
    for count in (frozen, theirs, ours):
        assert count["aten::_log_softmax", LOSS] == 1 and count["aten::nll_loss_backward", LOSS] == 1
        assert count["aten::embedding", ELEMENTWISE] == 1
        assert sum(n for (name, kind), n in count.items() if "attention" in name and kind == ATTENTION) == 4
        assert not any(name in ("aten::linear", "aten::view", "aten::empty") for name, _ in count)
    assert ours["fastlora::swiglu", ELEMENTWISE] == 2
    assert theirs["aten::_fused_adamw_", OPTIMIZER] == ours["aten::_fused_adamw_", OPTIMIZER] == 1


@adapts_experts
def test_experts():
    """PEFT adds the adapters of all experts to the weights: that is no part of the experts' own products."""
    fields = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    experts = dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**fields, **experts)).requires_grad_(False)
    trainers = training.make_trainers(model, 4, 0.0, False, False, 1e-4, 0)
    assert trainers[2].model.base_model.model.model.layers[0].mlp.experts.__class__.__module__.startswith("fastlora")
    frozen, theirs, ours = map(counted, trainers)
    products = {
        name: count.get(("aten::_grouped_mm", BASE), 0)
        for name, count in zip(NAMES, (frozen, theirs, ours), strict=True)
    }
    assert products["frozen"] > 0 and products["peft"] > products["frozen"] and products["fastlora"] == 0
    assert ("aten::_grouped_mm", ADAPTER) not in theirs
    assert theirs["aten::baddbmm", ADAPTER] > 0
    assert not any(name.startswith("aten::b") and name.endswith("bmm") for name, kind in theirs if kind == ATTENTION)
    assert ours["fastlora::lora_matmul_experts", BASE] > 0 and ours["fastlora::shrink_experts", ADAPTER] > 0


def test_every_function_of_fastlora_has_a_meaning():
    """By its name, which a trace has: inside of it, and of its backward, products are the base's."""
    found = {
        name
        for function in Function.__subclasses__()
        if function.__module__.startswith("fastlora.") and "benchmarks" not in function.__module__
        for name in (function.__name__, function.__name__ + "Backward")
    }
    assert {"FusedLinear", "FusedMLPBackward", "FusedExperts"} <= found <= timeline._FUNCTIONS.keys()


def event(name, start, end, kind="cpu_op", thread=1, **args):
    return {"ph": "X", "name": name, "cat": kind, "tid": thread, "ts": start, "dur": end - start, "args": args}


def trace_of_a_gpu():
    """A step of 100 µs: the device works behind the host, on two streams, with backward on another thread."""
    note, launch, kernel = "user_annotation", "cuda_runtime", "kernel"
    return {
        "traceEvents": [
            event("training step", 0, 100, note),
            event("phase: forward", 0, 40, note),
            event("phase: backward", 40, 80, note),
            event("phase: optimizer", 80, 100, note),
            event("layer", 1, 20, note),
            event("aten::mul", 2, 6, **{"Sequence number": 7}),
            event("cudaLaunchKernel", 3, 4, launch, correlation=1),
            event("layer.base_layer", 8, 18, note),
            event("aten::linear", 8, 18),
            event("aten::mm", 9, 17, **{"Sequence number": 8}),
            event("cudaLaunchKernel", 10, 11, launch, correlation=2),
            event("autograd::engine::evaluate_function: MulBackward0", 45, 60, thread=2, **{"Sequence number": 7}),
            event("aten::mul", 46, 58, thread=2),
            event("cuLaunchKernelEx", 47, 48, "cuda_driver", thread=2, correlation=3),
            event("aten::_fused_adamw_", 82, 90),
            event("cudaLaunchKernel", 83, 84, launch, correlation=4),
            event("scale", 10, 20, kernel, 7, correlation=1),
            event("gemm", 15, 35, kernel, 8, correlation=2),  # another stream: began last
            event("scale", 50, 62.5, kernel, 7, correlation=3),
            event("adamw", 85, 95, kernel, 7, correlation=4),
            event("layer", 10, 35, "gpu_user_annotation", 7),
            {"ph": "M", "name": "process_name"},
        ]
    }


def test_a_kernel_belongs_to_the_op_that_launched_it():
    line = timeline.read(trace_of_a_gpu(), {"layer": ADAPTER, "layer.base_layer": BASE})
    assert line.wall == 100_000
    assert line.spent["forward"] == dict.fromkeys(CATEGORIES, 0) | {ADAPTER: 5000, BASE: 20_000, GAPS: 15_000}
    assert line.spent["backward"] == dict.fromkeys(CATEGORIES, 0) | {ADAPTER: 12_500, GAPS: 27_500}
    assert line.spent["optimizer"] == dict.fromkeys(CATEGORIES, 0) | {OPTIMIZER: 10_000, GAPS: 10_000}
    assert line.ops[ADAPTER] == {"aten::mul": [2, 17_500]}


def test_the_faster_half_of_the_steps_is_averaged_and_still_adds_up():
    def line(wall, gap):
        spent = {phase: dict.fromkeys(CATEGORIES, 0) for phase in timeline.PHASES}
        spent["forward"] |= {BASE: wall - gap, GAPS: gap}
        ops = {name: {} for name in CATEGORIES if name != GAPS}
        return Timeline(wall, spent, ops | {BASE: {"aten::mm": [3, wall - gap]}})

    lines = [line(wall, gap) for wall, gap in ((50, 10), (60, 20), (20, 2), (1000, 999))]
    record = time_record([3.0, 1.0, 2.0], lines)
    assert record["p50"] == 2.0 and record["profiled_seconds"] == 35e-9
    assert record["seconds"][BASE] == 29e-9 and record["seconds"][GAPS] == 6e-9
    assert sum(record["seconds"].values()) == pytest.approx(35e-9)
    assert record["phases"]["forward"][GAPS] == 6e-9 and record["ops"][BASE]["aten::mm"] == {
        "calls": 3,
        "seconds": 29e-9,
    }


def points(totals):
    return [{"sequence": n, "total": total} for n, total in totals.items()]


def test_memory_is_a_straight_line_unless_attention_bends_it():
    straight = points({n: 1000 + 7 * n for n in (100, 200, 400, 800)})
    bent = points({n: 1000 + 7 * n + 0.1 * n * n for n in (100, 200, 400, 800, 1600)})
    assert length.fit(straight) == pytest.approx([1000, 7])
    assert length.fit(bent) == pytest.approx([1000, 7, 0.1])
    hollow = points({100: 1000, 200: 1900, 400: 3000, 800: 3100})
    assert len(length.fit(hollow)) == len(length.fit(bent[:3])) == 2
    assert length.longest(straight, 1000 + 7 * 3000) == {"sequence": 3000, "how": "extrapolated"}
    assert length.longest(bent, 1000 + 7 * 3000 + 900_000)["sequence"] == pytest.approx(3000, abs=1)


def test_between_two_measured_lengths_the_budget_is_interpolated():
    four = points({100: 1000, 200: 3000, 400: 4000, 800: 9000})
    assert length.longest(four, 2000) == {"sequence": 150, "how": "interpolated"}
    assert length.longest(four, 3000) == {"sequence": 200, "how": "interpolated"}
    assert length.longest(four, 9000) == {"sequence": 800, "how": "measured"}
    assert length.longest(four, None) is None
    out = [*points({100: 1000, 200: 2000}), {"sequence": 400, "total": None}]
    assert length.longest(out, 2500) == {"sequence": 250, "how": "extrapolated"}, "the device ended before the budget"
    assert length.longest(out[1:], 2500) is None, "one point is no line"
    assert length.longest(points({100: 1000, 200: 1500}), 400) == {"sequence": 0, "how": "extrapolated"}
    assert length.longest(points({100: 1000, 200: 900}), 2000)["sequence"] is None


@pytest.mark.parametrize(("count", "text"), [(24e9, "24 GB"), (512e6, "512 MB"), (16 * 2**30, "17.18 GB"), (3, "3 B")])
def test_sizes(count, text):
    assert length.size(int(count)) == text


@pytest.fixture(scope="module")
def profiled(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("profile")
    lengths = ("--sequence", "64,16,32", "--budget", "3MB")
    assert main(["profile", "--model", tiny, *SIZES, "--quick", *lengths, "--trace", "--out", str(out)]) == 0
    return out


def test_profile_writes_reports_and_pictures(profiled):
    pictures = {"memory.png", "time.png", "sequence.png"}
    traces = {f"trace-{name}.json.gz" for name in NAMES}
    assert {path.name for path in profiled.iterdir()} == {"profile.json", "sequence.csv", *pictures, *traces}
    report = json.loads((profiled / "profile.json").read_text())
    assert report["complete"] is True and report["version"] == 2
    for name in NAMES:
        record = report["time"][name]
        assert len(record["step_seconds"]) == len(record["profiled_step_seconds"]) == 2
        assert sum(record["seconds"].values()) == pytest.approx(record["profiled_seconds"])
        by_phase = sum(sum(phase.values()) for phase in record["phases"].values())
        assert by_phase == pytest.approx(record["profiled_seconds"])
    for picture in pictures:
        pixels = imread(profiled / picture)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 900


def test_traces_are_what_viewers_open(profiled):
    for name in NAMES:
        trace = json.loads(gzip.decompress((profiled / f"trace-{name}.json.gz").read_bytes()))
        named = {event["name"]: event for event in trace["traceEvents"] if event.get("ph") == "X"}
        assert {"training step", "phase: backward", "aten::mm"} <= set(named)
        assert "Input Dims" in named["aten::mm"]["args"]
        assert "host_name" not in trace and "traceName" not in trace


def test_memory_grows_with_the_sequence(profiled):
    report = json.loads((profiled / "profile.json").read_text())
    rows = list(csv.DictReader((profiled / "sequence.csv").open()))
    assert [(row["provider"], int(row["sequence"])) for row in rows] == [(n, s) for n in NAMES for s in (16, 32, 64)]
    ends = {}
    for name in NAMES:
        provider = report["length"]["providers"][name]
        memory = report["memory"][name]
        fixed = memory["weights"] + memory["adapters"] + memory["optimizer state"]
        totals = [point["total"] for point in provider["points"]]
        assert totals == sorted(totals) and all(p["total"] == fixed + p["peak"] for p in provider["points"])
        assert [int(row["total"]) for row in rows if row["provider"] == name] == totals
        ends[name] = provider["longest"]["sequence"]
    assert ends["frozen"] > ends["fastlora"] > ends["peft"] > 0


@pytest.mark.slow
def test_profile_prints_tables_or_json(tiny, tmp_path, capsys):
    arguments = [
        "profile",
        "--model",
        tiny,
        *SIZES,
        "--steps",
        "1",
        "--budget",
        "24GB",
        "--quick",
        "--out",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "over frozen" in printed and "host gaps" in printed and "a step without it (median)" in printed
    assert "24 GB hold sequences of (x 2)" in printed and "extrapolated, beyond the model's 2,048 positions" in printed
    assert main([*arguments, "--sequence", "16,24", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "profile.json").read_text())
    assert report["length"]["providers"]["peft"]["longest"]["how"] == "extrapolated"


@pytest.mark.slow
def test_out_of_memory_is_a_point(tiny, tmp_path, monkeypatch, capsys):
    """PEFT cannot hold 64 tokens; fastlora's steps of 64 cannot be timed. Nobody who failed tries a longer one."""
    tried = []
    measure, timed = training.Trainer.measure_memory, training.Trainer.timed_step

    def measure_memory(self, ids):
        tried.append((self.name, ids.shape[1]))
        if self.name == "peft" and ids.shape[1] == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        measure(self, ids)

    def timed_step(self, ids, seed):
        if self.name == "fastlora" and ids.shape[1] == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        timed(self, ids, seed)

    monkeypatch.setattr(training.Trainer, "measure_memory", measure_memory)
    monkeypatch.setattr(training.Trainer, "timed_step", timed_step)
    lengths = ("--sequence", "16,32,64,128", "--budget", "20MB", "--steps", "1")
    assert main(["profile", "--model", tiny, *SIZES, *lengths, "--out", str(tmp_path)]) == 0
    assert "out of memory" in capsys.readouterr().out
    providers = json.loads((tmp_path / "profile.json").read_text())["length"]["providers"]
    fitted = {name: [p["sequence"] for p in each["points"] if p["total"]] for name, each in providers.items()}
    assert fitted == {"frozen": [16, 32, 64, 128], "peft": [16, 32], "fastlora": [16, 32]}
    assert ("peft", 64) in tried and ("peft", 128) not in tried and ("fastlora", 128) not in tried
    assert providers["peft"]["longest"]["how"] == "extrapolated"


PARTS_AFTER = [
    (1, set()),
    (3 + 1, {"memory"}),  # three steps record allocations
    (3 + 5, {"memory", "time"}),  # and three a round are profiled
    (3 + 6 + 4, {"memory", "time", "length"}),
]


@pytest.mark.one_case_in(3)
@pytest.mark.parametrize(("after", "parts"), PARTS_AFTER)
def test_interrupted_report_has_what_was_measured(tiny, tmp_path, monkeypatch, capsys, after, parts):
    (tmp_path / "time.png").touch()  # of a run before
    steps = iter(range(after))
    peak_bytes, record = training.peak_bytes, timeline.record

    def count():
        if next(steps, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "peak_bytes", lambda *args: (count(), peak_bytes(*args))[1])
    monkeypatch.setattr(timeline, "record", lambda *args: (count(), record(*args))[1])
    assert (
        main(["profile", "--model", tiny, *SIZES, "--steps", "2", "--sequence", "8,16", "--out", str(tmp_path)]) == 130
    )
    assert "Interrupted" in capsys.readouterr().err
    report = json.loads((tmp_path / "profile.json").read_text())
    assert report["complete"] is False and set(PICTURES) & set(report) == parts
    files = {PICTURES[part][0] for part in parts} | ({"sequence.csv"} if "length" in parts else set())
    assert {path.name for path in tmp_path.iterdir()} == {"profile.json"} | files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--budget 24", "--budget must be a size such as 24GB, 512MB or 16GiB, got '24'"),
        ("--budget GB", "--budget must be a size"),
        ("--budget 24XB", "--budget must be a size"),
        ("--budget=-1GB", "--budget must be a size"),
        ("--budget nanGB", "--budget must be a size"),
        ("--sequence 128,1", "--sequence must be an integer of at least 2, got 1"),
        ("--sequence 128,4096", "--sequence 4096 is more than the 2048 positions that the model has"),
        ("--sequence 1000000", "--batch 2 x --sequence 1000000 is more than the text has"),
        ("--steps 0", "--steps must be an integer of at least 1, got 0"),
        ("--memory-snapshot", "--memory-snapshot needs a CUDA device"),
    ],
    ids=lambda value: value if value.startswith("--") and value.count(" ") < 2 else "",
)
def test_unusable_arguments(tiny, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["profile", "--model", tiny, *SIZES, *arguments.split()])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GB", 24 * 10**9), ("512 MB", 512 * 10**6), ("16GiB", 16 * 2**30), ("1.5kb", 1500), ("7B", 7), ("2TiB", 2**41)],
)
def test_budgets(text, count):
    from fastlora.benchmarks.arguments import build_parser

    assert build_parser().parse_args(["profile", "--budget", text]).budget == count


def test_ranges_do_not_outlive_the_step():
    before = dict(torch.nn.modules.module._global_forward_pre_hooks)
    layer = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0"]))
    fastlora.patch(layer)

    def fail():
        layer(torch.ones(1, 4))
        raise KeyError

    with pytest.raises(KeyError):
        timeline.record(layer, fail)
    assert torch.nn.modules.module._global_forward_pre_hooks == before
    line, _ = timeline.record(layer, lambda: layer(torch.ones(1, 4)).sum())
    assert line.by_category()[BASE] > 0 and line.by_category()[ADAPTER] > 0
