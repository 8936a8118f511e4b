"""Where a training step's time goes: every moment of one step in exactly one category, from torch.profiler's trace.

On a CPU a moment belongs to the op that computes; on a GPU to the kernel that runs, which belongs to the op that
launched it. A moment in which nothing computes is a host gap: Python, the dispatcher, the autograd engine.

What an op counts as is decided by its name and by where it was called, never by its shapes, which may coincide (a rank
may equal a layer's width). Modules are ranges in the trace, and a node of backward belongs to where its forward op ran.
"""

import heapq
import json
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile, record_function

from fastlora.autograd import AddAdapter, DeferredProduct, FusedLinear
from fastlora.experts import FusedExperts
from fastlora.mixed_batch import MixedLinear
from fastlora.mlp import FusedMLP
from fastlora.parallel import ParallelLinear

BASE, ADAPTER, DECODE, ATTENTION = "base products", "adapter", "decode", "attention"
ELEMENTWISE, LOSS, OPTIMIZER, GAPS = "elementwise and norms", "head and loss", "optimizer", "host gaps"
CATEGORIES = (BASE, ADAPTER, DECODE, ATTENTION, ELEMENTWISE, LOSS, OPTIMIZER, GAPS)
PHASES = ("forward", "backward", "optimizer")

# Ops that are the same thing wherever they run. fastlora's products hold the adapter's part of y and of dx.
_OPS = {
    "fastlora::lora_matmul": BASE,
    "fastlora::lora_matmul_group": BASE,
    "fastlora::lora_matmul_4bit": BASE,
    "fastlora::nf4_matmul": BASE,
    "fastlora::shrink": ADAPTER,
    "fastlora::shrink_group": ADAPTER,
    "fastlora::lora_grad": ADAPTER,
    "fastlora::lora_grad_a": ADAPTER,
    "fastlora::decode_4bit": DECODE,
    "fastlora::lora_matmul_experts": BASE,
    "fastlora::lora_matmul_experts_4bit": BASE,
    "fastlora::shrink_experts": ADAPTER,
    "fastlora::lora_grad_experts": ADAPTER,
    "fastlora::combine_experts": ELEMENTWISE,
    "fastlora::dora_grad": ELEMENTWISE,
    "fastlora::swiglu": ELEMENTWISE,
    "fastlora::swiglu_backward_": ELEMENTWISE,
    "bitsandbytes::gemm_4bit": BASE,
    "bitsandbytes::gemv_4bit": BASE,
    "bitsandbytes::dequantize_4bit": DECODE,
    "bitsandbytes::dequantize_blockwise": DECODE,
}
_WRAPPERS = (
    "bitsandbytes::gemm_4bit",
    "fastlora::lora_matmul_4bit",
    "fastlora::lora_matmul_experts_4bit",
    "fastlora::nf4_matmul",
)  # may decode and multiply by calling other ops
_PRODUCTS = (
    *("aten::mm", "aten::addmm", "aten::addmm_", "aten::mkldnn_linear", "aten::_scaled_mm", "aten::_int_mm"),
    "aten::_grouped_mm",  # of experts
)
_ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention", "aten::bmm", "aten::baddbmm")
_NO_WORK = ("aten::empty", "aten::new_empty", "aten::resize", "aten::_unsafe_view")  # names that begin so
_SUMS = ("aten::add", "aten::add_")

# What a range means for the ops called in it. In _FUSED, matrix products are the base's, all other ops the adapter's.
_MODEL, _FUSED = "model", "fused"
# Where a tensor has several uses, autograd adds up their gradients while it evaluates the node of the last of them.
# PEFT's forward runs the base layer before the adapter, so backward reaches the base layer last: a sum at its node
# belongs to the adapter. A sum at an adapter's node adds whole layers, as it would without adapters.
_MEETING = {BASE: ADAPTER, ADAPTER: _MODEL}
_FUNCTIONS = {  # AddAdapter only adds an adapter to what a base layer has computed
    function.__name__ + backward: ADAPTER if function is AddAdapter else _FUSED
    for function in (FusedLinear, FusedMLP, FusedExperts, MixedLinear, ParallelLinear, DeferredProduct, AddAdapter)
    for backward in ("", "Backward")
}
# What PEFT makes at a call of experts and drops after it: they add the adapters of all experts to their weights.
_OF_PEFT = dict.fromkeys(("_LoraFactorsProxy", "_LoraParameterProxy"), "experts' weights + adapters")
_NODE, _ACCUMULATE = "autograd::engine::evaluate_function: ", "torch::autograd::AccumulateGrad"
_STEP, _PHASE = "training step", "phase: "


