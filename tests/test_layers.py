"""Imports point one way: kernels, then the layers of fastlora, then benchmarks, then the command line."""

import ast
from pathlib import Path

import pytest

import fastlora

PACKAGE = Path(fastlora.__file__).parent
LAYERS = [  # each may import what stands before it
    {"compat"},
    {"kernels"},
    {"version", "files", "extension", "calls", "require", "flops"},
    {"checks"},
    {"reference"},
    {"costs"},
    {"plans"},
    {"kernel_ops"},
    {"ops"},
    {"fourbit"},
    {"ops_4bit", "ops_experts"},
    {"products"},
    {"recompute", "siblings", "dora", "base_layers"},
    {"autograd"},
    {"mlp", "mixed_batch"},
    {"experts"},
    {"functional", "row_adapters"},
    {"proof"},
    {"dependencies"},
    {"fused_block", "base_experts"},
    {"fuse"},
    {"nn"},
    {"nn_experts", "parallel"},
    {"model"},
    {"adapter_config"},
    {"adapter_files"},
    {"trainer"},
    {"peft_reasons"},
    {"peft_layers"},
    {"peft_experts"},
    {"peft", "peft_rows"},
    {"callback"},
    {""},  # fastlora/__init__.py itself
    {"benchmarks"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def layer_of(file: Path) -> str:
    first = file.relative_to(PACKAGE).with_suffix("").parts[0]
    return "" if first == "__init__" else first


def layer_named(name: str) -> str:
    """The layer of ``fastlora.*``, whatever it names there; ``""`` for what fastlora itself exports."""
    layer = name.split(".")[1]
    return layer if layer in RANK else ""


def imported_layers(file: Path) -> set[str]:
    """The layers of fastlora that a file imports, at its top or inside functions."""
    layers = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [f"{alias.name}." for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        layers |= {layer_named(name) for name in names if name.split(".")[0] == "fastlora"}
    return layers


SOURCES = sorted(
    {*PACKAGE.rglob("*.py"), *(PACKAGE / "benchmarks").rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py")}
)  # links


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    own = layer_of(file)
    assert own in RANK, f"{own} has no place in LAYERS"
    lazily_loaded = {"peft", "callback"} if own == "" else set()  # fastlora.patch and the like
    wrong = {layer for layer in imported_layers(file) - lazily_loaded if RANK[layer] > RANK[own]}
    assert not wrong, f"{own or '__init__'} may not import {wrong}"


@pytest.mark.parametrize("room", ["kernels", "benchmarks"])
def test_top_level_folder_is_part_of_the_package(room):
    folder = PACKAGE / room
    assert folder.is_symlink() and folder.resolve() == PACKAGE.parent / room
    assert not (folder / "__init__.py").exists(), "it would shadow the package that others import as this"
