"""The same cases by this code and by another git revision's, in turn: for judging a change.

Each revision runs in a process of its own, which waits while the other is timed. The other revision's code stands in a
worktree that is removed afterwards; the harness in both is this one.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
OTHER, THIS = "other", "this"


# `python -m fastlora.benchmarks.against`, without the finder of an editable installation: that finds this checkout's
# modules where a revision has none of that name.
_START = """
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "fastlora" not in getattr(finder, "__module__", "")]
runpy.run_module("fastlora.benchmarks.against", run_name="__main__", alter_sys=True)
"""


class RevisionError(ValueError):
    """The revision does not exist, or cannot be measured by this harness. The message says why."""


@contextmanager
def checkout(revision: str) -> Iterator[tuple[Path, str]]:
    """A worktree of the revision with this harness in it and its C++ extension built, and the revision's commit."""
    commit = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if commit is None:
        raise RevisionError(f"--against {revision}: there is no such revision in {ROOT.name}'s repository")
    folder = Path(tempfile.mkdtemp(prefix="fastlora-against-"))
    tree = folder / "tree"
    try:
        if git("worktree", "add", "--detach", "--quiet", str(tree), commit) is None:
            raise RevisionError(f"--against {revision}: git worktree add failed")
        shutil.rmtree(tree / "benchmarks", ignore_errors=True)
        ignored = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / "benchmarks", tree / "benchmarks", ignore=ignored)
        link = tree / "fastlora" / "benchmarks"
        if not link.is_symlink():
            link.symlink_to("../benchmarks")
        _check_imports(tree, revision)
        _extension(tree, commit)
        yield tree, commit
    finally:
        git("worktree", "remove", "--force", str(tree))
        shutil.rmtree(folder, ignore_errors=True)


def _check_imports(tree: Path, revision: str) -> None:
    """Raise RevisionError if this harness cannot import the revision's modules, before its extension is compiled."""
    ran = subprocess.run(**_harness(tree), input="", capture_output=True)  # without a question it only imports
    if ran.returncode:
        raise RevisionError(
            f"--against {revision}: the benchmarks of this checkout do not run on the code of that revision "
            f"({_last_line(ran.stderr)}). Choose a later one, in which the modules that benchmarks import have the "
            "same names as here"
        )


def _harness(tree: Path) -> dict[str, Any]:
    """The arguments of subprocess that run `serve` with the code of one tree."""
    path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A thread that waits for the next question must not spin on a core that the other revision is timed on.
    environment = os.environ | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"}
    return {"args": [sys.executable, "-P", "-c", _START], "cwd": tree, "env": environment, "text": True}


def _last_line(stderr: str) -> str:
    return (stderr.strip().splitlines() or ["it printed no reason"])[-1]


def _extension(tree: Path, commit: str) -> None:
    """This checkout's extension if nothing of it has changed since, otherwise one that is built."""
    built = list((ROOT / "fastlora").glob("_cpu*.so"))
    if not built:
        return
    if git("diff", "--quiet", commit, "--", "kernels/cpu", "setup.py") is not None:
        for file in built:
            shutil.copy(file, tree / "fastlora")  # with the time of now: newer than its sources
            os.utime(tree / "fastlora" / file.name)
        return
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    ran = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if ran.returncode or not list((tree / "fastlora").glob("_cpu*.so")):
        raise RevisionError(f"its C++ extension does not build: {(ran.stderr or ran.stdout).strip()[-300:]}")


def git(*command: str) -> str | None:
    """What git prints, None if it fails."""
    ran = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    return None if ran.returncode else ran.stdout.strip()


class Worker:
    """A process that measures with the code of one tree, a question at a time."""

    def __init__(self, tree: Path) -> None:
        pipe = subprocess.PIPE
        self.process: subprocess.Popen[str] = subprocess.Popen(**_harness(tree), stdin=pipe, stdout=pipe, stderr=pipe)

    def ask(self, **question: Any) -> Any:
        assert self.process.stdin and self.process.stdout and self.process.stderr
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RevisionError(_last_line(self.process.stderr.read()))
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.communicate()


def run(
    revision: str, cases: list[Any], device: Any, rounds: int, modes: list[str]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields (what is being done, nothing), and after every case (its name, a row for each mode).

    Raises RevisionError.
    """
    from fastlora.benchmarks import protocol

    yield f"checking out {revision}", []
    with ExitStack() as stack:
        tree, commit = stack.enter_context(checkout(revision))
        workers = {OTHER: stack.enter_context(Worker(tree)), THIS: stack.enter_context(Worker(ROOT))}
        for worker in workers.values():
            worker.ask(device=str(device))
        for case in cases:
            facts = {name: worker.ask(case=asdict(case)) for name, worker in workers.items()}
            rows = [
                case.row() | {"provider": f"fastlora, {name}", "mode": None, "error": fact["error"]}
                for name, fact in facts.items()
                if fact["error"]
            ]
            if not rows:
                turns = _turns(workers, modes, rounds)
                rows = [_row(case, mode, turns, facts, commit, protocol) for mode in modes]
            yield str(case), rows


def _turns(workers: Mapping[str, Worker], modes: list[str], rounds: int) -> dict[tuple[str, str], list[list[float]]]:
    from fastlora.benchmarks import tuning

    ways = {(name, mode): (worker, mode) for name, worker in workers.items() for mode in modes}
    return tuning.measure(ways, lambda way: way[0].ask(mode=way[1]), rounds)


def _row(case: Any, mode: str, turns: Any, facts: Any, commit: str, protocol: Any) -> dict[str, Any]:
    other, this = turns[OTHER, mode], turns[THIS, mode]
    return case.row() | {
        "mode": mode,
        "against": commit[:12],
        "other_p50": protocol.quantiles(other)["p50"],
        "this_p50": protocol.quantiles(this)["p50"],
        "speedup": protocol.ratio(other, this),
        "other_saved_bytes": facts[OTHER]["saved_bytes"],
        "this_saved_bytes": facts[THIS]["saved_bytes"],
        "error": None,
    }


def serve(questions: IO[str], answers: IO[str]) -> None:
    """Answer one JSON line with another: a device, a case to get ready, or a mode to take a turn of."""
    import torch

    from fastlora.benchmarks import protocol
    from fastlora.benchmarks.cases import modules
    from fastlora.benchmarks.environment import keep_freed_memory
    from fastlora.benchmarks.providers import PROVIDERS

    keep_freed_memory()
    device, provider = torch.device("cpu"), PROVIDERS["fastlora"]
    ways: dict[str, protocol.Way] = {}
    for line in questions:
        question = json.loads(line)
        answer: Any = None
        if "device" in question:
            device = torch.device(question["device"])
        elif "case" in question:
            ways.clear()
            subject = modules.make_subject(modules.Case(**question["case"]), device)
            module = provider.build(subject)
            _, reason = protocol.Gate(subject).judge(provider, module)
            ways |= protocol.ways_of(subject, provider, module)
            saved = protocol.saved_bytes(module, partial(subject.forward, module))
            answer = {"error": reason, "saved_bytes": saved}
            for way in ways.values():
                way()
        else:
            answer = protocol.clock_of(device)(ways[question["mode"]])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not an answer
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    serve(sys.stdin, answers)
