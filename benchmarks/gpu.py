"""Everything that has to be shown on a GPU, in steps of minutes that can be interrupted and gone on with.

    python benchmarks/gpu.py                     every step that has no complete result yet
    python benchmarks/gpu.py --only sweep        one step
    python benchmarks/gpu.py --from sweep        a step and those after it
    python benchmarks/gpu.py --summary           the goals, from what is there
    python benchmarks/gpu.py --device cpu --tiny the same code on tiny sizes, kernels interpreted: finds the typos

Needs torch, triton and a GPU, and no installation of fastlora. PEFT, bitsandbytes, transformers and pytest are used
where they are there; what is missing is listed as missing. Every step has a share of the time: when it is spent, what
was measured is written and the next step has its turn; what is left of --minutes goes to those that are not complete,
and the next call goes on from there. A case that fails is a row with its error. Once `tune` has run, the plans and
tiles that it found are used. Results go to benchmarks/results/<device>/: a CSV for each step, and gpu.json with where,
when and with what it was measured; the call ends with the goals, what to try next, and benchmarks/RESULTS.md.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))  # runs without being installed, from anywhere

# The seconds of a step's first turn, the most decisive first: time on a GPU is short.
SECONDS = {
    "environment": 30, "smoke": 90, "rates": 30, "tune": 120, "sweep": 180, "decode": 50, "compare": 100, "experts": 50,
    "graph": 30, "profile": 30, "correctness": 300,
}  # fmt: skip
STEPS = tuple(SECONDS)
Rows = list[dict[str, Any]]


@dataclass
class Run:
    """What a step is given: the device, how long it may take, and which of its cases are done already."""

    device: Any  # torch.device
    name: str  # of the device
    folder: Path
    tiny: bool
    deadline: float
    again: bool  # nothing of an earlier call counts
    results: dict[str, Rows]  # of all steps
    done: set[str] = field(default_factory=set)
    case: str | None = None  # that is being measured

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


def main(argv: list[str] | None = None) -> int:
    """0: all that was asked for is complete; 1: something failed or time ran out; 2: no use; 130: interrupted."""
    args = _parse(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is talkative
    if args.device == "cpu":
        sys.path.insert(0, str(ROOT / "tests"))
        import interpreter

        if "triton" not in sys.modules:
            interpreter.enable()
        interpreter.repair()
    import torch

    from fastlora.benchmarks.arguments import UsageError
    from fastlora.benchmarks.environment import refuse_changed_code
    from fastlora.benchmarks.records import folder_name

    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu.py: needs a GPU that torch sees; --device cpu --tiny tries the code out without one", file=sys.stderr
        )
        return 2
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    folder = args.out / folder_name(name)
    if args.summary:
        return _summary(folder)
    try:
        refuse_changed_code(folder)
    except UsageError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    steps = [args.only] if args.only else STEPS[STEPS.index(args.start) :]
    args.end = time.monotonic() + 60 * args.minutes
    complete: dict[str, bool | None] = dict.fromkeys(steps, False)
    try:
        for seconds in (SECONDS, dict.fromkeys(steps, float("inf"))):  # a turn each, then as long as there is time
            for step in [step for step in steps if complete[step] is False]:
                if time.monotonic() < args.end:
                    deadline = min(args.end, time.monotonic() + seconds[step])
                    complete[step] = _run_step(step, args, device, name, folder, deadline)
            args.again = False
    except KeyboardInterrupt:
        return 130
    _summary(folder)
    if args.out == RESULTS:
        _write_report()
    return 0 if all(complete.values()) else 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", choices=STEPS, metavar="STEP", help=f"one of {', '.join(STEPS)}")
    add("--from", dest="start", choices=STEPS, default=STEPS[0], metavar="STEP", help="this step and those after it")
    add("--again", action="store_true", help="measure again what has a complete result")
    add("--minutes", type=float, default=9, help="of this call (default: 9)")
    add("--summary", action="store_true", help="only print the goals")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu needs --tiny")
    add("--tiny", action="store_true", help="tiny sizes")
    add("--commit", help="which commit this is, where there is no git to ask")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu only tries the code out: give --tiny too")
    return args


def _run_step(
    step: str, args: argparse.Namespace, device: Any, name: str, folder: Path, deadline: float
) -> bool | None:
    """Go on with a step until it is complete or its time is spent. Whether it is complete; None if it failed."""
    from fastlora import plans
    from fastlora.benchmarks import gpu_steps
    from fastlora.benchmarks.cases.ops import kernels
    from fastlora.benchmarks.records import read_rows, write_rows

    state, environment = read_state(folder), _environment(device, args)
    before = state.get(step)
    again = args.again or before is None
    if before is not None and not again:
        of = before["environment"]
        if before["complete"] and (folder / f"{step}.csv").is_file():
            print(f"{step}: complete, from {of['date']}, commit {of['commit']}")
            return True
        again = of["commit"] != environment["commit"]  # what one commit did and another do not belong in one file
    rows = [] if again else read_rows(folder / f"{step}.csv")
    plans.read_from(folder / plans.TABLE_FILE)  # which `tune` writes
    start = time.monotonic()
    others = {other: read_rows(folder / f"{other}.csv") for other in STEPS}
    done = {row["case"] for row in rows}
    run = Run(device, name, folder, args.tiny, deadline, again, others, done)
    complete, failed, broken, interrupted = False, None, False, None

    def write() -> None:
        if not rows and before is not None:
            return  # what an earlier call left stays until there is something to take its place
        write_rows(folder / f"{step}.csv", rows)
        seconds = round(time.monotonic() - start, 1)
        state[step] = {"complete": complete, "error": failed, "seconds": seconds, "environment": environment}
        write_state(folder, state)

    try:
        with kernels(device):
            complete = _collect(getattr(gpu_steps, f"step_{step}")(run), run, rows, write)
    except KeyboardInterrupt as error:
        interrupted = error
    except Exception as error:
        failed = _described(error)
        traceback.print_exc()
        broken = _broken(device)
        if broken and run.case is not None:
            rows.append({"case": run.case, "error": failed})  # the next call passes over it
    finally:
        write()
    outcome = "not complete; the next call goes on"
    if complete:
        errors = sum(row.get("error") is not None and row.get("provider") is None for row in rows)
        outcome = "complete" + f", {errors} cases failed" * (errors > 0)
    elif failed:
        outcome = f"failed, {failed}"
    print(f"{step}: {outcome} ({len(rows)} rows, {time.monotonic() - start:.1f} s)", flush=True)
    if interrupted:
        raise interrupted
    if broken:
        _start_anew(step, run.case, args)
    return None if failed else complete


def _described(error: Exception) -> str:
    """In a line that every file can hold."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line}".encode(errors="replace").decode()


