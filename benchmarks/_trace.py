"""Device-busy time from a profile: what the GPU did, without the time it waited for the host.

Read from `jax.profiler`'s own file, so no TensorBoard is needed. While a profile is taken XLA does
not use command buffers, so every kernel is seen; the gaps between them do not count.
"""

from __future__ import annotations

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


@dataclasses.dataclass(frozen=True)
class Event:
    """A kernel, copy or fill on a GPU stream, in nanoseconds."""

    name: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Busy:
    """What one contestant did in one round.

    Attributes:
        seconds: during which at least one kernel, copy or fill ran.
        kernels: how many of each name ran.
        seconds_of: how long all of a name took together.
    """

    seconds: float
    kernels: collections.Counter[str]
    seconds_of: collections.Counter[str]


def measure_busy(
    contestants: Mapping[str, Callable[[], Any]],
    rounds: int,
    calls: int,
    pause: float = PAUSE_SECONDS,
) -> dict[str, list[Busy]]:
    """`calls` calls of each contestant in each round, interleaved within one profile.

    A contestant is told from the next by the `pause` in seconds between them, so it may not idle
    for half of that itself.

    Raises:
        RuntimeError: if the profile does not show each contestant apart from the next.
    """
    names = order(list(contestants), rounds)
    for _ in range(ATTEMPTS):
        groups = split(_profile([contestants[name] for name in names], calls, pause), pause)
        if len(groups) == len(names):
            break
    else:
        raise RuntimeError(
            f"The profile shows {len(groups)} separate bursts of work on the GPU, but "
            f"{len(names)} contestants ran. Is something else running on it? `--no-trace` "
            "measures wall time alone."
        )
    found: dict[str, list[Busy]] = {name: [] for name in contestants}
    for name, events in zip(names, groups, strict=True):
        found[name].append(busy(events))
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


def busy(events: list[Event]) -> Busy:
    """The union of the events' times: where two overlap, the time counts once."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.start):
        total += max(0.0, event.end - max(event.start, end))
        end = max(end, event.end)
    seconds_of: collections.Counter[str] = collections.Counter()
    for event in events:
        seconds_of[event.name] += 1e-9 * (event.end - event.start)
    return Busy(1e-9 * total, collections.Counter(e.name for e in events), seconds_of)


def device_events(profile: Any) -> list[Event]:
    """What ran on the streams of the GPUs in a `jax.profiler.ProfileData`.

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
        Event(event.name, event.start_ns, event.start_ns + event.duration_ns)
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


def _profile(runs: list[Callable[[], Any]], calls: int, pause: float) -> list[Event]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 0
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
        return device_events(jax.profiler.ProfileData.from_file(str(file)))
