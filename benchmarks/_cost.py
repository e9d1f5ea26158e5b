"""What a table's choices cost at measured times, often: a search asks a thousand times."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from benchmarks import _table
from benchmarks.shapes import Gemm


# Microseconds by shape and kernel.
Times = Mapping[Gemm, Mapping[str, float]]

# What a choice costs: the logarithm of its time / the best one's, and more from 5 % on.
TOLERABLE, BEYOND = 0.05, 8
# Beside what the choices cost counts a little how far the times are off, lest the search explain
# the fitted shapes alone: of four searches with it the choices at 44 other shapes were worth 0.994,
# 0.992, 0.990 and 0.983, of two without it 0.988 and 0.984 (2026-11-24).
EXPLAINED = 0.05
# Of a kernel that was not timed there, as `_between.is_worth_timing` found it hopeless.
UNTIMED = math.log(1.48)
# Where a kernel is far from the best, how far matters little: it weighs (best / its time)^3.
WEIGHT_POWER = 3


class Cost:
    """Of tables whose rows are of some kernels, at measured times.

    A row's expected times are worked out once: a table that differs in one row costs one row.
    """

    def __init__(self, times: Times):
        self._shapes = list(times)
        self._times = times
        self._expected: dict[tuple[_table.Row, _table.Memory], np.ndarray] = {}
        self._taken: dict[str, np.ndarray] = {}
        # The least of a kind at each shape; infinite where none was timed.
        self._least = {
            kind: np.array(
                [
                    min((t for name, t in named.items() if name.startswith(kind)), default=np.inf)
                    for named in times.values()
                ]
            )
            for kind in _table.KINDS
        }

    def of_choices(self, table: _table.Table) -> float:
        """What the choices lose, over all shapes."""
        found = 0.0
        for kind, least in self._least.items():
            rows = [row for row in table.rows if row.kind == kind]
            timed = np.isfinite(least)
            if not timed.any():
                continue
            chosen = np.argmin([self._of_row(row, table.memory) for row in rows], axis=0)
            taken = np.array([self._of_kernel(row.kernel) for row in rows])
            picked = np.take_along_axis(taken, chosen[None], axis=0)[0]
            lost = np.where(np.isnan(picked), UNTIMED, np.log(picked / least))
            found += float(np.sum((lost + BEYOND * np.maximum(0, lost - TOLERABLE))[timed]))
        return found

    def loss(self, table: _table.Table) -> float:
        """What a search makes less: that, and a little of `tune.fit`'s squared deviations."""
        unexplained = 0.0
        for row in table.rows:
            taken = self._of_kernel(row.kernel)
            weights = (self._least[row.kind] / taken) ** WEIGHT_POWER
            off = weights * np.log(self._of_row(row, table.memory) / taken)
            unexplained += float(np.nansum(off**2))
        return self.of_choices(table) + EXPLAINED * unexplained

    def _of_row(self, row: _table.Row, memory: _table.Memory) -> np.ndarray:
        key = (row, memory)
        if key not in self._expected:
            self._expected[key] = np.array(
                [_table.expected_time(row, memory, shape) for shape in self._shapes]
            )
        return self._expected[key]

    def _of_kernel(self, kernel: str) -> np.ndarray:
        if kernel not in self._taken:
            self._taken[kernel] = np.array(
                [named.get(kernel, np.nan) for named in self._times.values()]
            )
        return self._taken[kernel]