def _start_anew(step: str, case: str | None, args: argparse.Namespace) -> None:
    """Nothing more can run on the device in this process: go on in another one, past the case (or step) that did it,
    for as long as this one had."""
    following = STEPS[STEPS.index(step) + (case is None) :]
    if (args.only and case is None) or not following:
        return
    arguments = ["--device", args.device, "--out", str(args.out), "--minutes", str((args.end - time.monotonic()) / 60)]
    arguments += ["--tiny"] * args.tiny + (["--commit", args.commit] if args.commit else [])
    arguments += [f"--only={step}"] if args.only else ["--from", following[0]]
    os.execv(sys.executable, [sys.executable, __file__, *arguments])


def _collect(cases: Iterator[tuple[str, Any]], run: Run, rows: Rows, write: Callable[[], None]) -> bool:
    """Measure a step's cases but those that are done, writing rows now and then. False if time ran out before the
    last."""
    from fastlora.benchmarks.protocol import free

    written = time.monotonic()
    for case, measure in cases:
        if case in run.done:
            continue
        run.case = case
        rows += [{"case": case, **row} for row in _measured(case, measure, run)]
        run.case = None  # a step that works between its cases says itself at what
        free()
        if time.monotonic() - written > 10:
            write()
            written = time.monotonic()
        if run.seconds_left <= 0:
            # Asking for the next case would measure it; a step whose last case this was finds that out at once.
            return False
    return True


def _measured(case: str, measure: Any, run: Run) -> Rows:
    """The rows of a case. One that fails, for want of memory perhaps, has a row that says so, unless it has left the
    device unusable."""
    try:
        found = measure() if callable(measure) else measure
        print(f"  {case}", flush=True)
        return found
    except Exception as error:
        if _broken(run.device):
            raise
        reason = _described(error)
        print(f"  {case}: {reason}", flush=True)
        return [{"error": reason}]


def _broken(device: Any) -> bool:
    """Whether an earlier kernel has left the device unusable for this process."""
    import torch

    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
    return False


