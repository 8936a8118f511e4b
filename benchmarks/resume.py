"""A pytest plugin: outcomes are noted as they come, and a later call goes on with the tests that have none.

pytest -p benchmarks.resume --outcomes FILE --shard 0/8 --seconds 300
"""

import json
import sys
import time
from pathlib import Path

import pytest

STOPPED, BROKEN = 2, 90  # exit codes: out of time (pytest's own), and the device takes no more work from this process


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, required=True, help="a line of JSON for each test that ran")
    parser.addoption("--shard", default="0/1", help="i/n: every n-th test, from the i-th")
    parser.addoption("--seconds", type=float, required=True, help="start no test after that long")


def pytest_configure(config):
    config.pluginmanager.register(Resume(config))


def read(path: Path) -> list[dict]:
    """The outcomes noted so far, the last of each test; of one that ended its process only that it began."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            outcome = json.loads(line)
        except json.JSONDecodeError:  # cut off
            continue
        found[outcome["test"]] = outcome
    return list(found.values())


class Resume:
    def __init__(self, config):
        self.path = config.getoption("--outcomes")
        self.deadline = time.monotonic() + config.getoption("--seconds")
        self.shard, self.shards = map(int, config.getoption("--shard").split("/"))
        self.done = {outcome["test"] for outcome in read(self.path)}

    def pytest_collection_modifyitems(self, config, items):
        mine = items[self.shard :: self.shards]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(mine)])
        items[:] = [item for item in mine if item.nodeid not in self.done]

    def pytest_runtest_logstart(self, nodeid):
        self._note(nodeid, "did not end")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":  # a set-up that fails or skips has no call
            self._note(report.nodeid, report.outcome, report.duration, _reason(report))

    def _note(self, test, outcome, seconds=0.0, reason=""):
        with self.path.open("a") as file:
            file.write(json.dumps({"test": test, "outcome": outcome, "seconds": seconds, "reason": reason}) + "\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        result = yield
        if _broken():
            pytest.exit("the device takes no more work", returncode=BROKEN)
        if time.monotonic() > self.deadline:
            item.session.shouldstop = "time is spent"
        return result


def _reason(report) -> str:
    """Why a test failed or was skipped, in a line."""
    if report.outcome == "passed":
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    return next(iter(text.strip().splitlines()), "")[:200]


def _broken() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