@dataclass
class Timeline:
    """One step, in nanoseconds: ``spent[phase][category]``, which add up to ``wall``.

    ``ops[category][name]`` are how many calls of an op (kernels, on a GPU) there were, and what they took.
    """

    wall: int
    spent: dict[str, dict[str, int]]
    ops: dict[str, dict[str, list[int]]]

    def by_category(self) -> dict[str, int]:
        return {name: sum(self.spent[phase][name] for phase in PHASES) for name in CATEGORIES}

    def by_phase(self) -> dict[str, int]:
        return {phase: sum(self.spent[phase].values()) for phase in PHASES}


def record(
    model: nn.Module,
    forward: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    shapes: bool = False,
) -> tuple[Timeline, dict]:
    """Profile a step, ``forward().backward()`` and the optimizer's: its timeline and its Chrome trace.

    Gradients are set to None. The output head, if the model names one, tells the loss from the model.

    Args:
        shapes: let the trace say the shapes of every op's inputs, which slows the step further.
    """
    device = next(model.parameters()).device
    names, contexts = ranges_of(model)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    synchronize(device)
    with profile(activities=activities, record_shapes=shapes) as recorded, _named(names), record_function(_STEP):
        with record_function(_PHASE + "forward"):
            loss = forward()
        with record_function(_PHASE + "backward"):
            loss.backward()
        with record_function(_PHASE + "optimizer"):
            if optimizer is not None:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    trace.pop("host_name", None)
    trace.pop("traceName", None)
    return read(trace, contexts), trace


def ranges_of(model: nn.Module) -> tuple[dict[nn.Module, str], dict[str, str]]:
    """The modules that become ranges, by name, and what each range means."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    names: dict[nn.Module, str] = {}
    contexts: dict[str, str] = dict.fromkeys(_OF_PEFT.values(), ADAPTER)
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)  # an adapted layer, PEFT's or patched, has one
        if module is head:
            context = LOSS
        elif isinstance(base, nn.Module):
            context = ADAPTER
        elif name.rpartition(".")[2] == "base_layer":
            context = BASE
        elif any(module.children()) and not any(part.startswith("lora_") for part in name.split(".")):
            context = _MODEL
        else:
            continue
        if name:
            names[module], contexts[name] = name, context
    return names, contexts


@contextmanager
def _named(names: dict[nn.Module, str]) -> Iterator[None]:
    """Calls of these modules are ranges of their names. Global hooks: a module's own would change what runs."""
    open_ranges: list[record_function] = []

    def name_of(module: nn.Module) -> str | None:
        return names.get(module) or _OF_PEFT.get(type(module).__name__)

    def enter(module: nn.Module, _: Any) -> None:
        if (name := name_of(module)) is not None:
            open_ranges.append(record_function(name))
            open_ranges[-1].__enter__()

    def leave(module: nn.Module, *_: Any) -> None:
        if name_of(module) is not None:
            open_ranges.pop().__exit__(None, None, None)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Interval(NamedTuple):
    start: int
    end: int
    category: str
    phase: str
    op: str


class _Frame(NamedTuple):
    """An event that is open: what holds for the events inside it."""

    end: int
    context: str
    phase: str
    owner: tuple[str, str] | None = None  # category and name of the op that everything inside belongs to
    is_node: bool = False  # of backward


