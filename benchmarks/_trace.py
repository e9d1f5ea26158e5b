"""Device-busy time from a profile: what the GPU did, without the time it waited for the host.

Read from `jax.profiler`'s own file, so no TensorBoard is needed. Every kernel is seen; the gaps
between them do not count. XLA's versions differ in whether they use command buffers (CUDA graphs)
while a profile is taken: a graph's id on a kernel and `MARKS` on the host tell.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks._timing import order


# Between two contestants the device idles this long; within one it never waits half of that.
PAUSE_SECONDS = 0.02
# A profiler that was just started may stall the first launches.
ATTEMPTS = 3
# What the host says of XLA's command buffers, by a part of the event's name.
MARKS = {
    "launched": "GraphLaunch",
    "updated": "command_buffer::update",
    "not used in a profile": "CommandBuffer disabled when profiling",
}
# On a kernel's event, the id of the CUDA graph that launched it.
GRAPH_STAT = "cuda_graph_id"


@dataclasses.dataclass(frozen=True)
class Event:
    """A kernel, copy or fill on a GPU stream, or one of `MARKS` on the host, in nanoseconds."""

    name: str
    start: float
    end: float
    in_graph: bool = False  # launched by a CUDA graph
    on_host: bool = False


@dataclasses.dataclass(frozen=True)
class Busy:
    """What one contestant did in one round.

    Attributes:
        seconds: during which at least one kernel, copy or fill ran.
        kernels: how many of each name ran.
        seconds_of: how long all of a name took together.
        in_graphs: how many of them CUDA graphs launched.
        marks: how many of each of `MARKS` the host left meanwhile.
    """

    seconds: float
    kernels: collections.Counter[str]
    seconds_of: dict[str, float]
    in_graphs: int = 0
    marks: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def measure_busy(
    contestants: Mapping[str, Callable[[], Any]],
    rounds: int,
    calls: int,
    pause: float = PAUSE_SECONDS,
    *,
    graphs: bool = False,
) -> dict[str, list[Busy]]:
    """`calls` calls of each contestant in each round, interleaved within one profile.

    A contestant is told from the next by the `pause` in seconds between them, so it may not idle
    for half of that itself. With `graphs`, `in_graphs` and `marks` are filled too, which makes the
    host trace more and reading the profile slower.

    Raises:
        RuntimeError: if the profile does not show each contestant apart from the next.
    """
    names = order(list(contestants), rounds)
    for _ in range(ATTEMPTS):
        events = _profile([contestants[name] for name in names], calls, pause, graphs)
        groups = split([event for event in events if not event.on_host], pause)
        if len(groups) == len(names):
            break
    else:
        raise RuntimeError(
            f"The profile shows {len(groups)} separate bursts of work on the GPU, but "
            f"{len(names)} contestants ran. Is something else running on it? `--no-trace` "
            "measures wall time alone."
        )
    found: dict[str, list[Busy]] = {name: [] for name in contestants}
    marks = assign([event for event in events if event.on_host], groups)
    for name, group, own in zip(names, groups, marks, strict=True):
        found[name].append(dataclasses.replace(busy(group), marks=own))
    return found


def split(events: list[Event], pause: float) -> list[list[Event]]:
    """The events in groups with at least half a pause between them."""
    groups: list[list[Event]] = []
    end = float("-inf")
    for event in sorted(events, key=lambda e: e.start):
        if event.start - end > 0.5e9 * pause:
            groups.append([])
        groups[-1].append(event)
        end = max(end, event.end)
    return groups


def assign(marks: list[Event], groups: list[list[Event]]) -> list[collections.Counter[str]]:
    """The marks of each group: those before its end, and after the end of the one before."""
    ends = [max(event.end for event in group) for group in groups]
    found: list[collections.Counter[str]] = [collections.Counter() for _ in groups]
    for mark in marks:
        at = bisect.bisect_left(ends, mark.start)
        if at < len(found):
            found[at][mark.name] += 1
    return found


def busy(events: list[Event]) -> Busy:
    """The union of the events' times: where two overlap, the time counts once."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.start):
        total += max(0.0, event.end - max(event.start, end))
        end = max(end, event.end)
    seconds_of: dict[str, float] = collections.defaultdict(float)
    for event in events:
        seconds_of[event.name] += 1e-9 * (event.end - event.start)
    names = collections.Counter(event.name for event in events)
    return Busy(1e-9 * total, names, seconds_of, sum(event.in_graph for event in events))


def device_events(profile: Any, *, graphs: bool = False) -> list[Event]:
    """What ran on the streams of the GPUs in a `jax.profiler.ProfileData`.

    `graphs`: find out which of it CUDA graphs launched.

    Raises:
        RuntimeError: if there are none: then CUPTI is missing or may not be used.
    """
    lines = [
        line
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
    ]
    events = [
        Event(
            event.name,
            event.start_ns,
            event.start_ns + event.duration_ns,
            in_graph=graphs and any(name == GRAPH_STAT and value for name, value in event.stats),
        )
        for line in lines
        if line.name.startswith("Stream")  # the other lines repeat them by module and operation
        for event in line.events
    ]
    if not events:
        raise RuntimeError(
            "The profile holds no event on a GPU stream (lines: "
            f"{sorted({line.name for line in lines})}). Is CUPTI installed and may it be used? "
            "`--no-trace` measures wall time alone."
        )
    return events


def host_marks(profile: Any) -> list[Event]:
    """The events on the host that are among `MARKS`, under the names that they have there."""
    return [
        Event(mark, event.start_ns, event.start_ns + event.duration_ns, on_host=True)
        for plane in profile.planes
        if not plane.name.startswith("/device:")
        for line in plane.lines
        for event in line.events
        for mark, part in MARKS.items()
        if part in event.name
    ]


def _profile(runs: list[Callable[[], Any]], calls: int, pause: float, graphs: bool) -> list[Event]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = int(graphs)  # 1 is the least that shows XLA's marks
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            for run in runs:
                for _ in range(calls):
                    result = run()
                jax.block_until_ready(result)
                time.sleep(pause)
        finally:
            jax.profiler.stop_trace()
        (file,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
        events = device_events(profile, graphs=graphs)
        return events + host_marks(profile) if graphs else events
