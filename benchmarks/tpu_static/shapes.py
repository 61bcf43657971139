"""Which problems are compared, and how many blocks of each kind a kernel meets in them."""

from dataclasses import dataclass, replace

import numpy as np

from kernels.static_estimate import Geometry


@dataclass(frozen=True)
class Attention:
    """One attention problem, in bf16: T queries and keys, N query heads, K key heads of H.

    documents: lengths of the texts packed into each row; they sum to T.
    """

    B: int
    N: int
    K: int
    T: int
    H: int
    causal: bool = True
    window: int | None = None
    documents: tuple[int, ...] = ()

    @property
    def segment_ids(self) -> np.ndarray:
        return np.repeat(np.arange(1, len(self.documents) + 1, dtype=np.int32), self.documents)

    def key_range(self) -> tuple[np.ndarray, np.ndarray]:
        """For each query, the first key that it sees and the first behind those: int `T`, int `T`."""
        position = np.arange(self.T)
        low, high = np.zeros_like(position), np.full_like(position, self.T)
        if self.documents:
            ends = np.repeat(np.cumsum(self.documents), self.documents)
            high, low = ends, ends - np.repeat(self.documents, self.documents)
        if self.causal:
            high = position + 1
        if self.window is not None:
            low = np.maximum(low, position - self.window + 1)
        return low, high

    def blocks(self, block_q: int, block_kv: int) -> tuple[int, int]:
        """Pairs of blocks in which every key is seen by every query, and those in which some are by some."""
        low, high = self.key_range()
        starts = np.arange(0, self.T, block_q)
        lowest, highest = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
        strictest_low, strictest_high = np.maximum.reduceat(low, starts), np.minimum.reduceat(high, starts)
        first = np.arange(0, self.T, block_kv)[None]
        last = np.minimum(first + block_kv, self.T)
        touched = (first < highest[:, None]) & (last > lowest[:, None])
        full = touched & (first >= strictest_low[:, None]) & (last <= strictest_high[:, None])
        return int(full.sum()), int((touched & ~full).sum())

    def geometry(self, block_q: int, block_kv: int, rows_of: str = "queries") -> Geometry:
        """Of a kernel that visits each pair of blocks once per query head; rows of blocks along "queries" or "keys"."""
        heads = self.B * self.N
        full, masked = self.blocks(block_q, block_kv)
        rows = -(-self.T // (block_q if rows_of == "queries" else block_kv))
        return Geometry(bodies=(heads * full, heads * masked), rows=(heads * rows,))


ATTENTION = {
    "qwen3-4k": Attention(B=2, N=16, K=8, T=4096, H=128),
    "siglip-1024": Attention(B=2, N=16, K=16, T=1024, H=72, causal=False),
    "siglip-729": Attention(B=2, N=16, K=16, T=729, H=72, causal=False),
    "gemma-window": Attention(B=2, N=16, K=8, T=4096, H=256, window=1024),
    "packed-4k": Attention(B=2, N=16, K=8, T=4096, H=128, documents=(1300, 500, 1700, 596)),
    "long-32k": Attention(B=1, N=16, K=8, T=32768, H=128),
}


@dataclass(frozen=True)
class Experts:
    """Rows sorted by expert, each times its expert's D x F matrix, in bf16: as many rows for each as a router gives.

    spread: how unequal the experts' shares are (the standard deviation of a share over its mean, roughly).
    """

    E: int
    rows_per_expert: int
    D: int
    F: int
    spread: float

    @property
    def M(self) -> int:
        return self.E * self.rows_per_expert

    def group_sizes(self) -> np.ndarray:
        if not self.spread:
            return np.full(self.E, self.rows_per_expert)
        random = np.random.default_rng(0)
        return random.multinomial(self.M, random.dirichlet(np.full(self.E, self.spread**-2)))

    def visits(self, tile: int) -> int:
        """Pairs of an expert and a tile of rows in which it has some."""
        ends = np.cumsum(self.group_sizes())
        starts = ends - self.group_sizes()
        return int((-(-ends // tile) - starts // tile)[ends > starts].sum())

    @property
    def turned(self) -> "Experts":
        """What the rows' gradient multiplies: rows of F by matrices F x D."""
        return replace(self, D=self.F, F=self.D)

    def geometry(self, tile_m: int, tile_k: int, tile_n: int) -> Geometry:
        """Of a kernel that multiplies each visited tile, and reads an expert's matrix once if it takes all of D."""
        inner, outer = -(-self.D // tile_k), -(-self.F // tile_n)
        visits = self.visits(tile_m) * outer
        read = self.M * self.D * outer + (self.E if inner == 1 else self.visits(tile_m)) * self.D * self.F
        return Geometry(rows=(visits,), steps=visits * inner, hbm_bytes=2 * (read + self.M * self.F))

    def outer_geometry(self, tile_m: int, tile_k: int, tile_n: int) -> Geometry:
        """Of a kernel that sums each expert's D x F gradient over its tiles, tile_k x tile_n of it at a time."""
        inner, outer = -(-self.D // tile_k), -(-self.F // tile_n)
        visits = self.visits(tile_m) * inner * outer
        moved = self.M * (self.D * outer + self.F * inner) + self.E * self.D * self.F
        return Geometry((visits,), rows=(self.E * inner * outer,), steps=visits, hbm_bytes=2 * moved)


EXPERTS = {"experts-512": Experts(E=128, rows_per_expert=512, D=2048, F=768, spread=0.2)}


@dataclass(frozen=True)
class Decode:
    """One new token for each of B rows against `length` cached ones; N query heads, K key heads of H.

    cache: its type, "bfloat16", or "int8" with a float32 scale for each vector.
    """

    B: int
    N: int
    K: int
    length: int
    H: int
    cache: str = "bfloat16"

    @property
    def hbm_bytes(self) -> int:
        """Of the cache, read once: what bounds any kernel."""
        return 2 * self.B * self.K * self.length * (self.H + 4 if self.cache == "int8" else 2 * self.H)


DECODE = {
    "decode-32k": Decode(B=8, N=16, K=8, length=32768, H=128),
    "decode-32k-int8": Decode(B=8, N=16, K=8, length=32768, H=128, cache="int8"),
    "decode-4k": Decode(B=64, N=16, K=8, length=4096, H=128),
}
