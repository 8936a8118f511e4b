"""Which adapter each entry of a batch has."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from fastlora.mixed_batch import Rows

BASE = "__base__"  # PEFT's name for no adapter


class RowAdapters:
    """The adapter of every entry of a batch, by name; ``unique`` are those that occur, without `BASE`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.unique = [name for name in dict.fromkeys(self.names) if name != BASE]
        self._rows: dict[tuple, Rows] = {}

    def rows(self, scalings: dict[str, float], device: torch.device) -> Rows:
        """For a layer with these adapters and scalings. Layers that have the same share it."""
        key = (*scalings.items(), device)
        if key not in self._rows:
            numbers = {name: number for number, name in enumerate(scalings)}
            of_entries = [numbers.get(name, -1) for name in self.names]  # a layer need not have every adapter
            ends = [i + 1 for i, (one, next_) in enumerate(pairwise([*of_entries, None])) if one != next_]
            one_hot = [[float(i == e) for i in range(len(numbers))] for e in of_entries]
            with torch.inference_mode(False):  # training may follow
                self._rows[key] = Rows(
                    torch.tensor(
                        [of_entries[end - 1] % (len(numbers) + 1) for end in ends], dtype=torch.int64, device=device
                    ),
                    torch.tensor(ends, dtype=torch.int32, device=device),
                    torch.tensor(one_hot, device=device).view(len(one_hot), len(numbers)),
                    torch.tensor([scalings.get(n, 0.0) for n in self.names], dtype=torch.float64, device=device),
                )
        return self._rows[key]
