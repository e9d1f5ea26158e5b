"""How the benchmarks take turns, pair what they read, and clock the host."""

import weakref

import numpy as np
import pytest

from benchmarks import _timing


def test_contestants_run_in_turn_forwards_and_backwards():
    ran = []

    def contestant(name):
        def start():
            ran.append(name)
            number = len(ran)
            return lambda: float(number)

        return start

    seconds = _timing.interleave({name: contestant(name) for name in "AB"}, rounds=3)
    assert "".join(ran) == "ABBAAB"
    assert seconds == {"A": [1.0, 4.0, 5.0], "B": [2.0, 3.0, 6.0]}


def test_ratios_are_of_pairs_so_a_slowing_clock_cancels():
    ours, peer = [1.0, 2.0, 10.0, 3.0], [1.5, 3.0, 15.0, 4.5]
    assert _timing.pairwise_ratio(peer, ours) == 1.5
    # One disturbed round moves the median of the pairs by nothing.
    assert _timing.pairwise_ratio([1.5, 3.0, 999.0, 4.5], ours) == 1.5
    assert _timing.geometric_mean([2.0, 0.5, 1.0]) == pytest.approx(1.0)
    with pytest.raises(ValueError):
        _timing.pairwise_ratio([1.0], [1.0, 2.0])


def test_wall_time_is_divided_by_calls_and_parts(monkeypatch):
    clock = iter([10.0, 22.0])
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: next(clock))
    called = []
    reading = _timing.wall_contestant(lambda: called.append(0), calls=3, parts=2)()
    assert (len(called), reading()) == (3, 2.0)


@pytest.mark.parametrize("dropped", [False, True])
def test_a_result_is_held_until_the_next_or_dropped_before_it(dropped):
    made, still_there = [], []

    def call():
        still_there.append([result() is not None for result in made[-1:]])
        result = np.zeros(3)
        made.append(weakref.ref(result))
        return result

    _timing.wall_contestant(call, calls=3, dropped=dropped)()
    assert still_there == [[], [not dropped], [not dropped]]
