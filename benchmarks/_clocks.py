"""The same calls by two clocks: the host's, and the time during which the device was busy."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import _trace
from benchmarks._timing import calls_for, interleave, pairwise_ratio, wall_contestant


WALL_READING_SECONDS = 0.02
TRACE_ROUNDS = 5
TRACE_CALLS = 3


@dataclasses.dataclass(frozen=True)
class Clocked:
    """What each contestant took, a part (a layer, a block) of one call.

    Attributes:
        seconds: by clock, and in that by contestant, in each round: "wall", where a result is
            held until the next call is made; "dropped", the same where it is not, if asked for;
            "busy", empty where no trace was taken.
        profiles: what the device did in each round of the trace, in `TRACE_CALLS` calls.
        parts: how many parts a call of each contestant has.
    """

    seconds: dict[str, dict[str, list[float]]]
    profiles: dict[str, list[_trace.Busy]]
    parts: Mapping[str, int]

    def microseconds(self, name: str) -> dict[str, float]:
        """The median over the rounds, by clock."""
        return {
            clock: 1e6 * statistics.median(times[name])
            for clock, times in self.seconds.items()
            if times
        }

    def ratio(self, peer: str, ours: str) -> dict[str, float]:
        """Median over the rounds of peer's time / ours, by clock."""
        return {
            clock: pairwise_ratio(times[peer], times[ours])
            for clock, times in self.seconds.items()
            if times
        }

    def kernels(self, name: str) -> float | None:
        """Kernels, copies and fills a part; None without a trace."""
        parts = TRACE_CALLS * self.parts[name]
        return self._median(name, lambda busy: busy.kernels.total() / parts)

    def in_graphs(self, name: str) -> float | None:
        """The share of those that CUDA graphs launched; None without a trace."""
        return self._median(name, lambda busy: busy.in_graphs / busy.kernels.total())

    def marks(self, name: str) -> dict[str, float] | None:
        """How often a call left each of `_trace.MARKS`; None without a trace."""
        if name not in self.profiles:
            return None
        rounds = self.profiles[name]
        return {
            mark: statistics.median(busy.marks[mark] / TRACE_CALLS for busy in rounds)
            for mark in _trace.MARKS
        }

    def largest(self, name: str) -> dict[str, dict[str, float]] | None:
        """The eight kernels that took longest in the first round, a part; None without a trace."""
        if name not in self.profiles:
            return None
        first, parts = self.profiles[name][0], TRACE_CALLS * self.parts[name]
        longest = sorted(first.seconds_of.items(), key=lambda item: -item[1])[:8]
        found: dict[str, dict[str, float]] = {}
        for kernel, seconds in longest:
            # Those of one shortened name together.
            row = found.setdefault(shortened(kernel), {"launches": 0.0, "microseconds": 0.0})
            row["launches"] += first.kernels[kernel] / parts
            row["microseconds"] += 1e6 * seconds / parts
        return found

    def _median(self, name: str, count: Callable[[_trace.Busy], float]) -> float | None:
        if name not in self.profiles:
            return None
        return statistics.median(map(count, self.profiles[name]))


def shortened(kernel: str) -> str:
    """A kernel's name, of which templates make thousands of characters: both ends of it."""
    return kernel if len(kernel) <= 400 else f"{kernel[:280]} ... {kernel[-120:]}"


def measure(
    calls: Mapping[str, Callable[[], Any]],
    parts: Mapping[str, int],
    rounds: int,
    *,
    trace: bool,
    graphs: bool = False,
    dropped: bool = False,
) -> Clocked:
    """Take `rounds` readings of the wall clock, interleaved, and `TRACE_ROUNDS` of a profile.

    `graphs`: find out in the profile what CUDA graphs did, for `in_graphs` and `marks`.
    `dropped`: read that clock too.
    """
    many = {name: calls_for(call, WALL_READING_SECONDS) for name, call in calls.items()}
    seconds: dict[str, dict[str, list[float]]] = {}
    for clock in ("wall", "dropped") if dropped else ("wall",):
        walls = {
            name: wall_contestant(call, many[name], parts[name], dropped=clock == "dropped")
            for name, call in calls.items()
        }
        seconds[clock] = interleave(walls, rounds)
    seconds["busy"] = {}
    profiles = {}
    if trace:
        profiles = _trace.measure_busy(calls, TRACE_ROUNDS, TRACE_CALLS, graphs=graphs)
    for name, rounds_of_it in profiles.items():
        seconds["busy"][name] = [b.seconds / (TRACE_CALLS * parts[name]) for b in rounds_of_it]
    return Clocked(seconds, profiles, parts)


def relative_error(result: np.ndarray, expected: np.ndarray) -> float:
    """||result - expected|| / ||expected||."""
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
