"""The C++ extension: that it is there, which file is taken, and what only its kernels promise."""

import os
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from fastlora import extension, ops, reference

op = torch.ops.fastlora
SEED = torch.tensor(7)
loaded = pytest.mark.skipif(ops.NO_CPU_KERNELS is not None, reason=f"no CPU kernels: {ops.NO_CPU_KERNELS}")


def test_is_loaded_where_there_is_a_compiler(request):
    if request.config.getoption("--no-cpu-kernels"):
        assert ops.NO_CPU_KERNELS == "cannot be loaded: switched off by --no-cpu-kernels"
    elif shutil.which("c++"):
        assert ops.NO_CPU_KERNELS is None


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package folder with sources and, as test cases add them, built extensions."""
    folder = tmp_path / "fastlora"
    (folder / "kernels" / "cpu").mkdir(parents=True)
    (folder / "kernels" / "cpu" / "adapter.cpp").touch()
    monkeypatch.setattr(extension, "__file__", str(folder / "extension.py"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    return folder


@pytest.fixture
def loads(monkeypatch):
    paths: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", paths.append)
    return paths


def test_not_built(package, loads):
    assert "not built" in extension.load()
    assert not loads


def test_takes_the_best_build_that_this_processor_runs(package, loads):
    for name in ("avx2", "avx512", "avx512_bf16"):
        (package / f"_cpu_{name}.so").touch()
    assert extension.load() is None
    assert [path.name for path in loads] == ["_cpu_avx2.so"]


def test_a_build_for_a_better_processor_is_not_loaded(package, loads):
    (package / "_cpu_avx512.so").touch()
    assert "not built for this processor" in extension.load()


def build(package):
    """What setup.py leaves: a library with the fingerprint of its sources."""
    setup = package.parent / "setup.py"
    setup.touch()
    fingerprint = extension.fingerprint(package / "kernels" / "cpu", setup)
    (package / "_cpu_avx2.so").write_bytes(b"code" + bytes.fromhex(fingerprint) + b"more")


def test_sources_that_were_only_touched_keep_the_kernels(package, loads):
    build(package)
    os.utime(package / "_cpu_avx2.so", (0, 0))
    assert extension.load() is None
    assert len(loads) == 1


@pytest.mark.parametrize("changed", ["fastlora/kernels/cpu/adapter.cpp", "fastlora/kernels/cpu/new.h", "setup.py"])
def test_a_build_of_other_sources_is_warned_of_and_not_loaded(changed, package, loads):
    build(package)
    (package.parent / changed).write_text("// changed")
    with pytest.warns(UserWarning, match="runs without its CPU kernels: out of date") as caught:
        assert "out of date" in extension.load()
    assert len(caught) == 1 and not loads


@loaded
def test_the_build_here_is_of_the_sources_here():
    folder = Path(extension.__file__).parent
    fingerprint = extension.fingerprint(folder / "kernels" / "cpu", folder.parent / "setup.py")
    assert bytes.fromhex(fingerprint) in extension._find().read_bytes()


def test_a_build_that_does_not_load_is_named(package):
    (package / "_cpu_avx2.so").write_bytes(b"no library")
    with pytest.warns(UserWarning, match="runs without its CPU kernels: cannot be loaded"):
        assert extension.load().startswith("cannot be loaded: ")


def problem(M, K, N, r, dtype, adapter_dtype):
    shapes = (M, K), (N, K), (r, K), (N, r), (N,), (M, N)
    x, w, a, b, bias, dy = (torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes)
    return x.to(dtype), w.to(dtype), a.to(adapter_dtype), b.to(adapter_dtype), bias.to(dtype), dy.to(dtype)


def layer(x, w, a, b, bias, dy, p):
    """Everything that forward and backward compute."""
    seed = SEED if p else None
    xa = op.shrink(x, a, 0.7, p, seed)
    y = op.lora_matmul(x, w, xa, b, bias)
    dxa, da, db = op.lora_grad(dy, x, b, xa, 0.7, p, seed)
    return xa, y, dxa, da, db, op.lora_matmul(dy, w.t(), dxa, a.t(), None, p, seed)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@loaded
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    """All of bf16's; of the others what does not contain torch's base product."""
    args = problem(300, 200, 170, 24, dtype, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            xa, y, dxa, da, db, dx = layer(*args, 0.3)
            results.append((xa, dxa, da, db, y, dx) if dtype == torch.bfloat16 else (xa, dxa, da, db))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(t, first) for t, first in zip(other, results[0], strict=True))


@loaded
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "M, K, N",
    [
        (15, 64, 64),  # too few rows for a matrix instruction
        (16, 64, 64),
        (100, 65, 48),  # odd K: no pairs
        (130, 1100, 100),  # more than one panel, the last one short
        (2049, 2048, 2050),  # beyond `tail`: the adapter first, then oneDNN
    ],
    ids=str,
)
def test_every_way_of_the_product(M, K, N, p):
    args = problem(M, K, N, 16, torch.bfloat16, torch.float32)
    x, w, a, b, bias, dy = (t.float() for t in args)
    xa, y, dxa, da, db, dx = layer(*args, p)
    seed = SEED if p else None
    true_dxa, true_da, true_db = reference.lora_grad(dy, x, b, xa, 0.7, p, seed)
    for ours, true, roundings in (
        (xa, reference.shrink(x, a, 0.7, p, seed), 0),
        (y, reference.lora_matmul(x, w, xa, b, bias), 1),
        (dxa, true_dxa, 0),
        (da, true_da, 0),
        (db, true_db, 0),
        (dx, reference.lora_matmul(dy, w.t(), dxa, a.t(), None, p, seed), 1),
    ):
        error = (ours.float() - true).norm() / true.norm()
        # fp32 adapters keep 16 bits; a rounding to bf16 costs 1/sqrt(12) of its 2^-7 and, in `expand`, happens twice
        assert error < (2**-7 / 12**0.5 * 2**0.5 if roundings else 2**-16)


@loaded
@pytest.mark.parametrize("K", [64, 65], ids=["tail", "expand"])
@pytest.mark.parametrize("in_b", [False, True], ids=["xa", "b"])
def test_fp32_operands_count_beyond_bf16(in_b, K):
    """1 + 2^-9 is 1 in bf16: a sum in which the ones cancel out shows what was kept of it."""
    fine, ones = torch.tensor([[1 + 2**-9, 1.0]]), torch.tensor([[1.0, -1.0]])
    xa, b = (ones, fine) if in_b else (fine, ones)
    x, w = torch.zeros(64, K, dtype=torch.bfloat16), torch.zeros(48, K, dtype=torch.bfloat16)
    y = op.lora_matmul(x, w, xa.expand(64, 2).contiguous(), b.expand(48, 2).contiguous())
    assert torch.equal(y, torch.full_like(y, 2**-9))


@loaded
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_infinities_and_nans_come_out_as_they_went_in(bad):
    x, _w, a, _b, _bias, _dy = problem(32, 64, 64, 4, torch.bfloat16, torch.float32)
    x.abs_()
    a[1, 3] = bad
    column = op.shrink(x, a, 1.0)[:, 1]
    assert torch.equal(column, torch.full_like(column, bad)) or (bad != bad and column.isnan().all())


@loaded
def test_bad_calls_raise():
    x, _w, a, _b, _bias, dy = problem(4, 8, 8, 2, torch.float32, torch.float32)
    with pytest.raises(RuntimeError, match="dropout needs a seed"):
        op.shrink(x, a, 1.0, 0.5)
    with pytest.raises(RuntimeError, match="needs b or xa"):
        op.lora_grad(dy, x, None, None, 1.0)


@pytest.mark.parametrize(
    "vectors, bf16, taken",
    [
        ("DEFAULT", False, None),
        ("AVX2", False, "_cpu_avx2.so"),
        ("AVX512", False, "_cpu_avx512.so"),
        ("AVX512", True, "_cpu_avx512_bf16.so"),
    ],
)
def test_of_a_wheel_with_all_builds_the_right_one_is_loaded(vectors, bf16, taken, package, loads, monkeypatch):
    for name in ("avx2", "avx512", "avx512_bf16"):
        (package / f"_cpu_{name}.so").touch()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    assert (extension.load() is None) == (taken is not None)
    assert [path.name for path in loads] == ([] if taken is None else [taken])


@pytest.mark.parametrize(
    "asked, built",
    [
        ("all", ["avx2", "avx512", "avx512_bf16"]),
        ("AVX2,AVX512", ["avx2", "avx512"]),
        ("AVX512", ["avx512"]),
        ("NEON", []),
        ("AVX2,NEON", []),
    ],
)
def test_setup_builds_what_it_is_asked_for(asked, built, monkeypatch):
    arguments = {}
    root = Path(extension.__file__).resolve().parents[1]
    monkeypatch.chdir(root)
    monkeypatch.setattr("setuptools.setup", lambda **given: arguments.update(given))
    monkeypatch.setenv("FASTLORA_CPU_CAPABILITY", asked)
    runpy.run_path(str(root / "setup.py"))
    extensions = arguments.get("ext_modules", [])
    assert [each.name for each in extensions] == [f"fastlora._cpu_{name}" for name in built]
    assert all(("-mavx512bf16" in each.extra_compile_args) == each.name.endswith("_bf16") for each in extensions)
    assert all(("-mavx512f" in each.extra_compile_args) == ("avx512" in each.name) for each in extensions)
