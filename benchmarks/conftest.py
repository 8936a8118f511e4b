"""Options and units of the regression benchmarks."""


def pytest_addoption(parser):
    parser.addoption("--model-shape", default="smollm2-135m", help="whose layers are timed (default: smollm2-135m)")
    parser.addoption("--m", type=int, default=512, help="tokens (default: 512)")


def pytest_benchmark_scale_unit(config, unit, benchmarks, best, worst, sort):
    """Ratios are printed as they are, "in frozen layer's" time."""
    return ("frozen layer'", 1.0) if unit == "seconds" else ("", 1.0)


def pytest_benchmark_update_machine_info(config, machine_info):
    """What is kept to compare with names no machine."""
    machine_info.pop("node", None)
