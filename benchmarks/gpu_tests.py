"""The tests that `gpu.py` runs: in several processes, within its budget, going on where an earlier call stopped.

This module is a pytest plugin too, which notes outcomes as they come and leaves out the tests that have one:

    pytest -p benchmarks.gpu_tests --outcomes FILE --shard 0/8 --seconds 300
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

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


# ---- who starts pytest


def run_tests(run: Any, name: str, arguments: list[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """pytest, its tests dealt out to several processes because most of the time is compiling."""
    shards = 1 if run.tiny else max(1, min(8, (os.cpu_count() or 1) // 2))
    run.folder.mkdir(parents=True, exist_ok=True)
    notes = [run.folder / f"{name}-{shard}.jsonl" for shard in range(shards)]
    if run.again:
        for path in notes:
            path.unlink(missing_ok=True)
    with ThreadPoolExecutor(shards) as pool:
        ends = list(pool.map(partial(_pytest, run, arguments, shards), range(shards), notes))
    for outcome in (outcome for path in notes for outcome in read(path)):
        yield outcome["test"], [{name: outcome[name] for name in ("outcome", "seconds", "reason")}]
    for code, text in ends:
        if code not in (0, 1, STOPPED, 5):  # all passed, some failed, out of time, nothing was left to run
            raise RuntimeError(f"pytest ended with {code}: {text[-2000:]}")
    if any(code == STOPPED for code, _ in ends):
        run.deadline = 0.0
        yield "out of time", []


def _pytest(run: Any, arguments: list[str], shards: int, shard: int, notes: Path) -> tuple[int, str]:
    """Run one shard, again and again while its tests break the device, and stop it if one hangs."""
    plugins = ["-p", "benchmarks.gpu_tests", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *arguments]
    command += ["--outcomes", str(notes), "--shard", f"{shard}/{shards}", "--seconds"]
    while True:
        left = max(1.0, run.seconds_left - 20)
        worker = subprocess.Popen(
            [*command, str(left)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            text, _ = worker.communicate(timeout=left + 60)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.communicate()
            return STOPPED, "a test did not end"
        if worker.returncode != BROKEN:
            return worker.returncode, text