def read(trace: dict, contexts: dict[str, str]) -> Timeline:
    """The timeline of a trace that holds one step; ``contexts`` as of `ranges_of`."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    step = next(event for event in events if event["name"] == _STEP and event["cat"] == "user_annotation")
    start, end = _span(step)
    phases = sorted(
        (_span(event)[0], event["name"].removeprefix(_PHASE))
        for event in events
        if event["name"].startswith(_PHASE) and event["cat"] == "user_annotation"
    )

    def phase_at(time: int) -> str:
        return phases[max(0, bisect_right(phases, time, key=lambda each: each[0]) - 1)][1]

    host = _Host(contexts, phase_at)
    threads: dict[Any, list[dict]] = {step["tid"]: []}  # the one that runs forward is read first
    for event in events:
        if event["cat"] in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
            threads.setdefault(event["tid"], []).append(event)
    for thread in threads.values():
        host.read(thread)
    kernels = [
        _Interval(*_span(event), *host.launches[event["args"]["correlation"]])
        for event in events
        if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset") and event["args"]["correlation"] in host.launches
    ]
    intervals = [interval for interval in kernels or host.computing if start <= interval.start < end]
    spent = {phase: dict.fromkeys(CATEGORIES, 0) for phase in PHASES}
    ops: dict[str, dict[str, list[int]]] = {name: {} for name in CATEGORIES if name != GAPS}
    for interval in intervals:
        ops[interval.category].setdefault(interval.op, [0, 0])[0] += 1
    for begin, stop, owner in _partition(intervals, start, end):
        if owner is None:
            cuts = [begin, *(time for time, _ in phases if begin < time < stop), stop]
            for since, until in pairwise(cuts):
                spent[phase_at(since)][GAPS] += until - since
        else:
            spent[owner.phase][owner.category] += stop - begin
            ops[owner.category][owner.op][1] += stop - begin
    return Timeline(end - start, spent, ops)


class _Host:
    """What the threads of the host do: which ops compute when, and which op launches which kernel."""

    def __init__(self, contexts: dict[str, str], phase_at: Callable[[int], str]) -> None:
        self.contexts, self.phase_at = contexts, phase_at
        self.computing: list[_Interval] = []
        self.launches: dict[int, tuple[str, str, str]] = {}  # correlation -> category, phase, op
        self.called: dict[int, str] = {}  # autograd's sequence number -> where its forward op was called
        self.in_loss = False

    def read(self, thread: list[dict]) -> None:
        stack: list[_Frame] = []
        for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            start, end = _span(event)
            while stack and stack[-1].end <= start:
                stack.pop()
            parent = stack[-1] if stack else _Frame(end, _MODEL, self.phase_at(start))
            frame = self._enter(event, parent, start, end)
            stack.append(frame._replace(end=min(end, parent.end)))

    def _enter(self, event: dict, parent: _Frame, start: int, end: int) -> _Frame:
        name, kind, args = event["name"], event["cat"], event.get("args", {})
        phase, owner = parent.phase, parent.owner
        if kind in ("cuda_runtime", "cuda_driver"):
            if "correlation" in args:
                kernel_of, op = owner or (category("", parent.context, phase), "outside of ops")
                self.launches[args["correlation"]] = kernel_of, phase, op
            return parent
        if kind == "user_annotation":
            if name.startswith(_PHASE):
                phase = name.removeprefix(_PHASE)
            context = self.contexts.get(name, parent.context)
            self.in_loss |= context == LOSS and phase == "forward"
            return _Frame(end, context, phase, owner)

        context = _FUNCTIONS.get(name, parent.context)
        if self.in_loss and context == _MODEL and phase == "forward":
            context = LOSS  # the head comes last, and what follows it is the loss
        sequence = args.get("Sequence number", -1)
        is_node = name.startswith(_NODE)
        if parent.is_node and name in _SUMS:
            context = _MEETING.get(context, context)
        elif is_node:
            context = ADAPTER if name.endswith(_ACCUMULATE) else self.called.get(sequence, _MODEL)
        elif phase == "forward" and sequence >= 0:
            self.called[sequence] = context  # the last op to bear a number is the one that made the node
        if owner is None and computes(name):
            own = category(name, context, phase)
            self.computing.append(_Interval(start, end, own, phase, name))
            owner = None if name in _WRAPPERS else (own, name)
        return _Frame(end, context, phase, owner, is_node)


def category(name: str, context: str, phase: str) -> str:
    """What an op of this name counts as, called there."""
    if phase == "optimizer":
        return OPTIMIZER
    if name in _OPS:
        return _OPS[name]
    if context == LOSS or "log_softmax" in name or "nll_loss" in name:
        return LOSS
    if context == ADAPTER or (context == _FUSED and name not in _PRODUCTS):
        return ADAPTER
    if any(part in name for part in _ATTENTION) or name.startswith("aten::_softmax"):
        return ATTENTION
    return BASE if name in _PRODUCTS else ELEMENTWISE


@cache
def computes(name: str) -> bool:
    """Whether an op works on data: not if it only calls other ops, makes a view, or allocates."""
    namespace, _, op = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), op, None) if op.isidentifier() else None
    if packet is None or name.startswith(_NO_WORK):
        return False
    overloads = [getattr(packet, o) for o in packet.overloads() if "out" not in o and "Dimname" not in o]
    if any(overload.is_view for overload in overloads):
        return False
    return not all(o.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd) for o in overloads)


def _partition(intervals: list[_Interval], start: int, end: int) -> Iterator[tuple[int, int, _Interval | None]]:
    """Cut [start, end) into pieces that each belong to the interval that began last, or to none."""
    active: list[tuple[int, int, _Interval]] = []
    now = start
    for i, interval in enumerate([*sorted(intervals), _Interval(end, end, "", "", "")]):
        begin = min(max(interval.start, start), end)
        while now < begin:
            while active and active[0][2].end <= now:
                heapq.heappop(active)
            current = active[0][2] if active else None
            until = begin if current is None else min(begin, current.end)
            yield now, until, current
            now = until
        heapq.heappush(active, (-interval.start, -i, interval))


def _span(event: dict) -> tuple[int, int]:
    """Start and end in nanoseconds; the trace has microseconds to three decimals."""
    start = round(event["ts"] * 1000)
    return start, start + round(event["dur"] * 1000)