def _environment(device: Any, args: argparse.Namespace) -> dict:
    from fastlora.benchmarks.environment import environment
    from fastlora.benchmarks.records import clocks

    found = environment(device)
    return {**found, "commit": found["commit"] or args.commit, "clocks": clocks(device), "tiny": args.tiny}


def read_state(folder: Path) -> dict[str, dict]:
    """What `gpu.json` says of each step; of none where it is missing or damaged."""
    try:
        found = json.loads((folder / "gpu.json").read_text())
        of_steps = {step: found[step] for step in STEPS if step in found}
        for entry in of_steps.values():
            entry["complete"], entry["error"], *map(entry["environment"].__getitem__, ("commit", "date", "tiny"))
        return of_steps
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write_state(folder: Path, state: dict[str, dict]) -> None:
    from fastlora.files import replace_file

    text = json.dumps({step: state[step] for step in STEPS if step in state}, indent=1) + "\n"
    replace_file(folder / "gpu.json", lambda path: path.write_text(text))


def _summary(folder: Path) -> int:
    from fastlora.benchmarks.records import read_rows

    state = read_state(folder)
    tiny = any(entry["environment"]["tiny"] for entry in state.values())
    print(
        f"\n{folder.name}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC" + ("  (tiny sizes: no measurement)" if tiny else "")
    )
    for step in STEPS:
        entry = state.get(step)
        status = "-" if entry is None else "complete" if entry["complete"] else entry["error"] or "partly"
        print(f"  {step:<12} {status}")
    results = {} if tiny else {step: read_rows(folder / f"{step}.csv") for step in STEPS}
    print("\n".join(goal_lines(goals(results))))
    if advice := to_try(results):
        print("\nto try next:\n" + "\n".join(f"  {line}" for line in advice))
    return 0


def _write_report() -> None:
    try:
        from fastlora.benchmarks import report
    except ImportError as missing:
        print(f"RESULTS.md is not written: {missing.name} is not installed; `python -m benchmarks.report` does it")
        return
    report.main([])


# ---- what is to be reached on a GPU, and whether it was: from the rows of the results, and nothing else


class Goal(NamedTuple):
    """``got`` is None where it was not measured."""

    text: str
    target: float
    got: float | None
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        if self.got is None:
            return None
        return self.got >= self.target if self.at_least else self.got <= self.target


def goals(results: dict[str, Rows]) -> list[Goal]:
    """The goals of a training step's seven linears at 8192 tokens and r=16, of decoding and of generation."""
    sweep = results.get("sweep", [])
    bf16 = {name: block_seconds(sweep, "bf16", name) for name in ("frozen", "peft", "addmm")}
    nf4 = {name: block_seconds(sweep, "nf4", name) for name in ("frozen", "peft")}
    ours, ours_nf4 = block_seconds(sweep, "bf16", "fastlora"), block_seconds(sweep, "nf4", "fastlora")
    tests = results.get("smoke", []) + results.get("correctness", [])
    outcomes = [row.get("outcome") for row in tests if row.get("outcome") != "skipped"]
    passed = sum(o == "passed" for o in outcomes) / len(outcomes) if outcomes else None
    checks = [row["outcome"] for row in results.get("graph", []) if row.get("outcome") is not None]
    decode, compare = results.get("decode", []), results.get("compare", [])
    whole = {base: model_seconds(compare, base, "fastlora") for base in ("bf16", "nf4")}
    return [
        Goal("tests on the device that pass", 1.0, passed),
        Goal("checks of CUDA graphs that hold", 1.0, sum(checks) / len(checks) if checks else None),
        Goal("bf16: faster than eager PEFT", 1.25, ratio(bf16["peft"], ours)),
        Goal("bf16: faster than the addmm style", 1.12, ratio(bf16["addmm"], ours)),
        Goal("bf16: time over the frozen layers", 1.10, ratio(ours, bf16["frozen"]), at_least=False),
        Goal("NF4: faster than PEFT + bitsandbytes", 1.40, ratio(nf4["peft"], ours_nf4)),
        Goal("NF4: time over PEFT's bf16 LoRA", 1.00, ratio(ours_nf4, bf16["peft"]), at_least=False),
        Goal(
            "Llama-2-7B, bf16: time over the frozen model",
            1.10,
            ratio(whole["bf16"], model_seconds(compare, "bf16", "frozen")),
            at_least=False,
        ),
        Goal(
            "Llama-2-7B, NF4: time over PEFT's bf16 LoRA",
            1.00,
            ratio(whole["nf4"], model_seconds(compare, "bf16", "peft")),
            at_least=False,
        ),
        Goal("decode: share of copy bandwidth", 0.85, bandwidth(decode, "decode")),
        Goal("NF4, 1 token: share of copy bandwidth", 0.70, bandwidth(decode, "nf4_matmul M=1")),
        Goal("NF4, 16 tokens: share of copy bandwidth", 0.70, bandwidth(decode, "nf4_matmul M=16")),
    ]


