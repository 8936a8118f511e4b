"""Every architecture of transformers that runs from a tiny configuration: trained with plain PEFT and patched.

    python tests/architectures.py [--only REGEX] [--json FILE]      prints a line for each and a summary

A row of the table is a model type of transformers' own registry, so new families join by themselves.
"""

import argparse
import copy
import json
import re
import signal
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from blocks import graph_of
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_inputs import Inputs, inputs_for, run
from tiny_models import tiny_config
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.pytorch_utils import Conv1D

from fastlora.peft import patch

MOST_PARAMETERS = 20_000_000  # more are none that a rule made tiny
MOST_SECONDS = 60  # of processor time, so that what else the machine does decides nothing
MOST_CLASSES = 4  # of one model type are tried

# Both sides are fp32 and take the same sums in another order. One layer differs by 1e-6 of its norm; a thousandth
# leaves room for what two layers, norms and softmaxes of a tiny model with random weights make of that.
TOLERANCE = 1e-3
# A gradient that exact arithmetic makes zero (of what a softmax or a norm does not see) consists of rounding alone, so
# its own norm is no measure. Rounding follows the terms that cancel, which are about as large as other gradients are.
NOISE = 1e-4  # of the largest gradient of the model

# An activation with a kink (a relu, a top-k, a code book) can fall to the other side by a rounding, which two of eight
# million elements have been seen to do. A norm of numbers that are nearly equal multiplies rounding, in plain PEFT too:
# xclip's gradients are a hundredth off those in fp64. That is luck of the numbers: a fault shows with every draw of the
# adapters.
DRAWS = 3

FIRST_HEADS = (
    *("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
    *("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM", "CTC"),
)

# Statuses. Those of NOT_RUN say that there is nothing to compare with.
NOT_BUILT, NO_ADAPTERS, NO_PLAIN_RUN = "not built", "no linear layers", "plain fails"
EQUAL, RAISED, DIFFERS, MERGE_RAISED, MERGE_DIFFERS = "equal", "raises", "differs", "merge raises", "merge differs"
NOT_RUN = (NOT_BUILT, NO_ADAPTERS, NO_PLAIN_RUN)


@dataclass
class Result:
    """What became of one model type. ``worst`` is the largest relative difference of a gradient; ``without_x`` counts
    the layers that keep nothing for an x that an activation made (`layers_without_x`)."""

    model_type: str
    status: str = NOT_BUILT
    reason: str = ""
    model_class: str = ""
    inputs: list[str] = field(default_factory=list)
    patched: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    fused: int = 0
    not_fused: dict[str, str] = field(default_factory=dict)
    without_x: int = 0
    worst: float = 0.0
    merged: str = ""
    seconds: float = 0.0
    trace: str = ""

    @property
    def ran(self) -> bool:
        return self.status not in NOT_RUN

    @property
    def has_mlps(self) -> bool:
        return self.fused + len(self.not_fused) > 0

    @property
    def keeps_no_activation(self) -> bool:
        """Whether every MLP is computed as one, or its last layer does not keep its x."""
        return self.without_x >= len(self.not_fused)

    def __str__(self) -> str:
        layers = (
            f"{self.patched} layers, {self.fused} of {self.fused + len(self.not_fused)} blocks" if self.patched else ""
        )
        numbers = f"{layers:28} {self.worst:7.0e} {self.seconds:5.1f} s"
        return f"{self.model_type:32} {self.status:16} {numbers}  {self.model_class} {self.reason[:160]}"


def model_types() -> list[str]:
    """Of each folder of models, the types that are not a part of another one there."""
    families = defaultdict(list)
    for model_type in CONFIG_MAPPING_NAMES:
        families[model_type_to_module_name(model_type)].append(model_type)
    found = []
    for types in families.values():
        parts = {part for t in types for part in CONFIG_MAPPING[t].sub_configs.values()} if len(types) > 1 else set()
        found += [t for t in types if CONFIG_MAPPING[t] not in parts]
    return found


def model_classes(model_type: str) -> list[str]:
    """The names of its models: language models first, then without a head, then with any other head."""
    mappings = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in FIRST_HEADS] + ["MODEL_MAPPING_NAMES"]
    mappings += [name for name in dir(modeling_auto) if re.fullmatch("MODEL_FOR_.*_MAPPING_NAMES", name)]
    found = []
    for mapping in mappings:
        names = getattr(modeling_auto, mapping).get(model_type, ())
        found += [names] if isinstance(names, str) else names
    return list(dict.fromkeys(found))


def build(model_type: str) -> tuple[nn.Module, Inputs]:
    """The first tiny model of this type that runs, and inputs. Raises RuntimeError with what each class raised."""
    errors = []
    for name in model_classes(model_type)[:MOST_CLASSES]:
        try:
            model = _build(getattr(transformers, name), model_type)
            return model, inputs_for(model)
        except Exception as error:  # of a model that is not ours, with a configuration nobody meant
            errors.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:1500]}")
            if isinstance(error, TimeoutError):
                break
    raise RuntimeError(" || ".join(errors) or "no class of models")


