"""The studies: each end to end on a tiny model, what must hold exactly, and findings that say what the rows say."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef

from fastlora.benchmarks import pictures, training
from fastlora.benchmarks.records import read_rows
from fastlora.benchmarks.studies import common, targets
from fastlora.benchmarks.studies.common import column, pick

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
LAYERS = 3


@pytest.fixture(scope="module")
def out(tmp_path_factory, one_thread):
    """The folder that all studies of a tiny model wrote to."""
    folder = tmp_path_factory.mktemp("studies")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    model = ("--model", str(folder / "tiny"), "--tokens", "32", "--device", "cpu")
    assert common.main(*common.STUDIES, argv=["--quick", "--json", "--out", str(folder / "out"), *model]) == 0
    return folder / "out"


def rows_of(out, name):
    return read_rows(out / f"{name}.csv")


@pytest.mark.slow
def test_each_writes_three_files_and_no_folder_of_this_machine(out):
    expected = {f"{name}.{ending}" for name in common.STUDIES for ending in ("csv", "json", "png")}
    assert {path.name for path in out.iterdir()} == expected
    for name in common.STUDIES:
        report = json.loads((out / f"{name}.json").read_text())
        assert {"date", "device", "torch", "commit"} <= set(report["environment"])
        assert report["finding"] == common.load(name).finding(rows_of(out, name))
        assert str(out.parent) not in (out / f"{name}.json").read_text()
        assert pictures.is_drawn_from(out / f"{name}.png", out / f"{name}.csv")


@pytest.mark.slow
def test_memory_falls_with_position_and_is_flat_with_checkpointing(out):
    rows = rows_of(out, "position")
    assert column(rows, "layer", provider="peft", checkpointing="no") == list(range(LAYERS))
    for provider in ("peft", "fastlora"):
        without = column(rows, "saved_bytes", provider=provider, checkpointing="no")
        assert without == sorted(set(without), reverse=True)
        peaks = column(rows, "peak_bytes", provider=provider, checkpointing="no")
        assert peaks == sorted(set(peaks), reverse=True)
        flat = column(rows, "saved_bytes", provider=provider, checkpointing="yes")
        assert max(flat) <= 1.01 * min(flat) and min(flat) < without[0]
    for row in pick(rows, provider="peft"):
        assert row["trainable_parameters"] == 16 * (4 * (64 + 64) + 3 * (64 + 128))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rank", "targets"])
def test_parameters_and_states_are_exact(out, name):
    rows = [row for row in rows_of(out, name) if row["provider"] != "frozen"]
    assert rows
    for row in rows:
        count = row["trainable_parameters"]
        assert count == row["expected_parameters"]
        assert row["adapters_bytes"] == row["gradients_bytes"] == 4 * count
        assert 8 * count < row["optimizer_bytes"] < 8 * count + 4 * 2 * 7 * LAYERS + 1
        assert row["step_p20_seconds"] <= row["step_p50_seconds"] <= row["step_p80_seconds"]
    for key in dict.fromkeys(row["r" if name == "rank" else "targets"] for row in rows):
        peft, ours = (row for row in rows if row["r" if name == "rank" else "targets"] == key)
        assert ours["saved_bytes"] < peft["saved_bytes"]


@pytest.mark.slow
def test_rank_scales_what_it_should(out):
    (low, *_, high) = pick(rows_of(out, "rank"), provider="fastlora")
    assert high["trainable_parameters"] * low["r"] == low["trainable_parameters"] * high["r"]
    assert high["saved_bytes"] < 2 * low["saved_bytes"]


@pytest.mark.parametrize(
    ("modules", "r", "published"),
    [
        (("q_proj", "v_proj"), 8, 4_194_304),
        ((*common.MODULES, "lm_head"), 8, 20_277_248),
        ((*common.MODULES, "lm_head"), 16, 40_554_496),
        ((*common.MODULES, "lm_head"), 256, 648_871_936),
    ],
)
def test_parameters_of_llama_2_7b_are_those_published(modules, r, published):
    assert targets.llama_2_7b_parameters(modules, r) == published


@pytest.mark.slow
def test_many_small_adapters_have_the_parameters_of_one(out):
    rows = pick(rows_of(out, "many_adapters"), provider="peft")
    assert column(rows, "adapters") == [1, 4]
    assert len(set(column(rows, "trainable_parameters"))) == 1
    ours = pick(rows_of(out, "many_adapters"), provider="fastlora")
    for row, theirs in zip(ours, rows, strict=True):
        assert row["saved_bytes"] <= theirs["saved_bytes"]
    # Several adapters are computed as one, whose A and B are kept: in fp32, in which PEFT 0.18 has only the first.
    stacked = ours[0]["adapters_bytes"]
    assert 0 < ours[-1]["saved_bytes"] - ours[0]["saved_bytes"] <= stacked
    assert column(rows, "over_one")[0] == 1


@pytest.mark.slow
def test_4_bit_bases_are_smaller_by_what_their_weights_are(out):
    rows = rows_of(out, "bases")
    dense, nf4, fp4 = (pick(rows, base=base, provider="fastlora")[0] for base in ("bf16", "nf4", "fp4"))
    linear = 2 * LAYERS * (4 * 64 * 64 + 3 * 64 * 128)  # bytes in bf16
    for fourbit in (nf4, fp4):
        assert dense["weights_bytes"] - 0.75 * linear < fourbit["weights_bytes"] < dense["weights_bytes"]
        assert fourbit["total_bytes"] < dense["total_bytes"]
        assert fourbit["optimizer_bytes"] == dense["optimizer_bytes"]


@pytest.mark.slow
def test_optimizer_bytes_are_the_formula(out):
    rows = rows_of(out, "optimizers")
    assert len(rows) == 6
    for row in rows:
        assert row["optimizer_bytes"] == row["formula_bytes"]
    assert column(rows, "trainable_parameters")[-1] == 4_194_304
    assert rows[3]["optimizer_bytes"] == pytest.approx(16.78e6, rel=1e-3)  # as published


@pytest.mark.slow
def test_methods_have_about_the_parameters_of_lora(out):
    rows = rows_of(out, "methods")
    (lora, ours), (dora, our_dora) = (pick(rows, method=name)[:2] for name in ("LoRA", "DoRA"))
    count = lora["trainable_parameters"]
    for name in ("rsLoRA", "DoRA", "adapters", "prefix"):
        assert 0.6 < pick(rows, method=name)[0]["trainable_parameters"] / count < 1.4, name
    assert pick(rows, method="none")[0]["trainable_parameters"] == 0
    assert ours["saved_bytes"] < lora["saved_bytes"] and our_dora["saved_bytes"] < dora["saved_bytes"]
    for method in ("LoRA", "rsLoRA", "DoRA"):
        theirs, fused = pick(rows, method=method)
        assert fused["loss"] == pytest.approx(theirs["loss"], abs=0.05)  # of bf16 after four steps


@pytest.mark.slow
def test_blocks_of_other_architectures_save_less_than_with_peft(out):
    rows = rows_of(out, "architectures")
    assert {row["family"] for row in rows} == {"Llama", "OPT"}
    for row in pick(rows, provider="peft"):
        (ours,) = pick(rows, family=row["family"], provider="fastlora")
        assert row["over_peft"] == 1 and ours["saved_bytes"] < row["saved_bytes"]


@pytest.mark.slow
def test_small_updates_survive_where_they_should(out):
    kept = {row["layer"]: row["share_kept"] for row in pick(rows_of(out, "small_updates"), magnitude_of_B=1e-4)}
    assert kept["unfused bf16 layer"] < 0.5
    assert all(0.95 <= share <= 1.05 for name, share in kept.items() if name.startswith("fastlora"))


def test_measuring_what_is_saved_leaves_nothing_behind():
    """Also where a node saves its own output, as exp does."""
    x, outputs = torch.ones(4, requires_grad=True), []

    def forward():
        y = x.exp()
        outputs.append(StorageWeakRef(y.untyped_storage()))
        return y.sum()

    assert training.saved_bytes(torch.nn.Identity(), forward) == x.nbytes
    assert outputs[0].expired()


def changed(rows, column, change, **where):
    """The rows with a column changed where they match."""
    return [
        {**row, column: change(row[column])} if all(row[key] == value for key, value in where.items()) else row
        for row in rows
    ]


@pytest.mark.slow
def test_findings_follow_the_numbers(out):
    """Rows that say otherwise are described otherwise."""

    def says(name, rows):
        return common.load(name).finding(rows)

    position = rows_of(out, "position")
    assert "without checkpointing falls from" in says("position", position)
    assert "checkpointing it is flat at" in says("position", position)
    upside_down = changed(position, "saved_bytes", lambda size: 10**12 // size, checkpointing="no")
    assert "without checkpointing rises from" in says("position", upside_down)
    tilted = changed(position, "saved_bytes", lambda size: 2 * size, checkpointing="yes", layer=1)
    assert "checkpointing it goes up and down from" in says("position", tilted)

    for name in ("rank", "targets"):
        rows = rows_of(out, name)
        assert "NOT" not in says(name, rows)
        assert "NOT exactly" in says(name, changed(rows, "trainable_parameters", lambda n: n + 1, provider="peft"))

    many = rows_of(out, "many_adapters")
    for peft, ours, words in (
        (3.0, 1.5, "25% of PEFT's slowdown"),
        (3.0, 0.9, "0% of PEFT's slowdown"),
        (1.2, 1.4, "no less a slowdown than PEFT's"),
        (0.9, 0.8, "many are no slower than one with PEFT"),
    ):
        rows = changed(many, "over_one", lambda _, peft=peft: peft, provider="peft", adapters=4)
        rows = changed(rows, "over_one", lambda _, ours=ours: ours, provider="fastlora", adapters=4)
        assert words in says("many_adapters", rows)
        assert f"{peft:.2f} times" in says("many_adapters", rows) and f"{ours:.2f} times" in says("many_adapters", rows)

    bases = changed(rows_of(out, "bases"), "over_peft_bf16", lambda _: 1.23, base="nf4", provider="peft")
    assert "NF4 1.23 times as long with PEFT" in says("bases", bases)

    optimizers = rows_of(out, "optimizers")
    assert "to the byte" in says("optimizers", optimizers) and "as published" in says("optimizers", optimizers)
    wrong = changed(optimizers, "optimizer_bytes", lambda size: 2 * size, optimizer="AdamW")
    assert "NOT what the formula says in 2 of 6" in says("optimizers", wrong)
    assert "NOT the 16.78 MB that are published" in says("optimizers", wrong)

    others = changed(rows_of(out, "architectures"), "over_peft", lambda _: 0.8, family="OPT", provider="fastlora")
    assert "1.25 (OPT) times PEFT's speed" in says("architectures", others)

    updates = changed(rows_of(out, "small_updates"), "share_kept", lambda _: 0.4)
    assert "fastlora 0.40 on a bf16 base" in says("small_updates", updates)


@pytest.mark.parametrize("names", [("rank",), common.STUDIES], ids=["one", "all"])
def test_help_has_an_example(names, capsys):
    with pytest.raises(SystemExit) as stop:
        common.main(*names, argv=["--help"])
    assert stop.value.code == 0
    assert "example:\n  python -m benchmarks.studies" in capsys.readouterr().out


def test_unusable_arguments(tmp_path, capsys):
    for arguments, message in (
        (("--model", "nowhere"), "--model must be"),
        (("--rounds", "1"), "--rounds must be an integer of at least 2"),
    ):
        with pytest.raises(SystemExit) as stop:
            common.main("rank", argv=["--out", str(tmp_path), "--device", "cpu", *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_json_is_all_of_stdout_and_an_interrupted_study_writes_nothing(tmp_path, capsys, monkeypatch):
    arguments = ["--quick", "--json", "--out", str(tmp_path), "--device", "cpu"]
    assert common.main("small_updates", argv=arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"] == rows_of(tmp_path, "small_updates")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(setup):
        raise KeyboardInterrupt

    study = replace(common.load("small_updates"), measure=interrupted)
    monkeypatch.setattr(common, "load", lambda name: study)
    assert common.main("small_updates", argv=arguments) == 130
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
