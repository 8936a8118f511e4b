"""How long a product takes by its tiles: every multiprocessor works on one at a time, wave after wave.

Small tiles read more bytes for the same product; large ones leave multiprocessors without work in the last wave. What
each costs is counted in clocks, from published numbers of the hardware: nothing here is measured.
"""

from typing import NamedTuple, Protocol, TypeVar

from fastlora.kernels.limits import cdiv


class Block(Protocol):
    @property
    def BLOCK_M(self) -> int: ...
    @property
    def BLOCK_N(self) -> int: ...


Tile = TypeVar("Tile", bound=Block)


class Speed(NamedTuple):
    """What a multiprocessor does a clock."""

    multiprocessors: int  # of the usual part
    flops: int  # of dense products in half precision
    rows: int  # of one product instruction: a tile with fewer takes as long
    l2: int  # bytes that it gets when all of them read at once
    port: int = 64  # and at most


SPEEDS = {
    "sm_80": Speed(108, 2048, 16, 40),
    "sm_90": Speed(132, 4096, 64, 32),
    "sm_100": Speed(148, 8192, 128, 48, 128),
    "sm_120": Speed(170, 512, 16, 20),
    "gfx942": Speed(304, 2048, 16, 54),
    "gfx11": Speed(96, 512, 16, 24),
    "default": Speed(128, 1024, 16, 20),  # consumer parts
}
FP32 = 256  # FLOPs a clock in fp32, outside the tensor core
# Clocks until the tensor core is at work on the next tile: its first copies, and the adapter's product.
COPIES, ADAPTER = 1000, 2500

SPLITS = (1, 2, 4, 8)  # into which a vendor's GEMM may cut the depth, for more tiles
VENDOR = ((64, 64), (64, 128), (128, 128), (128, 256))  # and its tiles


class Product(NamedTuple):
    """``x[M, K] @ w[N, K].T`` on so many multiprocessors of an architecture."""

    M: int
    N: int
    K: int
    family: str
    multiprocessors: int
    itemsize: int = 2

    def clocks(self, BLOCK_M: int, BLOCK_N: int, between: int = COPIES + ADAPTER, splits: int = 1) -> float:
        """By tiles of this size. The sum over splits of the depth is another write and read of each."""
        speed, tiles = speed_of(self.family), cdiv(self.M, BLOCK_M) * cdiv(self.N, BLOCK_N) * splits
        waves, working = cdiv(tiles, self.multiprocessors), min(tiles, self.multiprocessors)
        rows, flops = (max(BLOCK_M, speed.rows), speed.flops) if self.itemsize == 2 else (BLOCK_M, FP32)
        product = 2 * rows * BLOCK_N / flops
        rate = min(speed.port, speed.l2 * self.multiprocessors / working)
        copies = self.itemsize * (min(BLOCK_M, self.M) + min(BLOCK_N, self.N)) / rate
        sums = 8 * min(BLOCK_M, self.M) * BLOCK_N / rate if splits > 1 else 0
        return waves * (cdiv(self.K, splits) * max(product, copies) + sums + between)

    def vendors_clocks(self) -> float:
        """Of a vendor's GEMM: by the best of its tiles."""
        return min(self.clocks(*block, COPIES, splits) for block in VENDOR for splits in SPLITS)

    def share(self, clocks: float, of_large: float) -> float:
        """Its rate, if it takes so many clocks, over the rate of `large`, if that takes ``of_large``."""
        large = self.large()
        return of_large / (large.M * large.N * large.K) * self.M * self.N * self.K / clocks

    def large(self) -> "Product":
        """The product that rates are measured on, in which all multiprocessors have work."""
        return self._replace(M=8192, N=4096, K=4096)


def speed_of(family: str) -> Speed:
    return SPEEDS.get("gfx942" if family == "gfx" else family, SPEEDS["default"])


def fastest(tiles: tuple[Tile, ...], product: Product) -> Tile:
    """The tile by which this product takes the fewest clocks."""
    return min(tiles, key=lambda tile: product.clocks(tile.BLOCK_M, tile.BLOCK_N))
