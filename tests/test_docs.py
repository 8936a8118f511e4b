"""The documentation is true: its code runs and prints what it says, links and paths lead somewhere, the texts that it
explains are texts of the sources, and every op is in it."""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest
import transformers

import fastlora
from fastlora import reference
from fastlora.benchmarks.commands.info import implementations

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "kernels/README.md")),
]
NOT_RUN = {"trainers.md": 4}  # blocks that are marked by <!-- not run: reason -->
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```)?",
    re.MULTILINE | re.DOTALL,
)
ids = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page):
    """The code blocks of a page: the line before it, its code, what it prints if that is said, why it is not run."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield text[: found.start("code")].count("\n"), found["code"], found["output"], found["reason"]


@pytest.mark.usefixtures("one_thread", "bitsandbytes_eager")
@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=lambda page: page.name)
def test_code_runs_and_prints_what_is_said(page, tmp_path, monkeypatch):
    if page.name == "recipes.md" and transformers.__version__.startswith("5.0."):
        pytest.skip("its mixture of experts runs PEFT's forward with transformers 5.0")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code, output, reason in blocks(page):
        if reason is not None:
            compile(code, page.name, "exec")
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + code, str(page), "exec"), namespace)  # errors name the line of the page
        if output is not None:
            assert printed.getvalue() == output, f"{page.name}, line {line}"


@ids
def test_every_python_block_is_found_and_few_are_not_run(page):
    fences = page.read_text(encoding="utf-8").count("```python")
    found = list(blocks(page))
    assert len(found) == fences
    assert sum(reason is not None for *_, reason in found) == NOT_RUN.get(page.name, 0)


def anchors(page):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if page.parent == ROOT / "docs":
            assert file.parent == ROOT / "docs", f"{target}: the site has only the pages of docs/"
        if anchor:
            assert anchor in anchors(file), target


def named_paths(page):
    """What a page names as ``folder/file`` or ``folder/file::name``."""
    folders = "fastlora|kernels|benchmarks|tests|docs|examples"
    return set(re.findall(rf"`((?:{folders})/[\w./-]*(?:::\w+)?)`", page.read_text(encoding="utf-8")))


def defines(file, name):
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return re.search(rf"\b{name}\b", text) is not None
    kinds = (ast.FunctionDef, ast.ClassDef)
    return any(isinstance(node, kinds) and node.name == name for node in ast.walk(ast.parse(text)))


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page):
    for named in sorted(named_paths(page)):
        path, _, name = named.partition("::")
        assert (ROOT / path).exists(), path
        assert not name or defines(ROOT / path, name), named


ARCHITECTURE = ROOT / "docs" / "architecture.md"


def test_every_op_and_every_formula_has_its_place():
    named = named_paths(ARCHITECTURE)
    ops = set(implementations()["cpu"])
    of_ops = {path.partition("::")[2] for path in named if path.startswith("fastlora/ops")}
    assert ops <= of_ops, "ops without a place"
    formulas = {
        name
        for name, value in vars(reference).items()
        if callable(value) and getattr(value, "__module__", "") == reference.__name__ and not name.startswith("_")
    }
    assert formulas <= {path.partition("::")[2] for path in named if path.startswith("fastlora/reference.py")}


def test_every_kernel_has_its_place():
    """Each function that Triton compiles and a launcher launches, and each op that the C++ extension registers."""
    named = {path.partition("::")[2] for path in named_paths(ARCHITECTURE) if path.startswith("kernels/")}
    launched = set()
    for file in (ROOT / "kernels").glob("*.py"):
        functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
        launched |= {node.name for node in functions if node.decorator_list and node.name.endswith("_kernel")}
    assert launched <= named
    registered = set()
    for file in (ROOT / "kernels" / "cpu").glob("*.cpp"):
        registered |= set(re.findall(r"m\.impl\(\"\w+\", (\w+)\)", file.read_text()))
    assert registered and registered <= named


def test_every_module_has_its_room():
    rooms = "".join(re.findall(r"^\|(.*?)\|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE))
    modules = {file.name for file in (ROOT / "fastlora").glob("*.py")} - {"__init__.py", "__main__.py", "version.py"}
    assert {name for name in modules if name not in re.findall(r"\w+\.py", rooms)} == set()


def test_every_function_of_autograd_has_its_place():
    page = ARCHITECTURE.read_text(encoding="utf-8")
    functions = set()
    for file in (ROOT / "fastlora").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and any(
                isinstance(b, ast.Name) and b.id == "Function" for b in node.bases
            ):
                functions.add(node.name)
    if "FusedLinear" not in functions:
        pytest.skip("the Functions have their former names")
    missing = sorted(name for name in functions if f"`{name}`" not in page)
    assert functions and not missing


def test_the_api_page_has_all_that_is_exported():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^::: fastlora\.\w+\.(\w+)$", page, re.MULTILINE))
    assert set(fastlora.__all__) - {"__version__"} <= described


def texts_of_sources():
    """Every string of the package, each part of a formatted one by itself."""
    texts = []
    for file in [*(ROOT / "fastlora").glob("*.py"), ROOT / "setup.py"]:
        texts += [n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)]
    return [text for text in texts if isinstance(text, str)]


def explained():
    """The first column of the tables of troubleshooting.md, each text cut at its … ."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for row in re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE):
        for text in re.findall(r"`(.+?)`", row):
            yield text, [part.strip() for part in text.split("…") if part.strip()]


def test_explained_texts_are_those_of_the_sources():
    texts = texts_of_sources()
    quoted = list(explained())
    assert len(quoted) > 50
    for text, parts in quoted:
        for part in parts:
            assert any(part in each for each in texts), f"{part!r} of {text!r} is in no source"


def test_every_warning_is_explained():
    """The longest constant part of each message that is given to warnings.warn."""
    known = [part for _, parts in explained() for part in parts]
    for file in (ROOT / "fastlora").glob("*.py"):
        for scope in ast.walk(ast.parse(file.read_text())):
            if not isinstance(scope, ast.FunctionDef):
                continue
            assigned = {
                node.targets[0].id: node.value
                for node in ast.walk(scope)
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            }
            for node in ast.walk(scope):
                if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"):
                    continue
                message = node.args[0]
                message = assigned.get(message.id, message) if isinstance(message, ast.Name) else message
                parts = [n.value.strip() for n in ast.walk(message) if isinstance(n, ast.Constant)]
                longest = max((part for part in parts if isinstance(part, str)), key=len)
                assert any(longest in part or part in longest for part in known), f"{file.name}: {longest}"


def test_every_reason_of_a_patched_layer_is_explained():
    """The constants and formatted strings that functions of the modules that patch return as reasons."""
    known = " ".join(part for _, parts in explained() for part in parts)
    files = ("peft_reasons", "peft_layers", "peft_experts", "base_layers", "base_experts", "fused_block", "fuse")
    trees = [ast.parse((ROOT / "fastlora" / f"{file}.py").read_text()) for file in files]
    for function in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(function, ast.FunctionDef) and function.returns and ast.unparse(function.returns) == "str | None":
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and isinstance(node.value, ast.Constant | ast.JoinedStr):
                    parts = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
                    words = [part.strip() for part in parts if isinstance(part, str) and len(part.strip()) > 3]
                    assert all(word.strip("( )") in known for word in words), ast.unparse(node)
