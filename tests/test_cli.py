"""The command: reports of a tiny model's training, what Ctrl-C leaves, and arguments that cannot be used."""

import json

import pytest
import torch
import transformers
from matplotlib.image import imread

from fastlora import ops
from fastlora.benchmarks import training
from fastlora.benchmarks.commands.compare import provider_records
from fastlora.benchmarks.records import to_json, write_json
from fastlora.benchmarks.training import Measurements
from fastlora.cli import main
from fastlora.kernel_ops import unsupported_reason

pytestmark = pytest.mark.usefixtures("one_thread")
BASES, DROPOUTS, STEPS, TOKENS, BATCH = ("bf16", "nf4"), (0.0, 0.05), 3, 32, 2
STATISTICS = ("p20", "p50", "p80", "tokens_per_second", "speedup", "speedup_paired", "final_loss")
MEMORY = ("saved_bytes", "saved_ratio", "peak_bytes", "peak_ratio")


def save_model(folder, vocabulary):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model without tokenizer: bytes of the text are its tokens."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny", 256)


def compare(model, out, *more):
    sizes = ("--steps", STEPS, "--tokens", TOKENS, "--batch", BATCH, "--r", 4, "--lr", 0.01, "--device", "cpu")
    return main(["compare", "--model", model, "--out", str(out), *map(str, sizes), *more])


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """The folder of a finished comparison of every base with every dropout."""
    out = tmp_path_factory.mktemp("finished")
    lists = ("--base", ",".join(BASES), "--dropout", ",".join(map(str, DROPOUTS)))
    assert compare(model, out, *lists) == 0
    return out


@pytest.fixture
def report(finished):
    return json.loads((finished / "report.json").read_text())


def test_report_is_complete(report):
    assert report["version"] == 1 and report["complete"] is True
    assert report["model"] == "tiny"
    assert report["settings"]["tokens"] == TOKENS
    assert {"date", "device", "threads", "torch", "peft", "fastlora", "commit"} <= set(report["environment"])
    assert [(c["base"], c["dropout"]) for c in report["cases"]] == [(b, d) for b in BASES for d in DROPOUTS]
    for case in report["cases"]:
        assert case["trainable_parameters"] > 0
        assert list(case["providers"]) == ["frozen", "peft", "fastlora"]
        for provider in case["providers"].values():
            assert all(provider[name] is not None for name in STATISTICS + MEMORY)
            assert provider["p20"] <= provider["p50"] <= provider["p80"]
            assert len(provider["step_seconds"]) == len(provider["losses"]) == STEPS


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """The folder of a mixture of experts."""
    folder = tmp_path_factory.mktemp("models") / "mixture"
    fields = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.MixtralConfig(**fields, num_local_experts=4, intermediate_size=32)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    return str(folder)


adapts_experts = pytest.mark.skipif(
    transformers.__version__.startswith("5.0."), reason="PEFT's all-linear leaves out experts there"
)


@adapts_experts
def test_experts_are_compared_on_a_dense_base(mixture, tmp_path):
    assert compare(mixture, tmp_path) == 0
    (case,) = json.loads((tmp_path / "report.json").read_text())["cases"]
    assert case["base"] in ("bf16", "fp32")
    ours = case["providers"]["fastlora"]
    assert ours["saved_ratio"] < 0.8, "the experts run PEFT's forward"
    assert ours["max_loss_difference"] < 0.05


@adapts_experts
@pytest.mark.parametrize("asked", [("--dropout", "0,0.1"), ("--base", "bf16,nf4")], ids="".join)
def test_experts_need_a_dense_base_and_no_dropout(mixture, asked, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        compare(mixture, tmp_path, *asked)
    assert stop.value.code == 2
    assert "has experts: --dropout must be 0 and --base dense" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_report_names_no_folder(finished, model):
    text = (finished / "report.json").read_text()
    assert str(finished) not in text and model not in text


def test_losses_agree_with_peft(report):
    """The difference is small against what training changed; with dropout only while B is zero, for masks differ."""
    for case in report["cases"]:
        frozen, peft, ours = (case["providers"][name] for name in ("frozen", "peft", "fastlora"))
        learnt = frozen["final_loss"] - peft["final_loss"]
        assert abs(ours["losses"][0] - peft["losses"][0]) < 0.05 * learnt
        assert case["dropout"] or ours["max_loss_difference"] < 0.05 * learnt


def test_fastlora_saves_fewer_bytes(report):
    for case in report["cases"]:
        ours, peft = case["providers"]["fastlora"], case["providers"]["peft"]
        assert 0 < ours["saved_bytes"] < peft["saved_bytes"]
        assert ours["saved_ratio"] == pytest.approx(ours["saved_bytes"] / peft["saved_bytes"])
        assert ours["peak_bytes"] < peft["peak_bytes"]


def test_picture_shows_something(finished):
    pixels = imread(finished / "compare.png")
    assert pixels.shape[0] > 400 and pixels.shape[1] > 900
    assert len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, pixels.shape[2])}) > 5


def test_nothing_else_is_written(finished):
    assert sorted(path.name for path in finished.iterdir()) == ["compare.png", "report.json"]


def test_json_is_all_of_stdout(model, tmp_path, capsys):
    assert compare(model, tmp_path, "--base", "fp32", "--json", "--checkpointing") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "report.json").read_text())
    assert printed["cases"][0]["checkpointing"] is True


