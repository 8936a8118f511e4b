"""What is to be reached on a GPU, and whether it was: from the rows of the results, and nothing else."""

from typing import NamedTuple

from fastlora.benchmarks.records import Rows


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
    outcomes = [row["outcome"] for row in tests if row["outcome"] != "skipped"]
    passed = sum(o == "passed" for o in outcomes) / len(outcomes) if outcomes else None
    checks = [row["outcome"] for row in results.get("graph", []) if row["outcome"] is not None]
    decode = results.get("decode", [])
    return [
        Goal("tests on the device that pass", 1.0, passed),
        Goal("checks of CUDA graphs that hold", 1.0, sum(checks) / len(checks) if checks else None),
        Goal("bf16: faster than eager PEFT", 1.25, ratio(bf16["peft"], ours)),
        Goal("bf16: faster than the addmm style", 1.12, ratio(bf16["addmm"], ours)),
        Goal("bf16: time over the frozen layers", 1.10, ratio(ours, bf16["frozen"]), at_least=False),
        Goal("NF4: faster than PEFT + bitsandbytes", 1.40, ratio(nf4["peft"], ours_nf4)),
        Goal("NF4: time over PEFT's bf16 LoRA", 1.00, ratio(ours_nf4, bf16["peft"]), at_least=False),
        Goal("decode: share of copy bandwidth", 0.85, bandwidth(decode, "decode")),
        Goal("NF4, 1 token: share of copy bandwidth", 0.70, bandwidth(decode, "nf4_matmul M=1")),
        Goal("NF4, 16 tokens: share of copy bandwidth", 0.70, bandwidth(decode, "nf4_matmul M=16")),
    ]


def block_seconds(rows: Rows, base: str, provider: str, M: int = 8192, r: int = 16) -> float | None:
    """Forward and backward of all seven linears; None unless all of them were measured."""
    found = [
        (row["count"], row["p50"])
        for row in rows
        if (row["base"], row["provider"], row["M"], row["r"], row["mode"]) == (base, provider, M, r, "step")
    ]
    if sum(count for count, _ in found) != 7 or any(p50 is None for _, p50 in found):
        return None
    return sum(count * p50 for count, p50 in found)


def bandwidth(rows: Rows, mode: str) -> float | None:
    """Bytes of all seven weights over their time, as a share of the copy bandwidth measured on the device."""
    found = [row for row in rows if (row["provider"], row["mode"]) == ("fastlora", mode)]
    if sum(row["count"] for row in found) != 7 or any(row["p50"] is None for row in found):
        return None
    seconds = sum(row["count"] * row["p50"] for row in found)
    return sum(row["count"] * row["p50"] * row["roofline"] for row in found) / seconds


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def lines(found: list[Goal]) -> list[str]:
    text = {True: "met", False: "MISSED", None: "not measured"}
    width = max(len(goal.text) for goal in found)
    return [
        f"  {goal.text:<{width}}  {'>=' if goal.at_least else '<='} {goal.target:.2f}  "
        f"{'    -' if goal.got is None else f'{goal.got:5.2f}'}  {text[goal.met]}"
        for goal in found
    ]
