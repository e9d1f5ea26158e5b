"""The table that chooses a kernel for each shape, read from cuda/src/table.h; never written.

A twin of that file's `choose`: the constants are read from there, and a test compares what both
choose with a C++ compiler's help.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks import _report
from benchmarks.shapes import Gemm


TABLE = _report.ROOT / "cuda" / "src" / "table.h"
KINDS = ("fast", "promoted")

_NUMBER = r"-?\d+(?:\.\d*)?(?:e-?\d+)?"
_ROWS = re.compile(r"kTable\[\] = \{(.*?)\n\};", re.DOTALL)
_ROW = re.compile(rf"\s*\{{Kernel::(\w+), +({_NUMBER}), +({_NUMBER}), +({_NUMBER})\}},\s*")
_NAME = re.compile(r"(fast|promoted)(_swap)?_(pp|coop)_(\d+)x(\d+)x(\d+)_(\d+)x(\d+)")


@dataclasses.dataclass(frozen=True)
class Memory:
    """What the memory and the L2 cache give, in bytes a microsecond, and when the first arrives.

    Attributes:
        pair_rate: of two multiprocessors, which share a way to the memory, or of one alone.
        last_wave: the share that the steps of a last wave take less where nearly none are at work.
    """

    multiprocessors: int
    rate: float
    cache_rate: float
    start: float
    pair_rate: float
    last_wave: float

    def resident_clusters(self, size: int) -> int:
        """How many clusters of `size` blocks run at once, as kernels.h has it."""
        left_over = 8 * (size - 2) if size > 2 else 0
        return max(1, (self.multiprocessors - left_over) // size)


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel and what it takes, in microseconds.

    Attributes:
        k_tile: of each step along K of a tile.
        tile: of a tile besides.
        launch: once.
    """

    kernel: str
    k_tile: float
    tile: float
    launch: float

    @property
    def kind(self) -> str:
        return self.kernel.split("_")[0]


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows in their order, and the constants that they share."""

    rows: Sequence[Row]
    memory: Memory

    def chosen(self, shape: Gemm, kind: str) -> str:
        """The kernel that is expected to take least."""
        rows = [row for row in self.rows if row.kind == kind]
        return min(rows, key=lambda row: expected_time(row, self.memory, shape)).kernel

    def with_rows(self, rows: Sequence[Row]) -> Table:
        return dataclasses.replace(self, rows=rows)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one kernel has to do for one shape, as `expected_time6` of table.h counts it."""

    waves: int
    steps: float
    memory_time: float

    @staticmethod
    def of(kernel: str, memory: Memory, shape: Gemm) -> Work:
        size, clusters, k_tiles, once, again = _counted(kernel, shape)
        resident = memory.resident_clusters(size)
        waves = -(-clusters // resident)
        idle = waves - clusters / resident
        steps = (waves - memory.last_wave * idle) * k_tiles
        time = once / memory.rate + again / memory.cache_rate + memory.start
        if last := clusters % resident * size:
            pairs = memory.multiprocessors // 2
            left = last - pairs if last > pairs else last
            behind = max(0.0, 1 / memory.pair_rate - left / memory.rate)
            time += once / (clusters * size) * behind
        return Work(waves, steps, time)

    def time(self, k_tile: float, tile: float, launch: float) -> float:
        """Microseconds."""
        compute = self.steps * k_tile + self.waves * tile + launch
        return (compute**6 + self.memory_time**6) ** (1 / 6)


@functools.cache
def _counted(kernel: str, shape: Gemm) -> tuple[int, int, int, float, float]:
    """Blocks in a cluster, clusters, steps along K, bytes from the memory and from the cache."""
    found = _NAME.fullmatch(kernel)
    if found is None:
        raise ValueError(f"{kernel!r} is no kernel's name.")
    tile_m, tile_n, tile_k, cluster_m, cluster_n = map(int, found.groups()[3:])
    m, n, k = shape.m, shape.n, shape.k
    rows, columns = (n, m) if found[2] else (m, n)
    span_m, span_n = tile_m * cluster_m, tile_n * cluster_n
    clusters = -(-rows // span_m) * -(-columns // span_n)
    once = n * k + m * k + 2.0 * m * n
    again = max(clusters * (span_m + span_n) * k - once, 0)
    return cluster_m * cluster_n, clusters, -(-k // tile_k), once, again


def expected_time(row: Row, memory: Memory, shape: Gemm) -> float:
    """Microseconds."""
    return Work.of(row.kernel, memory, shape).time(row.k_tile, row.tile, row.launch)


def read(path: Path = TABLE) -> Table:
    """The table.

    Raises:
        ValueError: if the file does not look as this module expects.
    """
    text = path.read_text()
    body = _ROWS.search(text)
    if body is None:
        raise ValueError(f"{path} has no `kTable[] = {{...}};`.")
    rows = []
    for line in body[1].splitlines():
        if "{" not in line.split("//")[0]:
            continue
        row = _ROW.fullmatch(line)
        if row is None or _NAME.fullmatch(row[1]) is None:
            raise ValueError(
                f"a row of {path} is written {{Kernel::name, k_tile, tile, launch}} on a line of "
                f"its own, but one is {line.strip()!r}."
            )
        rows.append(Row(row[1], *map(float, row.groups()[1:])))
    for kind in KINDS:
        if all(row.kind != kind for row in rows):
            raise ValueError(f"{path} has no row of a {kind} kernel.")
    names = ("kMemoryRate", "kCacheRate", "kMemoryStart", "kPairRate", "kLastWave")
    multiprocessors = int(_constant(text, "kMultiprocessors", path))
    return Table(rows, Memory(multiprocessors, *(_constant(text, name, path) for name in names)))


@functools.cache
def tile_rows(kernel: str) -> int | None:
    """How many rows of x a kernel's tile has, by its name; None if that does not say."""
    found = _NAME.fullmatch(kernel)
    # A swapped kernel's tile runs over output features first.
    return int(found[5] if found[2] else found[4]) if found else None


def _constant(text: str, name: str, path: Path) -> float:
    found = re.search(rf"\b{name} = ({_NUMBER})", text)
    if found is None:
        raise ValueError(f"{path} has no `{name} = ...`.")
    return float(found[1])