def test_table_on_stdout(model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    assert compare(model, tmp_path, "--base", "fp32", "--text", str(text)) == 0
    printed = capsys.readouterr().out
    assert "tiny: fp32, dropout 0" in printed and "PEFT + fastlora" in printed


@pytest.mark.parametrize("steps_before", [0, 2, 3 + 4, 3 + 3 * 2 + 1], ids=lambda n: f"after_{n}")
def test_interrupted_report_is_valid(model, tmp_path, monkeypatch, capsys, steps_before):
    """During the measurement of memory, in the first round (not timed), and in later ones."""
    (tmp_path / "compare.png").touch()  # of a run before
    train = training.train

    def interrupted_train(*args):
        for i, step in enumerate(train(*args)):
            if i == steps_before:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(training, "train", interrupted_train)
    assert compare(model, tmp_path, "--base", "fp32") == 130
    assert "Interrupted" in capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["complete"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    (case,) = report["cases"]
    timed = [len(provider["step_seconds"]) > 1 for provider in case["providers"].values()]
    assert [provider["p50"] is not None for provider in case["providers"].values()] == timed
    assert any(timed) == (steps_before > 3 + 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dropout 1.5", "--dropout must be in [0, 1), got 1.5"),
        ("--dropout 0,nan", "--dropout must be in [0, 1), got nan"),
        ("--dropout ,", "--dropout must be in [0, 1), got "),
        ("--base bf16,int8", "--base must be of bf16, fp16, fp32, nf4, fp4, got 'int8'"),
        ("--steps 1", "--steps must be an integer of at least 2, got 1"),
        ("--r 0", "--r must be an integer of at least 1, got 0"),
        ("--tokens 1", "--tokens must be an integer of at least 2, got 1"),
        ("--batch x", "--batch must be an integer of at least 1, got x"),
        ("--lr 0", "--lr must be a positive number, got 0"),
        ("--seed -1", "--seed must be an integer of at least 0, got -1"),
        ("--device tpu", "--device: invalid choice: 'tpu'"),
        ("--model nowhere", "--model must be smollm2, smollm2-random, qwen3-moe, mixtral or a folder"),
        ("--text nowhere", "--text nowhere cannot be read: No such file"),
    ],
    ids=lambda value: value if value.count(" ") == 1 else "",
)
def test_unusable_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_unusable_model_and_folder(model, tmp_path, capsys):
    small = save_model(tmp_path / "small", 100)
    file = tmp_path / "file"
    file.touch()
    for arguments, message in (
        ((small, tmp_path / "out"), "--model has no tokenizer"),
        ((model, file), "--out"),
        ((model, tmp_path / "out", "--tokens", "1000000"), "--batch 2 x --tokens 1000000 is more than the text has"),
    ):
        with pytest.raises(SystemExit) as stop:
            compare(*arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [(), ("compare",), ("info",)], ids=" ".join)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "example:\n  fastlora " in capsys.readouterr().out


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"]["cpu"]["cores"] >= 1
    implementation = "kernel" if ops.NO_CPU_KERNELS is None else "torch composition"
    on_cpu = found["implementations"]["cpu"]
    assert on_cpu.pop("nf4_matmul") == "torch composition", "of decode_4bit and a product"
    assert set(on_cpu.values()) == {implementation}
    on_gpu = found["implementations"]["cuda"]
    for op in ("lora_matmul_4bit", "lora_matmul_experts_4bit"):
        assert on_gpu.pop(op) == "torch composition", "of decode_4bit and a product"
    assert set(on_gpu.values()) == {"torch composition" if unsupported_reason() else "kernel"}
    assert found["gpu_kernels"] == (unsupported_reason() or "on")
    assert found["cpu_kernels"].startswith(ops.NO_CPU_KERNELS or "loaded, bf16 by ")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and found["cpu_kernels"] in out


def test_statistics():
    """The first round is left out; the paired speed-up compares steps of one round."""
    peft = Measurements([9.0, 2.0, 4.0, 3.0], [5.0, 4.0, 3.0, 2.0], saved_bytes=100, peak_bytes=200)
    ours = Measurements([0.1, 1.0, 1.0, 3.0], [5.0, 4.5, 3.0, 2.0], saved_bytes=50, peak_bytes=150)
    record = provider_records({"peft": peft, "fastlora": ours}, tokens_per_step=10)["fastlora"]
    assert (record["p50"], record["tokens_per_second"]) == (1.0, 10.0)
    assert (record["speedup"], record["speedup_paired"]) == (3.0, 2.0)
    assert (record["saved_ratio"], record["peak_ratio"]) == (0.5, 0.75)
    assert (record["final_loss"], record["max_loss_difference"]) == (2.0, 0.5)


def test_diverged_loss_is_null():
    diverged = Measurements([1.0, 1.0], [5.0, float("nan")], saved_bytes=1, peak_bytes=1)
    records = provider_records({"peft": diverged, "fastlora": diverged}, tokens_per_step=1)
    assert json.loads(to_json(records))["fastlora"]["losses"] == [5.0, None]
    assert records["fastlora"]["max_loss_difference"] is None


def test_failed_write_leaves_the_old_report(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
