"""Watch which torch ops run, fastlora's own taken apart into what they are composed of."""

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlora import kernel_ops


class RecordOps(TorchDispatchMode):
    """``outputs`` is every (op name, output tensor) in order, ``allocated`` the outputs that are new memory."""

    def __init__(self):
        super().__init__()
        self.outputs, self.allocated, self._storages = [], [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("fastlora::"):
            with self:
                return kernel_ops.compositions[name.removeprefix("fastlora::")](*args, **(kwargs or {}))
        self._storages |= {_storage(t) for t in tree_leaves((args, kwargs)) if hasattr(t, "untyped_storage")}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if hasattr(t, "untyped_storage"):
                self.outputs.append((name, t))
                if _storage(t) not in self._storages:
                    self.allocated.append(t)
                    self._storages.add(_storage(t))
        return result

    def count(self, *names: str) -> int:
        return sum(name in names for name, _ in self.outputs)


def _storage(t) -> int:
    return t.untyped_storage().data_ptr()
