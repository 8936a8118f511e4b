"""Every script of examples/ runs offline, trains what it says, and explains itself."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUNS = [  # a script, what it needs, and how it is called: without arguments it is the offline default
    ("peft_lora.py", [], ["--steps", "3", "--save", "saved"]),
    ("qlora.py", ["bitsandbytes"], ["--steps", "2"]),
    ("qlora.py", ["bitsandbytes"], ["--steps", "2", "--quant-type", "fp4", "--checkpointing"]),
    ("without_peft.py", [], ["--steps", "3", "--save", "saved"]),
    ("trl_sft.py", ["trl", "datasets"], ["--steps", "2", "--output", "saved"]),
]
pytestmark = pytest.mark.usefixtures("one_thread", "bitsandbytes_eager")


def load(name, needs):
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    return runpy.run_path(str(EXAMPLES / name))["main"]


@pytest.mark.parametrize("name, needs, arguments", RUNS, ids=[f"{name} {' '.join(args)}" for name, _, args in RUNS])
def test_trains_fused(name, needs, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    loss = load(name, needs)(arguments)
    steps = int(arguments[1])
    printed = capsys.readouterr().out
    assert 0 < loss < 7  # log(256) is 5.5
    fused, own = map(
        int, re.search(r"14 layers: (\d+) calls fused, (\d+) by the module's own forward", printed).groups()
    )
    assert own == 0
    assert fused > 14 * steps if "--checkpointing" in arguments else fused == 14 * steps
    if "saved" in arguments:
        assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


def test_every_example_is_run():
    assert {name for name, _, _ in RUNS} == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize(
    "name, needs", sorted({name: needs for name, needs, _ in RUNS}.items()), ids=lambda it: str(it)
)
def test_help(name, needs, capsys):
    with pytest.raises(SystemExit) as ended:
        load(name, needs)(["--help"])
    assert ended.value.code == 0
    assert re.search(r"--model .*--steps ", capsys.readouterr().out, re.DOTALL)


def test_takes_a_model_and_a_text(tmp_path, monkeypatch, capsys):
    """The path of a real model: a folder with a tokenizer, and a file."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "model")
    characters = {character: i for i, character in enumerate("?abcdefghijklmnopqrstuvwxyz .")}
    tokenizer = Tokenizer(models.BPE(characters, [], unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    sources = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt")]
    loss = load("peft_lora.py", [])([*sources, "--steps", "2", "--tokens", "16"])
    assert 0 < loss < 6
    assert "7 layers: 14 calls fused, 0 by" in capsys.readouterr().out
