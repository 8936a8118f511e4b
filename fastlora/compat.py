"""The private names of torch, PEFT, Triton and bitsandbytes that fastlora depends on, and what replaces each.

Each is bound here once, at import, so that a call of a layer pays no extra function call for it. A replacement uses
public names only and gives the same results, more slowly; ``tests/test_compat.py`` compares the two and names the
versions that both were seen to work on.

Not here, because they have no replacement and have been stable since PyTorch 1.0: ``nn.Module``'s ``_modules``,
``_parameters``, ``_buffers`` and hook dictionaries, and ``Tensor._version``, ``_base`` and ``_is_view``. bitsandbytes'
``quant_state``, ``packing_format_for_cpu`` and ``fix_4bit_weight_quant_state_from_module`` are read where 4-bit weights
are: `fastlora.fourbit`, `fastlora.base_layers`, `fastlora.base_experts` and `fastlora.nn`.
"""

import contextlib
import types
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function


def find(owner: Any, path: str, fallback: Any) -> Any:
    """The attribute of this dotted path, or ``fallback`` where a part of it does not exist."""
    for name in path.split("."):
        if not hasattr(owner, name):
            return fallback
        owner = getattr(owner, name)
    return owner


# torch: what surrounds a call.


def _unknown_hooks(ignore_is_tracing: bool) -> tuple:
    return ()


# The hooks that saved tensors go through here, or None: whether a layer has to save its tensors before its product, for
# checkpointing. The replacement says that there are some: saving first is right everywhere, and one Function slower.
top_saved_tensors_hooks: Callable = find(torch._C, "_autograd._top_saved_tensors_default_hooks", _unknown_hooks)


