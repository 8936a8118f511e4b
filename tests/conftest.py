"""Settings for all tests: nothing is fetched, every test starts from the same seed, GPU and slow tests are opt-in."""

import gc
import os
from collections import defaultdict

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import interpreter
import pytest
import torch

try:
    import hypothesis
except ModuleNotFoundError:  # a machine with a GPU need have no more than pytest
    hypothesis = None

interpreter.enable()

if hypothesis is not None:
    # The same examples in every run; --hypothesis-profile=random looks for new ones.
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("random", deadline=None, suppress_health_check=slow, print_blob=True)
    hypothesis.settings.register_profile("same", parent=hypothesis.settings.get_profile("random"), derandomize=True)
    hypothesis.settings.load_profile("same")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--kernels-in-interpreter", action="store_true", help="run the ops by the GPU's kernels, interpreted"
    )
    parser.addoption("--no-cpu-kernels", action="store_true", help="test torch's ops, as if nothing had been compiled")


def pytest_configure(config):
    if config.getoption("--no-cpu-kernels"):

        def refuse(path):
            raise OSError("switched off by --no-cpu-kernels")

        torch.ops.load_library = refuse  # before fastlora is imported


def left_out(items: list) -> set:
    """Of tests marked ``one_case_in(n)`` all cases but those whose places on all axes add up to a multiple of n. Every
    value of an axis is still met if another axis has at least n."""
    places = defaultdict(dict)  # of a value on its axis, in order of appearance
    found = set()
    for item in items:
        if (sample := item.get_closest_marker("one_case_in")) is None:
            continue
        total = 0
        for axis in item.iter_markers("parametrize"):
            names = axis.args[0].split(",") if isinstance(axis.args[0], str) else axis.args[0]
            values = tuple(id(item.callspec.params[name.strip()]) for name in names)
            seen = places[item.nodeid.partition("[")[0], *names]
            total += seen.setdefault(values, len(seen))
        if total % sample.args[0]:
            found.add(item)
    return found


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        left = left_out(items)
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    not_now = pytest.mark.skip(reason="slow: run with --slow")
    as_installed = not (config.getoption("--kernels-in-interpreter") or config.getoption("--no-cpu-kernels"))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        slow = item.get_closest_marker("slow") or (not as_installed and item.get_closest_marker("as_installed"))
        if slow and not config.getoption("--slow"):
            item.add_marker(not_now)


@pytest.fixture(scope="module", autouse=True)
def old_objects_are_not_searched():
    """What was imported so far is millions of objects, through which every ``gc.collect()`` would go."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def nan_in_empty():
    """``torch.empty`` returns NaN, so an element that nobody writes cannot hide."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The file of measured plans in an empty cache directory, and a process that has not read it."""
    from fastlora import plans

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plans.forget()
    yield tmp_path / "fastlora" / "plans.json"
    plans.forget()


@pytest.fixture
def bitsandbytes_eager():
    """bitsandbytes compiles its generic decoding anew for every shape: not while many shapes are tested."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def compiling():
    """For tests that compile: in a module with `bitsandbytes_eager` they would run eagerly, and show nothing."""
    torch.compiler.reset()
    with torch.compiler.set_stance("default"):
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Products this small only lose by being shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def kernels(request):
    """With --kernels-in-interpreter every op on CPU tensors runs the kernel that a GPU would launch."""
    if not request.config.getoption("--kernels-in-interpreter"):
        yield
        return
    with interpreter.kernels():
        yield
