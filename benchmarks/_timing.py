"""Fair timing: contestants in turn, forwards and backwards, and the median of pairwise ratios.

A GPU at its power limit slows whoever runs after a hot neighbour, so a contestant timed alone, or
always after the same other one, gives a number that is good to +-15 % only. Taken in turn, both
sides of a ratio see the same clocks.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax


# Reading a contestant starts it; the seconds are read later, so that the device always has work.
Reading = Callable[[], float]
Contestant = Callable[[], Reading]


def interleave(contestants: Mapping[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; every other round runs backwards."""
    started: dict[str, list[Reading]] = {name: [] for name in contestants}
    for name in order(list(contestants), rounds):
        started[name].append(contestants[name]())
    return {name: [read() for read in readings] for name, readings in started.items()}


def order(names: Sequence[str], rounds: int) -> list[str]:
    """A B C, C B A, A B C, ..."""
    return [name for r in range(rounds) for name in (names if r % 2 == 0 else names[::-1])]


def pairwise_ratio(peer: Sequence[float], ours: Sequence[float]) -> float:
    """Median over the rounds of peer's time / ours: above 1, ours is the faster."""
    return statistics.median(p / o for p, o in zip(peer, ours, strict=True))


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of ratios."""
    return math.exp(statistics.fmean(map(math.log, values)))


def mean_and_worst(ratios: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Geometric mean and least of the ratios of shapes, each with its shape's name; not empty."""
    worst_shape, worst = min(ratios, key=lambda item: item[1])
    return {
        "geometric_mean": geometric_mean(ratio for _, ratio in ratios),
        "worst": worst,
        "worst_shape": worst_shape,
        "shapes": len(ratios),
    }


def warm_up(contestants: Mapping[str, Contestant], seconds: float) -> None:
    """Run all in turn for a while, so that clocks have settled before the first round."""
    end = time.perf_counter() + seconds
    while True:
        readings = [contestant() for contestant in contestants.values()]
        for read in readings:
            read()
        if time.perf_counter() >= end:
            return


class GraphContestant:
    """Replays of a CUDA graph of `launch(0) ... launch(launches - 1)`, timed by device events.

    Attributes:
        last: what the last launch returned: its result, after each replay.
    """

    def __init__(self, launch: Callable[[int], Any], launches: int):
        import torch

        launch(0)  # what a library prepares on first use cannot be captured
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for index in range(launches):
                self.last = launch(index)
        self.launches = launches
        self.launch = launch  # holds the tensors whose addresses the graph has

    def __call__(self) -> Reading:
        import torch

        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        self.graph.replay()
        after.record()

        def read() -> float:
            after.synchronize()
            return 1e-3 * before.elapsed_time(after) / self.launches

        return read


def wall_contestant(
    call: Callable[[], Any], calls: int, parts: int = 1, *, dropped: bool = False
) -> Contestant:
    """Host time of `calls` calls enqueued one after another, divided by calls and parts.

    `dropped`: a result is dropped before the next call, which may then have its memory.
    """

    def start() -> Reading:
        begin = time.perf_counter()
        for _ in range(calls):
            if dropped:
                result = None
            result = call()
        jax.block_until_ready(result)
        seconds = (time.perf_counter() - begin) / (calls * parts)
        return lambda: seconds

    return start


def calls_for(call: Callable[[], Any], seconds: float) -> int:
    """How many calls take about `seconds`, from one that is already compiled."""
    taken = wall_contestant(call, calls=2)()()
    return max(1, round(seconds / taken))