# How many modes see every op here, as selective checkpointing's does, which keeps results. The replacement says one,
# which costs a copy under checkpointing.
dispatch_modes: Callable[[], int] = find(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def _maybe_functorch() -> bool:
    return True


# Whether a transform of torch.func is active: no tensor is then shared between layers or written in place, and a
# Function is applied through `Function.apply`. The replacement assumes one, which is right everywhere.
functorch_is_active: Callable[[], bool] = find(torch._C, "_are_functorch_transforms_active", _maybe_functorch)


def functorch_transforms() -> set[str]:
    """The names of the active transforms of torch.func (``"Vmap"``, ``"Grad"``, ...), none where torch cannot say.

    fastlora's Functions have no rule for vmap; where the names cannot be had, torch refuses the call itself.
    """
    try:
        from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters  # imports Triton: not at the top
    except ImportError:
        return set()
    return {level.key().name for level in retrieve_all_functorch_interpreters()}


class _ProbedLevel:
    """Stands in for the module ``torch.autograd.forward_ad``: makes a dual tensor, which fails outside a dual level."""

    @property
    def _current_level(self) -> int:
        try:
            torch.autograd.forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
        except RuntimeError:
            return -1
        return 0


# ``._current_level >= 0`` within forward-mode AD, for which fastlora's Functions have no rule.
forward_ad: Any = torch.autograd.forward_ad if hasattr(torch.autograd.forward_ad, "_current_level") else _ProbedLevel()

# Turns gradients off and on in a sixth of the time that the context manager takes.
set_grad_enabled: Callable[[bool], Any] = find(torch._C, "_set_grad_enabled", torch.set_grad_enabled)


def _maybe_autocast() -> bool:
    return True


# Whether autocast is on for any device, in a tenth of the time that asking for one by name takes. The replacement says
# yes, and the caller then asks by name.
any_autocast_is_enabled: Callable[[], bool] = find(torch._C, "_is_any_autocast_enabled", _maybe_autocast)


# torch: autograd.


def apply_of(function: type[Function]) -> Callable:
    """``function.apply`` for positional arguments outside functorch and torch.compile.

    Those two need a Function that has a ``setup_context``, and of such a one torch inspects the signature of
    ``forward`` at every call, which takes 25 µs. What is applied here does the same in a ``forward`` that is given the
    context.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "setup_context": staticmethod(Function.setup_context)}
    eager: Any = types.new_class(function.__name__, (function,), exec_body=lambda names: names.update(methods))
    return find(super(Function, eager), "apply", eager.apply)


# The number of the backward pass that runs in this thread: keeps what layers hand each other in one pass apart from
# another pass, such as one that an error ended. Without it layers hand each other nothing (`GRAPH_TASKS_ARE_KNOWN`).
GRAPH_TASKS_ARE_KNOWN = hasattr(torch._C, "_current_graph_task_id")
current_graph_task: Callable[[], int] = find(torch._C, "_current_graph_task_id", lambda: -1)

# Whether this backward pass keeps the graph for another one; if it may, saved tensors are copied before being
# overwritten. The replacement says yes.
keeps_graph: Callable[[], bool] = find(torch._C, "_autograd._get_current_graph_task_keep_graph", lambda: True)


def kept_by(node: Any, name: str) -> Tensor | None:
    """What an autograd node saved for its backward under this name, the tensor itself; None where torch cannot say, and
    of what went through saved-tensor hooks, which would bring it back only at a cost."""
    saved = getattr(node, f"_raw_saved_{name}", None)
    return getattr(saved, "data", None) if getattr(saved, "unpack_hook", saved) is None else None


# torch: tensors.


def _copied_view(t: Tensor, shape: Any) -> Tensor:
    return t.view(shape).clone()


# A tensor of another shape that autograd does not know as a view: an output of a custom Function that is a view refuses
# every in-place op on it. The replacement copies.
unsafe_view: Callable[[Tensor, Any], Tensor] = find(torch.ops.aten, "_unsafe_view.default", _copied_view)

OWNERS_ARE_COUNTED = hasattr(torch._C, "_storage_Use_Count") and hasattr(Tensor, "_use_count")


def owners(t: Tensor) -> tuple[int, int] | None:
    """How many owners the storage of t has, and how many its tensor object in C++; None where torch cannot say.

    An adapter is added in place to an output that nothing else owns; where that is unknown it is added out of place.
    """
    if not OWNERS_ARE_COUNTED:
        return None
    return torch._C._storage_Use_Count(t.untyped_storage()._cdata), t._use_count()  # type: ignore[attr-defined]


def share_storage(t: Tensor, u: Tensor) -> bool:
    """Whether two tensors have one storage. Storages without memory (meta tensors) are told apart by their object."""
    first, second = t.untyped_storage(), u.untyped_storage()
    if hasattr(first, "_cdata"):
        return first._cdata == second._cdata
    return t.device == u.device and first.data_ptr() == second.data_ptr() and first.nbytes() > 0


def as_plain_tensor(parameter: Tensor) -> Tensor:
    """A detached plain tensor of a parameter subclass; it shares the version counter, which ``.data`` does not."""
    disabled = find(torch._C, "DisableTorchFunctionSubclass", None)
    if disabled is None:
        return parameter.detach().as_subclass(Tensor)
    with disabled():
        return parameter.detach()


# torch: tracing.


def without_modes() -> contextlib.AbstractContextManager:
    """Runs real ops inside a trace. Without it a block that is first seen by a trace is not fused, and says so."""
    try:
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:
        return contextlib.nullcontext()
    return _disable_current_modes()


def constant_while_tracing(function: Callable) -> Callable:
    """``torch.compiler.assume_constant_result``, which imports all of Dynamo, and so Triton, when it is applied."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def exchanged(cls: type, other: Callable[[type], type | None]) -> type | None:
    """The class to put in the place of this class of a module: its other one; None if there is none.

    FSDP2 gives a module that is sharded by itself a class derived from its own: there the base class is exchanged.
    """
    if (new := other(cls)) is not None:
        return new
    mixin, *rest = cls.__bases__
    if len(rest) == 1 and mixin.__name__ == "FSDPModule" and (new := other(rest[0])) is not None:
        own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        return type(cls.__name__, (mixin, new), own)
    return None


# PEFT. Its public properties take one to three function calls to read.


def attribute(owner: type, private: str, public: str) -> str:
    """The name to read an attribute by: the private one where the class has it."""
    return private if hasattr(owner, private) else public


# Triton. ``compiled[grid](*arguments)`` looks up the stream, makes metadata for hooks and calls empty hooks; below, the
# arguments are searched for tensor descriptors, and the driver is asked of every tensor whether it is on the device.


def launcher_of(compiled: Any) -> tuple[Callable, tuple[Any, ...]] | None:
    """``call`` and ``before`` of ``call(*grid, stream, *before, *arguments)``, which launches a compiled kernel without
    hooks; None where a name is gone: launch by ``[grid]``."""
    run = find(compiled, "run", None)
    function, metadata = (getattr(compiled, name, None) for name in ("function", "packed_metadata"))
    known = run is not None and function is not None and metadata is not None
    return (run, (function, metadata, None, None, None)) if known else None


class DirectLaunch(NamedTuple):
    """The C function below: ``call(*grid, stream, *before, arguments)`` with the arguments in one flat list."""

    call: Callable
    before: tuple[Any, ...]
    signature: dict[str, Any]  # the kernel's arguments: their types, of a tuple a tuple, "constexpr" if not passed on
    length: int  # of the list
    encoders: tuple[Callable[[Any], list[Any]], ...]  # of each tensor descriptor: what is passed on of it


def _encoded(nvidia: Any, how: Any, descriptor: Any) -> list[Any]:
    """The tensor map, then shape and strides."""
    return nvidia.make_tensordesc_arg(descriptor, how, None)


def direct_launch(compiled: Any) -> DirectLaunch | None:
    """How to launch a compiled kernel by it; None before Triton 3.7, on other GPUs than NVIDIA's, where a name is gone
    and where the kernel needs more."""
    try:
        from triton.backends.nvidia import driver as nvidia

        run = compiled.run
        if type(run) is not nvidia.CudaLauncher or run.gsan_enabled:
            return None
        if run.global_scratch_size or run.profile_scratch_size:
            return None
        length = len(run.kernel_signature)
        plain = [nvidia.PyKernelArg(nested_tuple=None, type=nvidia.ARG_KERNEL)] * length
        flags = (run.launch_cooperative_grid, run.launch_pdl, compiled.packed_metadata)
        nothing = (None,) * 5  # metadata for hooks, two hooks, two scratch memories
        return DirectLaunch(
            nvidia.triton.runtime.driver.active.utils.launch,
            (compiled.function, *flags, *nothing, plain, run.kernel_signature),
            compiled.src.signature,
            length,
            tuple(partial(_encoded, nvidia, how) for how in compiled.metadata.tensordesc_meta or ()),
        )
    except (ImportError, AttributeError):
        return None
