"""What README.md, RESULTS.md and the pictures say is what the files of results say."""

import json
import re
import shutil
from pathlib import Path

import pytest

from fastlora.benchmarks import environment, pictures, report
from fastlora.benchmarks.arguments import UsageError
from fastlora.benchmarks.records import write_json

ROOT = Path(report.__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def test_nothing_is_stale():
    stale = sorted(str(path.relative_to(ROOT)) for path in report.stale(RESULTS, ROOT / "README.md"))
    assert not stale, f"run python -m benchmarks.report: {', '.join(stale)}"


def test_every_picture_shown_is_drawn_from_the_results():
    drawn = {picture.path for picture in report.drawings(RESULTS)}
    for page in (ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"):
        shown = {page.parent / name for name in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text(encoding="utf-8"))}
        assert shown and shown <= drawn


@pytest.fixture
def copy(tmp_path):
    """README.md and the results, to be changed."""
    shutil.copytree(RESULTS, tmp_path / "benchmarks" / "results")
    for page in ("README.md", "benchmarks/RESULTS.md"):
        shutil.copy(ROOT / page, tmp_path / page)
    return tmp_path


def stale(folder):
    found = report.stale(folder / "benchmarks" / "results", folder / "README.md")
    return {path.relative_to(folder).as_posix(): write for path, write in found.items()}


def test_a_changed_result_makes_pages_and_picture_stale(copy):
    assert not stale(copy)
    path = copy / "benchmarks" / "results" / "cpu" / "report.json"
    changed = json.loads(path.read_text())
    peft = changed["cases"][0]["providers"]["peft"]
    peft |= {name: 2 * peft[name] for name in ("p20", "p50", "p80")}
    write_json(path, changed)
    found = stale(copy)
    assert set(found) == {"README.md", "benchmarks/RESULTS.md", "benchmarks/results/cpu/compare.png"}
    for write in found.values():
        write()
    assert not stale(copy)
    assert f"| {peft['p50']:.3f} |" in (copy / "README.md").read_text()


def test_a_typed_number_is_stale(copy):
    readme = copy / "README.md"
    text = readme.read_text()
    number = re.search(r"\| (\d\.\d{3}) \|", text)[1]
    readme.write_text(text.replace(number, "0.001", 1))
    assert set(stale(copy)) == {"README.md"}
    readme.write_text(text.replace("<!-- losses -->", ""))
    with pytest.raises(ValueError, match="markers compare, memory, losses"):
        stale(copy)


def test_check_writes_nothing(copy, monkeypatch, capsys):
    monkeypatch.setattr(report, "HERE", copy / "benchmarks")
    assert report.main(["--check"]) == 0
    (copy / "benchmarks" / "RESULTS.md").write_text("typed")
    assert report.main(["--check"]) == 1
    assert capsys.readouterr().out == "stale: benchmarks/RESULTS.md\n"
    assert (copy / "benchmarks" / "RESULTS.md").read_text() == "typed"
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0


def test_results_of_record_are_of_committed_code(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "commit", lambda: "0123abcd-dirty")
    for folder in (RESULTS, RESULTS / "cpu" / "studies"):
        with pytest.raises(UsageError, match="commit them, or write elsewhere with --out"):
            environment.refuse_changed_code(folder)
    environment.refuse_changed_code(tmp_path)
    monkeypatch.setattr(environment, "commit", lambda: "0123abcd")
    environment.refuse_changed_code(RESULTS)


def test_a_picture_of_other_data_is_noticed(tmp_path):
    from matplotlib.figure import Figure

    data = tmp_path / "rows.csv"
    data.write_text("a\n1\n")
    pictures.save(Figure(), tmp_path / "rows.png", "a\n1\n")
    assert pictures.is_drawn_from(tmp_path / "rows.png", data)
    data.write_text("a\n2\n")
    assert not pictures.is_drawn_from(tmp_path / "rows.png", data)
    assert not pictures.is_drawn_from(tmp_path / "none.png", data)
