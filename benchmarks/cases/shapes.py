"""The sizes of the models whose layers, blocks and steps are measured: the one table of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GROUPS = (("q", "k", "v"), ("gate", "up"))  # layers that take the same x, and are computed together


@dataclass(frozen=True)
class Shape:
    """A Llama-style model. ``model`` is what else its ``LlamaConfig`` says, where the whole of it is built."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 0  # 0: hidden / heads
    model: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the seven linear layers of a block."""
        head_dim = self.head_dim or self.hidden // self.heads
        hidden, q, kv = self.hidden, head_dim * self.heads, head_dim * self.kv_heads
        return {
            "q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q),
            "gate": (self.intermediate, hidden), "up": (self.intermediate, hidden), "down": (hidden, self.intermediate),
        }  # fmt: skip

    def groups(self) -> list[tuple[tuple[int, ...], int]]:
        """(N of each, K) of the layers of a block that take the same x."""
        layers = self.linears()
        return [(tuple(layers[name][0] for name in names), layers[names[0]][1]) for names in GROUPS]

    def config(self, **more: Any) -> Any:
        """The ``LlamaConfig``."""
        from transformers import LlamaConfig

        sizes = {"hidden_size": self.hidden, "intermediate_size": self.intermediate}
        heads = {"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads}
        return LlamaConfig(**{**sizes, **heads, **self.model, **more})


_LLAMA_2 = {"vocab_size": 32000, "num_hidden_layers": 32, "max_position_embeddings": 4096}
_SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152, "num_hidden_layers": 30, "max_position_embeddings": 8192, "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {
    "llama-3-8b": Shape(4096, 14336, heads=32, kv_heads=8),
    "llama-2-7b": Shape(4096, 11008, heads=32, kv_heads=32, model=_LLAMA_2),
    "mistral-7b": Shape(4096, 14336, heads=32, kv_heads=8),
    "qwen2.5-7b": Shape(3584, 18944, heads=28, kv_heads=4),
    "llama-3.2-1b": Shape(2048, 8192, heads=32, kv_heads=8),
    "smollm2-135m": Shape(576, 1536, heads=9, kv_heads=3, model=_SMOLLM2),
    "tiny": Shape(64, 128, heads=2, kv_heads=1),  # for tests
}


@dataclass(frozen=True)
class Experts:
    """The experts of a block, of which a token has ``top``: each is a gated MLP of these sizes."""

    experts: int
    top: int
    hidden: int
    intermediate: int

    def linears(self) -> list[tuple[int, int]]:
        """(N, K) of the two weights of an expert: gate and up side by side, and down."""
        return [(2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)]


EXPERTS = {
    **{f"moe-{experts}": Experts(experts, 8, 1024, 512) for experts in (8, 16, 32, 64, 128)},
    "qwen3-30b-a3b": Experts(128, 8, 2048, 768),
    "mixtral-8x7b": Experts(8, 2, 4096, 14336),
    "tiny-moe": Experts(6, 2, 64, 32),  # for tests
}