def _build(model_class: type, model_type: str) -> nn.Module:
    size = 0
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class(tiny_config(model_type)).parameters())
    except Exception:  # some cannot be made without storage: then they are as they are
        pass
    if size > MOST_PARAMETERS:
        raise RuntimeError(f"{size / 1e6:.0f} million parameters: no rule made it tiny")
    torch.manual_seed(0)
    return model_class(tiny_config(model_type)).float().train().requires_grad_(False)


def adapted_ways(model: nn.Module, draw: int = 0) -> Iterator[PeftModel]:
    """``model`` with adapters: as PEFT chooses the layers, and if that does not run, on every plain linear layer. The
    weights of experts get adapters too, if PEFT can adapt them."""
    linears = [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    allowed = [name for name in linears if not name.endswith("out_proj")]  # PEFT refuses those of Mamba
    stacks = [name for name, p in model.named_parameters() if p.dim() == 3]
    experts = [name for name in stacks if name.endswith(("gate_up_proj", "up_proj", "down_proj"))]
    ways = [(targets, weights) for weights in (experts, None) for targets in ("all-linear", linears, allowed)]
    for targets, weights in ways:
        try:
            config = LoraConfig(r=4, target_modules=targets, target_parameters=weights)
            peft_model = get_peft_model(copy.deepcopy(model), config)
        except Exception as error:
            if (targets, weights) == ways[-1]:
                raise LookupError(f"PEFT adapts no layer: {error}") from error
            continue
        generator = torch.Generator().manual_seed(3 + draw)
        for name, parameter in peft_model.named_parameters():
            if ".lora_B." in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        yield peft_model


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of floating point in a model's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = list(output.values()) if isinstance(output, dict) else output
    return [tensor for part in parts for tensor in tensors_of(part)] if isinstance(parts, list | tuple) else []


KEEP_THEIR_OUTPUT = ("ReluBackward0", "TanhBackward0", "SigmoidBackward0")  # which is the x of the next layer


def layers_without_x(loss: Tensor) -> int:
    """How many fused layers of this graph keep nothing for their x, which is the output of an activation."""
    layers = [node for node in graph_of(loss) if type(node).__name__ == "FusedLinearBackward"]
    of_output = [node for node in layers if type(node.next_functions[0][0]).__name__ in KEEP_THEIR_OUTPUT]
    return len({node for node in layers if node.again is not None} | set(of_output))


def train(model: nn.Module, inputs: Inputs) -> dict[str, Tensor | None]:
    """The gradients of a training step, and the loss."""
    return gradients_of(loss_of(model, inputs), model)


def gradients_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor | None]:
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"loss": loss.detach()}


def loss_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """The loss of the model in training.

    It is an inner product with fixed random numbers: a sum of squares of what a layer norm puts out is constant.
    """
    model.train()
    generator = torch.Generator().manual_seed(2)
    loss = torch.zeros(())
    for y in tensors_of(run(model, inputs)):
        if y.requires_grad:
            finite = torch.where(y.isfinite(), y, 0.0)
            loss = loss + (finite * torch.randn(y.shape, generator=generator)).sum() / max(y.numel(), 1) ** 0.5
    return loss


