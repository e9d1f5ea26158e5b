"""Weights of the host: how many are on their way at once, and what is told of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from update_cases import addresses, assert_same_bits, weight

import jaxfp8._donate
from jaxfp8 import PaddedKernel, _in_flight
from jaxfp8._in_flight import InFlight
from jaxfp8.update import ReloadError, reload_params, update_params


# No two alike: on a GPU those would be written together.
SHAPES = {"a": (24, 40), "b": (24, 56), "c": (7,), "d": (5, 9)}
SIZES = [4 * int(np.prod(shape)) for shape in SHAPES.values()]
BYTES = sum(SIZES)


def served():
    return {
        name: PaddedKernel.from_dense(jnp.zeros(shape)) if name in "ab" else jnp.zeros(shape)
        for name, shape in SHAPES.items()
    }


def trained(seed=0):
    return {name: weight(*shape, seed=seed) for name, shape in SHAPES.items()}


class Sent:
    """An array that is computed on a device which is no CPU, until somebody waits for it."""

    def __init__(self, waited: list[str], name: str):
        self.waited, self.name = waited, name

    def block_until_ready(self):
        self.waited.append(self.name)
        return self


def host(size: int) -> np.ndarray:
    return np.zeros(size, np.uint8)


def test_the_window_lets_in_what_fits_and_waits_for_the_oldest():
    waited: list[str] = []
    window = InFlight(limit=100)
    for name, size in (("a", 60), ("b", 40)):
        window.sent(window.admit([host(size)]), Sent(waited, name), name)
    assert not waited and window.labels == ["a", "b"]
    window.sent(window.admit([host(20), host(20)]), Sent(waited, "c"), "c")
    assert waited == ["a"] and window.labels == ["b", "c"]
    window.sent(window.admit([host(500)]), Sent(waited, "large"), "large")
    assert waited == ["a", "b", "c"] and window.labels == ["large"]
    window.sent(window.admit([host(1)]), Sent(waited, "d"), "d")
    assert waited[-1] == "large" and window.labels == ["d"]
    window.finish()
    assert waited[-1] == "d" and not window.labels


def test_arrays_of_a_device_are_not_waited_for():
    waited: list[str] = []
    window = InFlight(limit=1)
    for name in "abc":
        window.sent(window.admit([jnp.zeros(50)]), Sent(waited, name))
    window.finish()
    assert not waited


def test_what_a_cpu_computes_is_waited_for_at_once():
    window = InFlight()
    made = jax.jit(jnp.copy)(jax.device_put(np.zeros(3), jax.devices("cpu")[0]))
    window.sent(window.admit([host(8)]), made, "a")
    assert not window.labels


def test_a_wait_that_fails_keeps_its_label():
    class Broken(Sent):
        def block_until_ready(self):
            raise RuntimeError("lost")

    window = InFlight(limit=10)
    window.sent(window.admit([host(6)]), Broken([], "a"), "a")
    window.sent(window.admit([host(4)]), Sent([], "b"), "b")
    with pytest.raises(RuntimeError, match="lost"):
        window.finish()
    assert window.labels == ["a", "b"]


def test_the_window_is_used_for_check_and_write(monkeypatch):
    """And it is empty when the call returns: the host arrays may be overwritten then."""
    admitted, finished = [], []
    admit, finish = InFlight.admit, InFlight.finish

    def counted(self, sources):
        admitted.append(admit(self, sources))
        return admitted[-1]

    monkeypatch.setattr(InFlight, "admit", counted)
    monkeypatch.setattr(InFlight, "finish", lambda self: (finished.append(1), finish(self)))
    params, loaded = served(), trained()
    where = addresses(params)
    params = reload_params(params, loaded)
    assert sum(admitted) == 2 * BYTES and len(finished) >= 2
    for leaf in loaded.values():
        leaf[...] = 0
    assert_same_bits(params, update_params(served(), trained()))
    assert addresses(params) == where


def test_a_failure_names_all_that_was_on_its_way(monkeypatch):
    """Three leaves are in flight when the third fails: of none is it known that it is new."""
    monkeypatch.setattr(_in_flight, "_is_on_cpu", lambda array: False)
    run, runs = jaxfp8._donate.Step.run, []

    def fail(self, leaves, shared, arrived):
        runs.append(self.bundle.names)
        if len(runs) == 3:
            raise RuntimeError("out of memory")
        run(self, leaves, shared, arrived)

    monkeypatch.setattr(jaxfp8._donate.Step, "run", fail)
    with pytest.raises(ReloadError, match="out of memory") as caught:
        reload_params(served(), trained())
    assert caught.value.failed == ("a", "b", "c") and caught.value.updated == ()
    assert "Still old: d" in str(caught.value)
    runs.clear()
    with pytest.raises(ReloadError) as caught:
        reload_params(served(), jax.tree.map(jnp.array, trained()))
    assert caught.value.failed == ("c",) and caught.value.updated == ("a", "b")


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
def test_progress_counts_each_byte_twice(place):
    seen: list[tuple[int, int]] = []
    loaded = jax.tree.map(place, trained())
    params = reload_params(served(), loaded, progress=lambda *told: seen.append(told))
    assert_same_bits(params, update_params(served(), loaded))
    assert seen == [(int(done), 2 * BYTES) for done in np.cumsum(SIZES * 2)]
    with pytest.raises(ValueError, match="NaN"):
        reload_params(
            params, {**loaded, "d": np.full((5, 9), np.nan)}, progress=lambda *t: seen.append(t)
        )
    assert seen[-1] == (BYTES + 4 * 45, 2 * BYTES + 8 * 45)  # numpy's NaN is float64


def test_a_bar_and_a_silent_reload(capsys):
    reload_params(served(), trained())
    assert capsys.readouterr() == ("", "")
    reload_params(served(), trained(), progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "reload" in err and "18.8/18.8 kB" in err