def block_seconds(rows: Rows, base: str, provider: str, M: int = 8192, r: int = 16) -> float | None:
    """Forward and backward of all seven linears; None unless all of them were measured."""
    found = [
        (row["count"], row["p50"])
        for row in rows
        if tuple(map(row.get, ("base", "provider", "M", "r", "mode"))) == (base, provider, M, r, "step")
    ]
    if sum(count for count, _ in found) != 7 or any(p50 is None for _, p50 in found):
        return None
    return sum(count * p50 for count, p50 in found)


def model_seconds(rows: Rows, base: str, provider: str) -> float | None:
    """A training step of a whole Llama-2-7B on 2048 tokens."""
    case = ("llama-2-7b", base, provider, 2048)
    found = [row for row in rows if tuple(map(row.get, ("model", "base", "provider", "tokens"))) == case]
    return next((row["p50"] for row in found if not row.get("how") and not row.get("dropout")), None)


def bandwidth(rows: Rows, mode: str) -> float | None:
    """Bytes of all seven weights over their time, as a share of the copy bandwidth measured on the device."""
    found = [row for row in rows if (row.get("provider"), row.get("mode")) == ("fastlora", mode)]
    if sum(row["count"] for row in found) != 7 or any(row["p50"] is None for row in found):
        return None
    seconds = sum(row["count"] * row["p50"] for row in found)
    return sum(row["count"] * row["p50"] * row["roofline"] for row in found) / seconds


def to_try(results: dict[str, Rows]) -> list[str]:
    """What the rows say is worth a look: failures, plans that were chosen and are not the fastest, predictions that
    are far off, and what takes most of a step's time."""
    found = [
        f"{step}: {row['case']} failed: {row['error']}"
        for step, rows in results.items()
        for row in rows
        if row.get("error") and not row.get("provider") and row.get("kernel") is None
    ]
    found += [
        f"{step}: {row['case']} {row['outcome']}: {row.get('reason')}"
        for step in ("smoke", "correctness")
        for row in results.get(step, [])
        if row.get("outcome") in ("failed", "did not end")
    ]
    steps: dict[str, dict[str, dict]] = {}
    for row in results.get("sweep", []):
        if row.get("mode") == "step" and row.get("p50") and row["provider"].startswith("fastlora"):
            steps.setdefault(row["case"], {})[row["provider"]] = row
    for case, ours in steps.items():
        best = min(ours.values(), key=lambda row: row["p50"])
        chosen = ours.get("fastlora")
        if chosen is None:
            continue
        if chosen["p50"] > 1.05 * best["p50"]:
            found.append(f"plan: {case}: {best['provider']} takes {best['p50'] / chosen['p50']:.2f} of what was chosen")
        if chosen.get("predicted") and not 1 / 1.3 < chosen["p50"] / chosen["predicted"] < 1.3:
            found.append(f"model: {case}: takes {chosen['p50'] / chosen['predicted']:.2f} times what was predicted")
    kernels = [row for row in results.get("profile", []) if row.get("case") == "bf16 fastlora" and row.get("share")]
    found += [f"time: {row['share']:.0%} of a bf16 block's steps is {row['kernel'][:60]}" for row in kernels[:3]]
    return found


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def goal_lines(found: list[Goal]) -> list[str]:
    text = {True: "met", False: "MISSED", None: "not measured"}
    width = max(len(goal.text) for goal in found)
    return [
        f"  {goal.text:<{width}}  {'>=' if goal.at_least else '<='} {goal.target:.2f}  "
        f"{'    -' if goal.got is None else f'{goal.got:5.2f}'}  {text[goal.met]}"
        for goal in found
    ]


if __name__ == "__main__":
    sys.exit(main())
