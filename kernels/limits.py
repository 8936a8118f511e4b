"""What the kernels take, and into how many parts they cut a reduction: numbers that are known without Triton."""

from functools import cache

MAX_GROUP = 3  # layers whose dx `lora_matmul_group` sums in one launch: each is unrolled into the kernel
FUSED_TOKENS, FUSED_XA = 64, 2048  # at most, of nf4_matmul: tokens, and elements of xa in one program's registers
FUSED_STEP = 64  # weights of a row that nf4_matmul multiplies at once: of one block, in eight words
ADDED_BYTES = 1 << 18  # of partial sums that one program reads back: more are sooner added up by a launch of many
PROGRAMS_4BIT = 2  # of nf4_matmul, on a multiprocessor: more of them split K into parts of few steps
# Of `swiglu`: F.silu, F.gelu, F.gelu(approximate="tanh"), x sigmoid(1.702 x), F.relu and its square.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2")


def cdiv(size: int, block: int) -> int:
    """``ceil(size / block)``. Triton's own, called from a launcher, takes microseconds."""
    return -(-size // block)


@cache
def next_power_of_2(size: int) -> int:
    """The smallest power of two that is not below size."""
    return 1 << max(0, size - 1).bit_length()


@cache
def padded_rank(r: int) -> int:
    """The rank as the tensor core takes it: a power of two, at least 16. Padding is zeros in registers, not memory."""
    return max(16, next_power_of_2(r))


def ranks_at_once(r: int, adapters: int) -> int:
    """How many ranks of each of so many adapters a program of `shrink_group` sums up: all sums stay in registers."""
    return max(16, min(padded_rank(r), 128, 256 // next_power_of_2(adapters)))


def parts_for(programs: int, blocks: int, length: int, step: int) -> int:
    """Into how many parts a reduction is to be cut, so that there are about so many programs for the ``blocks`` of the
    output. A part has at least four steps of the kernel's loop."""
    return max(1, min(programs // blocks, length // (4 * step)))


def cut(length: int, step: int, parts: int) -> tuple[int, int]:
    """How long a part is, in whole steps, if a reduction is cut into so many; and how many parts that makes."""
    part = cdiv(cdiv(length, parts), step) * step
    return part, cdiv(length, part)


def takes_fused(M: int, K: int, r: int, blocksize: int) -> bool:
    """Whether `nf4_matmul` takes this: whole steps of rows and blocks, few tokens, the fewer the larger the rank."""
    aligned = K > 0 and K % FUSED_STEP == 0 and blocksize % FUSED_STEP == 0
    return aligned and 0 < M <= FUSED_TOKENS and (r == 0 or padded_rank(M) * padded_rank(r) <= FUSED_XA)


def adds_slabs(slabs: int, rows: int, r: int) -> bool:
    """Whether `lora_grad`, of which each slab of dy's columns has a part of dxa, adds them up within its launch; for
    so many rows a program and a padded rank. Large ranks, which hardly gain by one pass, have no registers for it."""
    return r <= 32 and 4 * slabs * rows * r <= ADDED_BYTES