def evaluate(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        return tensors_of(run(model, inputs))


def difference(ours: Tensor, theirs: Tensor, floor: float = 0.0) -> float:
    """‖ours - theirs‖ / ‖theirs‖, of finite elements; where one is infinite or NaN, the other must be too."""
    if not torch.equal(ours.isfinite(), theirs.isfinite()):
        return float("inf")
    ours, theirs = (t.double().where(t.isfinite(), 0.0) for t in (ours, theirs))
    norm = theirs.norm().clamp_min(max(floor, 1e-12))  # where theirs is zero, ours has to be
    return ((ours - theirs).norm() / norm).item()


def compare(model_type: str) -> Result:
    """Train, evaluate and merge one model type, plain and patched."""
    start = time.process_time()
    for draw in range(DRAWS):
        result = Result(model_type)
        try:
            with _at_most(MOST_SECONDS):
                _compare(result, draw)
        except Exception as error:
            result.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            result.trace = traceback.format_exc()
        if result.status not in (DIFFERS, MERGE_DIFFERS):
            break
    result.seconds = time.process_time() - start
    return result


def _compare(result: Result, draw: int) -> None:
    model, inputs = build(result.model_type)
    result.model_class = type(model).__name__
    result.inputs = [f"{name}{list(value.shape)}" for name, value in inputs.items()]
    result.status = NO_ADAPTERS
    plain, patched, gradients = _trained(model, inputs, result, draw)
    result.status = RAISED
    report = patch(patched)
    result.patched, result.skipped = len(report.patched), dict(report.skipped)
    result.fused, result.not_fused = len(report.fused), dict(report.not_fused)
    loss = loss_of(patched, inputs)
    result.without_x = layers_without_x(loss)
    ours = gradients_of(loss, patched)
    result.status = DIFFERS
    _check_gradients(result, ours, gradients)
    result.status = RAISED
    theirs, ours = evaluate(plain, inputs), evaluate(patched, inputs)
    result.status = DIFFERS
    _check_outputs("outputs", ours, theirs)
    try:
        theirs = evaluate(plain.merge_and_unload(), inputs)
    except Exception as error:  # PEFT's own
        result.merged = f"plain fails: {error}"
    else:
        result.status = MERGE_RAISED
        ours = evaluate(patched.merge_and_unload(), inputs)
        result.status = MERGE_DIFFERS
        _check_outputs("merged outputs", ours, theirs)
        result.merged = EQUAL
    result.status = EQUAL


def _trained(
    model: nn.Module, inputs: Inputs, result: Result, draw: int
) -> tuple[PeftModel, PeftModel, dict[str, Tensor | None]]:
    """A plain model that has trained a step, a copy from before, and the gradients."""
    reason: Exception | None = None
    for plain in adapted_ways(model, draw):
        result.status = NO_PLAIN_RUN
        copied = copy.deepcopy(plain)
        try:
            gradients = train(plain, inputs)
        except Exception as error:  # PEFT's own, or of a layer that puts out more than a tensor
            reason = error
            continue
        if any(g is not None and g.norm() > 0 for name, g in gradients.items() if name != "loss"):
            return plain, copied, gradients
        reason = RuntimeError("no adapter takes part")
    raise reason or LookupError("PEFT adapts no layer")


def _check_gradients(result: Result, ours: dict, theirs: dict) -> None:
    floor = NOISE * max(g.norm().item() for name, g in theirs.items() if g is not None)
    differences = []
    for name, gradient in theirs.items():
        if (gradient is None) != (ours[name] is None):
            raise AssertionError(f"{name} has a gradient {'patched' if gradient is None else 'in plain PEFT'} only")
        if gradient is not None:
            differences.append((difference(ours[name], gradient, floor), name))
    result.worst, name = max(differences)
    if not result.worst <= TOLERANCE:
        raise AssertionError(f"the gradient of {name} differs by {result.worst:.1e}")


def _check_outputs(what: str, ours: list[Tensor], theirs: list[Tensor]) -> None:
    worst = max((difference(o, t) for o, t in zip(ours, theirs, strict=True)), default=0.0)
    if not worst <= TOLERANCE:
        raise AssertionError(f"{what} differ by {worst:.1e}")


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def late(*_):
        raise TimeoutError(f"takes more than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def summary(results: list[Result]) -> str:
    """How many ran and what came of it, and why layers and blocks are left as they are, most frequent first."""
    ran = [r for r in results if r.ran]
    fused, kept = sum(r.fused for r in ran), sum(len(r.not_fused) for r in ran)
    mlps = [r for r in ran if r.has_mlps]
    lines = [
        f"{len(results)} model types, {len(ran)} run with plain PEFT: {_counted(r.status for r in ran)}",
        f"not compared: {_counted(r.status for r in results if not r.ran)}",
        f"{sum(r.patched for r in ran)} layers patched, {sum(len(r.skipped) for r in ran)} left to PEFT; "
        f"{fused} blocks computed as one, {kept} layer by layer",
        f"{len(mlps)} have MLPs: {sum(not r.not_fused for r in mlps)} with all of them computed as one, "
        f"{sum(r.keeps_no_activation for r in mlps)} with no activation kept",
        f"merged: {_counted('plain PEFT fails' if r.merged != EQUAL else EQUAL for r in ran if r.merged)}",
    ]
    for what, reasons in (
        ("left to PEFT", [reason for r in ran for reason in r.skipped.values()]),
        ("layer by layer", [reason for r in ran for reason in r.not_fused.values()]),
    ):
        grouped = Counter(re.sub(r"\d+|'[^']*'", "…", reason)[:120] for reason in reasons)
        lines += [f"  {count:4} {what}: {reason}" for reason, count in grouped.most_common()]
    return "\n".join(lines)


def _counted(statuses: Any) -> str:
    return ", ".join(f"{count} {status}" for status, count in Counter(statuses).most_common()) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=".*", metavar="REGEX", help="of whole model types")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th model type, from the I-th on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    start, step = map(int, args.part.split("/"))
    results = []
    for model_type in [t for t in model_types() if re.fullmatch(args.only, t)][start::step]:
        results.append(compare(model_type))
        print(results[-1], flush=True)
    print(summary(results))
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


if __name__ == "__main__":
    main()
