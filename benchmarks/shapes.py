"""What is measured: the shapes, and what the GPU could do at best."""

from __future__ import annotations

import dataclasses
import math


Rows = tuple[int, ...]
Sizes = tuple[tuple[int, int], ...]

# Products X[M, K] W[N, K]^T: decoding to prefill, against two narrow weights (the padded sizes of
# an MLP block 1280 -> 3420 -> 1280) and four of common language models.
GEMM_ROWS: Rows = (1, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
GEMM_WEIGHTS: Sizes = (
    (1280, 3424),
    (3424, 1280),
    (4096, 4096),
    (4096, 14336),
    (8192, 8192),
    (28672, 4096),
)
QUICK_GEMM_ROWS = (16, 128, 1024, 8192)
QUICK_GEMM_WEIGHTS = ((3424, 1280), (4096, 14336), (28672, 4096))
CPU_GEMM_ROWS = (1, 16)
CPU_GEMM_WEIGHTS = ((64, 32), (48, 96))
# Between the grid: the dense layers of Llama-3-8B and -70B and Qwen2.5-7B (query and key, MLP), the
# MLP of Qwen2.5-VL's vision tower (3420 wide, padded) with its attention, and DeepSeek-V3's first
# projection, 2112 wide.
BETWEEN_ROWS: Rows = (3, 7, 17, 33, 48, 100, 200, 300, 700, 1500, 3000, 6000)
BETWEEN_WEIGHTS: Sizes = (
    (4096, 4096),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (8192, 8192),
    (1024, 8192),
    (28672, 8192),
    (8192, 28672),
    (3584, 3584),
    (512, 3584),
    (18944, 3584),
    (3584, 18944),
    (1280, 1280),
    (3424, 1280),
    (1280, 3424),
    (2112, 7168),
)
# Accumulation in float32 registers matters to prefill; below this M both kinds wait for memory.
PROMOTED_FROM_ROWS = 512

# MLP blocks features -> hidden -> features. Blocks of one group are measured in turn with each
# other: 3420 is the size of a user, 3424 what it is padded to.
LAYER_ROWS: Rows = (1, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
LAYER_GROUPS: tuple[Sizes, ...] = (((4096, 14336),), ((1280, 3420), (1280, 3424)))
QUICK_LAYER_ROWS = (16, 1024)
CPU_LAYER_ROWS = (1, 5)
CPU_LAYER_GROUPS = (((32, 64),), ((20, 44), (20, 48)))
# Rows at which a stack is also measured under `nn.scan`.
SCANNED_ROWS = (16, 1024)
# Rows at which a block is also measured with a static scale between its layers.
STATIC_ROWS = (16, 1024, 4096)

# A stack of dense layers, one after another: layer i takes as many features as the one before gave,
# and the widths repeat.
STACK_LAYERS = 16
STACK_ROWS: Rows = (1, 16, 64, 256)
STACKS: Sizes = ((4096, 4096), (1280, 3420))
CPU_STACK_LAYERS = 4
CPU_STACK_ROWS = (1, 5)
CPU_STACKS = ((32, 32), (20, 44))

# What reads one x (Llama-3-8B's q, k, v; gate, up), and a layer behind another, by features.
SHARED_INPUTS = {"q, k, v": (4096, (4096, 1024, 1024)), "gate, up": (4096, (14336, 14336))}
CPU_SHARED_INPUTS = {"q, k, v": (32, (32, 16, 16))}
CHAINS: Sizes = ((4096, 14336), (1280, 3420))
CPU_CHAINS: Sizes = ((32, 44),)
INPUT_ROWS: Rows = (16, 64, 256, 1024, 4096)
CPU_INPUT_ROWS = (1, 5)

# Errors of products of `side` rows and as many output features, over K.
ACCURACY_KS = (1024, 4096, 8192, 16384)
ACCURACY_SIDE = 256
CPU_ACCURACY_KS = (64, 256)
CPU_ACCURACY_SIDE = 16

# Llama-3-8B (its config.json): hidden_size 4096, 8 key/value heads of 128, intermediate_size
# 14336, 32 layers, vocabulary 128256. (in_features, out_features) of each dense weight.
LLAMA_LAYERS = 32
LLAMA_LAYER = {
    "q": (4096, 4096),
    "k": (4096, 1024),
    "v": (4096, 1024),
    "o": (4096, 4096),
    "gate": (4096, 14336),
    "up": (4096, 14336),
    "down": (14336, 4096),
}
LLAMA_HEAD = (4096, 128256)

# The last-level cache of an H200 holds 60 MB; weights are rotated through three times that.
L2_BYTES = 60_000_000
ROTATED_BYTES = 3 * L2_BYTES


@dataclasses.dataclass(frozen=True)
class Peak:
    """The datasheet's dense e4m3 rate (operations a second) and memory bandwidth (bytes a second).

    `known` is false where the GPU is not in the table and an H200's values stand in.
    """

    operations: float
    bandwidth: float
    known: bool = True


# NVIDIA's datasheets, dense (half of the figures with sparsity). The first name found wins.
PEAKS = {
    "H200": Peak(1979e12, 4.8e12),
    "GH200": Peak(1979e12, 4.0e12),
    "H100 NVL": Peak(1671e12, 3.9e12),
    "H100 PCIe": Peak(1513e12, 2.0e12),
    "H100": Peak(1979e12, 3.35e12),
    "H800": Peak(1979e12, 3.35e12),
    "H20": Peak(296e12, 4.0e12),
}


def peak_of(gpu: str) -> Peak:
    """The peak of a GPU by its name."""
    for name, peak in sorted(PEAKS.items(), key=lambda item: -len(item[0])):
        if name in gpu:
            return peak
    return dataclasses.replace(PEAKS["H200"], known=False)


def parse_sizes(text: str) -> Rows:
    """`M,M,...`, a command's `--rows`, or K the same way."""
    return tuple(int(size) for size in text.split(","))


@dataclasses.dataclass(frozen=True)
class Gemm:
    """One product: M rows, N output features, K input features."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    @staticmethod
    def parse(text: str) -> Gemm:
        """`MxNxK`."""
        sizes = [int(size) for size in text.split("x")]
        if len(sizes) != 3 or min(sizes) < 1 or sizes[1] % 16 or sizes[2] % 16:
            raise ValueError(
                f"a shape is written MxNxK with N and K multiples of 16, such as 16x4096x4096, "
                f"but it is {text!r}."
            )
        return Gemm(*sizes)

    @property
    def operations(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """Both operands and their scales read once, a bfloat16 result written once."""
        m, n, k = self.m, self.n, self.k
        return n * k + m * k + 2 * m * n + 4 * (m + n)

    def bound(self, peak: Peak) -> float:
        """The seconds that no kernel goes below."""
        return max(self.operations / peak.operations, self.bytes / peak.bandwidth)


def copies_past_cache(weight_bytes: int) -> int:
    """How many copies of a weight to rotate through, so that none is found in the cache."""
    return max(2, math.ceil(ROTATED_BYTES / weight_bytes))


def launches_for(seconds: float, copies: int) -> int:
    """Launches in one graph: about 0.6 ms, so that the events around it do not count."""
    return min(max(4, math.ceil(600e-6 / seconds)), max(20, copies))


def llama_sizes(layers: int = LLAMA_LAYERS, divisor: int = 1) -> dict[str, tuple[int, int]]:
    """Every dense weight as `layer/name: (in_features, out_features)`, sizes divided."""
    names = {f"layer_{i}/{name}": size for i in range(layers) for name, size in LLAMA_LAYER.items()}
    names["lm_head"] = LLAMA_HEAD
    return {name: (k // divisor, n // divisor) for name, (k, n) in names.items()}
