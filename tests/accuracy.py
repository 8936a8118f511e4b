"""The one judge of accuracy: our error against an fp64 truth must not exceed that of PEFT's layer in the same dtypes.

    error(t) = ‖t - truth‖ / ‖truth‖                       (Frobenius, for each of y, dx, da, db, dbias)
    ours    <= 1.5 · PEFT's + floor

The truth is `fastlora.reference` in fp64 on the inputs as rounded, each side judged with the dropout mask it drew.
The floor is there because PEFT's error is a sample, and on a few elements often zero by luck. A result takes at most
four roundings to the compute dtype one after the other (adapter, xa, adapter's product, sum) of half an ulp each, and
sums of at most L terms in fp32, L = max(M, K, N, r), whose errors walk randomly. Over n elements they average out. So

    floor = (2 eps(compute dtype) + sqrt(L) eps(fp32)) / sqrt(n) · scale / ‖truth‖

with n the distinct elements of the smallest tensor on the way, and scale the root of the sum of the squares of all
terms that are added up (what independent errors amount to when the terms cancel), but no less than ‖truth‖.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import bitsandbytes as bnb
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from fastlora import functional, ops, reference
from fastlora.fourbit import is_4bit, weight_4bit

FACTOR = 1.5

Results = dict[str, Tensor]  # y, and dx, da, db, dbias where they were asked for


@dataclass(frozen=True)
class Problem:
    """One layer with its input and upstream gradient. ``x[..., K]``, ``dy[..., N]``, the rest as in `reference`."""

    x: Tensor
    base: nn.Module  # nn.Linear or bitsandbytes Linear4bit
    a: Tensor
    b: Tensor
    s: float
    dy: Tensor
    p: float = 0.0
    train_bias: bool = False
    seed: int = 0  # of torch's generator when dropout is drawn

    @property
    def M(self) -> int:
        return self.x.shape[:-1].numel()

    @property
    def K(self) -> int:
        return self.x.shape[-1]

    @property
    def N(self) -> int:
        return self.dy.shape[-1]

    @property
    def r(self) -> int:
        return self.a.shape[0]

    @property
    def bias(self) -> Tensor | None:
        return None if self.base.bias is None else self.base.bias.detach()


class Run(NamedTuple):
    results: Results
    D: Tensor  # the scaled dropout mask it drew, fp64 [M, K]


def linear_4bit(
    w: Tensor, bias: Tensor | None = None, quant_type="nf4", blocksize=64, nested=True, storage=torch.uint8, dtype=None
) -> bnb.nn.Linear4bit:
    """A quantised ``Linear4bit`` that computes in ``dtype`` (w's unless given)."""
    N, K = w.shape
    layer = bnb.nn.Linear4bit(
        K,
        N,
        bias=bias is not None,
        compute_dtype=dtype or w.dtype,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    )
    layer.weight.data = w.clone()
    layer.weight.blocksize = blocksize
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer.to("cpu")


def linear(w: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A frozen ``nn.Linear`` of these tensors."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(w.clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


def decoded(layer: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    """The weight of a layer by `reference`, 4-bit or not."""
    if not is_4bit(layer.weight):
        return layer.weight.detach().to(dtype)
    w, code = weight_4bit(layer.weight), layer.weight.quant_state.code
    absmax = w.absmax
    if w.code2 is not None:
        absmax = reference.decode_absmax(absmax, w.code2, w.absmax2, w.blocksize2, w.offset)
    return reference.decode_4bit(w.packed, absmax, code.double(), w.blocksize, w.N, w.K).to(dtype)


def peft_layer(base: nn.Module, a: Tensor, b: Tensor, s: float, p: float = 0.0) -> PeftLinear:
    """PEFT's layer around a base layer, with these adapter weights."""
    r = a.shape[0]
    layer = PeftLinear(base, "default", LoraConfig(r=r, lora_alpha=1, lora_dropout=p), r=r, lora_alpha=1)
    layer.lora_A["default"].weight = nn.Parameter(a.clone())
    layer.lora_B["default"].weight = nn.Parameter(b.clone())
    layer.scaling["default"] = s
    return layer


def gradients(y: Tensor, dy: Tensor, inputs: dict[str, Tensor | None]) -> Results:
    """y and, under their names, the gradients of those of these inputs that require them."""
    wanted = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype)) if wanted else ()
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def run_ours(c: Problem) -> Run:
    """`fastlora.lora_linear`, forward and backward."""
    x, a, b = (t.detach().requires_grad_() for t in (c.x, c.a, c.b))
    bias = None if c.bias is None else c.bias.requires_grad_(c.train_bias)
    torch.manual_seed(c.seed)
    y = functional.lora_linear(x, c.base.weight, a, b, c.s, bias, c.p)
    torch.manual_seed(c.seed)
    seed = functional.new_seed(x, c.p)
    D = reference.dropout(torch.ones(c.M, c.K, dtype=torch.float64), c.p, seed)
    return Run(gradients(y, c.dy, {"dx": x, "da": a, "db": b, "dbias": bias}), D)


class RecordingDropout(nn.Dropout):
    """Dropout that keeps what it kept."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.get_rng_state()
        out = super().forward(x)
        torch.set_rng_state(state)
        self.kept = super().forward(torch.ones_like(x)) != 0
        return out


def run_peft(c: Problem, autocast: torch.dtype | None = None) -> Run:
    """PEFT's layer, forward and backward; with ``autocast``, its adapters in that dtype as autocast has them.

    Where bitsandbytes misreads its own blocks (some shapes on a CPU), the base is a dense layer of the right weight.
    """
    base, a, b = c.base, c.a, c.b
    if is_4bit(base.weight):
        w = decoded(base, c.x.dtype)
        if not torch.equal(bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).to(w.dtype), w):
            base = linear(w, c.bias)
    if autocast == torch.float16:
        a, b = a.half(), b.half()
    layer = peft_layer(base, a, b, c.s, c.p)
    dropout = layer.lora_dropout["default"] = RecordingDropout(c.p)
    if base.bias is not None:
        base.bias.requires_grad_(c.train_bias)
    x = c.x.detach().requires_grad_()
    torch.manual_seed(c.seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast == torch.bfloat16):
        y = layer(x)
    inputs = {"dx": x, "da": layer.lora_A.default.weight, "db": layer.lora_B.default.weight, "dbias": base.bias}
    return Run(gradients(y, c.dy, inputs), dropout.kept.reshape(c.M, c.K) / (1.0 - c.p))


def law(x, w, a, b, s, bias, dy, D) -> Results:
    """Every formula of `reference`, for the scaled dropout mask D."""
    dropped = D * x
    xa = reference.shrink(dropped, a, s)
    dxa, da, db = reference.lora_grad(dy, dropped, b, xa, s)
    return {
        "y": reference.lora_matmul(x, w, xa, b, bias),
        "dx": dy @ w + D * (dxa @ a),
        "da": da,
        "db": db,
        "dbias": dy.sum(0),
    }


def truth_and_scale(c: Problem, D: Tensor) -> tuple[Results, Results]:
    """The truth, and for every element the root of the sum of squares of the terms it adds up (at least its size).

    No intermediate counts as smaller than the smallest normal number, below which rounding errors no longer shrink.
    """
    bias = torch.zeros((), dtype=torch.float64) if c.bias is None else c.bias.double()
    tensors = c.x.reshape(c.M, c.K).double(), decoded(c.base), c.a.double(), c.b.double()
    dy = c.dy.reshape(c.M, c.N).double()
    truth = law(*tensors, c.s, bias, dy, D)

    least = torch.finfo(c.x.dtype).smallest_normal ** 2
    x, w, a, b = (t.square() for t in tensors)
    s, dy, D = c.s**2, dy.square(), D.square()
    xa, dxa = (s * (D * x) @ a.T).clamp_min(least), (s * dy @ b).clamp_min(least)
    squares = {
        "y": x @ w.T + bias.square() + xa @ b.T,
        "dx": dy @ w + D * (dxa @ a),
        "da": dxa.T @ (D * x),
        "db": dy.T @ xa,
        "dbias": dy.sum(0),
    }
    return truth, {name: torch.maximum(t.square(), squares[name]).sqrt() for name, t in truth.items()}


def floor_without_scale(c: Problem) -> float:
    M = min(_distinct(c.x)[:-1].numel(), _distinct(c.dy)[:-1].numel())
    n = min(M * c.r, c.r * c.K, c.N * c.K, c.r * _distinct(c.dy)[-1], M * c.K, M * c.N)
    longest = max(c.M, c.K, c.N, c.r)
    return (2 * torch.finfo(c.x.dtype).eps + math.sqrt(longest) * torch.finfo(torch.float32).eps) / math.sqrt(n)


def _distinct(t: Tensor) -> torch.Size:
    """Its shape, with 1 for dimensions that it was expanded in."""
    return torch.Size(size if stride else 1 for size, stride in zip(t.shape, t.stride(), strict=True))


def errors_and_floors(c: Problem, run: Run) -> dict[str, tuple[float, float]]:
    """For every result its relative error, and the floor of its bar."""
    truth, scale = truth_and_scale(c, run.D)
    judged = {}
    for name, t in run.results.items():
        expected = truth[name].view(t.shape)
        assert t.isfinite().all(), f"{name} is not finite"
        norm = expected.norm().item()
        if norm == 0.0:  # no tokens, or no scaling: exactly zero
            judged[name] = (t.double().norm().item(), 0.0)
        else:
            floor = floor_without_scale(c) * scale[name].norm().item() / norm
            judged[name] = ((t.double() - expected).norm().item() / norm, floor)
    return judged


def judge(c: Problem) -> dict[str, tuple[float, float, float]]:
    """Our error, PEFT's and the floor for every result."""
    ours = run_ours(c)
    peft = run_peft(c)
    theirs = errors_and_floors(c, peft)
    if c.a.dtype != c.x.dtype and ops.NO_CPU_KERNELS is not None:
        # torch's ops on a CPU have no bf16 product with fp32 results: fp32 adapters are converted, as autocast does
        autocast = run_peft(c, autocast=c.x.dtype)
        theirs |= {name: e for name, e in errors_and_floors(c, autocast).items() if name in ("da", "db")}
    for name, t in ours.results.items():
        assert t.shape == peft.results[name].shape, f"{name}: {list(t.shape)}, PEFT {list(peft.results[name].shape)}"
        assert t.dtype == peft.results[name].dtype, f"{name}: {t.dtype}, PEFT {peft.results[name].dtype}"
    return {name: (error, theirs[name][0], floor) for name, (error, floor) in errors_and_floors(c, ours).items()}


def check(c: Problem) -> None:
    """Assert that we are as accurate as PEFT."""
    judged = judge(c)
    failed = [name for name, (ours, theirs, floor) in judged.items() if ours > FACTOR * theirs + floor]
    table = ", ".join(f"{k}: ours {o:.2e} PEFT {t:.2e} floor {f:.2e}" for k, (o, t, f) in judged.items())
    assert not failed, f"less accurate than PEFT in {failed}: {table}"


def check_model(ours: Results, theirs: Results, truth: Results, longest: int, compute_dtype: torch.dtype) -> None:
    """The same bar for the results of a whole model, its floor being that of one element."""
    floor = 2 * torch.finfo(compute_dtype).eps + math.sqrt(longest) * torch.finfo(torch.float32).eps
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, expected in truth.items():
        assert (ours[name].shape, ours[name].dtype) == (theirs[name].shape, theirs[name].dtype), name
        norm = expected.norm().item() or 1.0
        error, bar = ((t.double() - expected).norm().item() / norm for t in (ours[name], theirs[name]))
        assert error <= FACTOR * bar + floor, f"{name}: ours {error:.2e} PEFT {bar:.2e} floor {floor:.2e}"
