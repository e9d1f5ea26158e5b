"""Reloads from the host: each leaf gets its own of what is ahead, and an error lets go of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from send_cases import array, as_on_a_gpu
from update_cases import assert_same_bits

import jaxfp8._donate
from jaxfp8 import (
    DenseWeight,
    KernelShards,
    PaddedKernel,
    _send,
    reload_params,
    reload_stream,
    update_params,
)
from jaxfp8.update import ReloadError


@pytest.fixture
def watched(monkeypatch):
    return as_on_a_gpu(monkeypatch)


def test_a_failed_reload_names_the_leaf_whose_transfer_failed(watched):
    values = {name: array((64, 48), np.float32) + ord(name) for name in "abcd"}
    params = {name: jnp.zeros((64, 48)) for name in "abcd"}
    params = reload_params(params, values)
    first = watched.calls
    values = {name: value + 1 for name, value in values.items()}
    params = reload_params(params, values)
    # The second half of a reload sends what it writes: there the third leaf's last wave fails.
    watched.fails_at = watched.calls + (watched.calls - first) * 7 // 8
    with pytest.raises(ReloadError, match="out of memory") as caught:
        reload_params(params, {name: value + 1 for name, value in values.items()})
    assert caught.value.failed == ("c",) and caught.value.updated == ("a", "b")
    new = caught.value.params
    assert_same_bits([new["a"], new["b"]], [values["a"] + 1, values["b"] + 1])
    assert_same_bits(new["d"], values["d"])


def test_an_error_lets_go_of_what_is_ahead(watched, monkeypatch):
    """Who handles it may be out of memory, and its traceback holds the reload's frames."""
    lines: list[_send._Line] = []
    flying: list[int] = []
    init, run = _send._Line.__init__, jaxfp8._donate.Step.run

    def fail(self, leaves, shared, arrived):
        run(self, leaves, shared, arrived)
        flying.append(len(lines[-1]._flying))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(
        _send._Line, "__init__", lambda self, wanted: (lines.append(self), init(self, wanted))[1]
    )
    monkeypatch.setattr(jaxfp8._donate.Step, "run", fail)
    values = {name: array((64, 48), np.float32) for name in "abcd"}
    with pytest.raises(ReloadError, match="out of memory") as caught:
        reload_params({name: jnp.zeros((64, 48)) for name in "abcd"}, values)
    assert caught.value.failed == ("a",)
    assert flying[0] > 0
    assert not any(line._flying or line._wanted for line in lines)


def test_a_reload_of_pieces(watched):
    value = array((40, 51), np.float32)
    want = {"w": PaddedKernel.from_dense(jnp.asarray(value))}
    served = {"w": PaddedKernel.from_dense(jnp.zeros((40, 51)))}
    with jax.transfer_guard_host_to_device("disallow"):
        assert_same_bits(update_params(served, {"w": value}), want)
        assert_same_bits(served := reload_params(served, {"w": value}), want)
        with reload_stream(served) as stream:
            stream.put("w", value)
            assert_same_bits(stream.finish(), want)
    # The stream sends it once, the others twice.
    assert watched.taken == [4, 4] * 5


@pytest.mark.parametrize("change", [update_params, reload_params, "put_tree"])
def test_each_leaf_gets_its_own_of_what_is_ahead(change, watched):
    """Of all kinds, none alike, from numpy, a device and pinned memory."""
    sizes = {"q": 40, "k": 11}
    pinned = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    whole = {name: array((90, size), np.float32) + ord(name) for name, size in sizes.items()}
    fused = np.concatenate(list(whole.values()), 1)
    stack = np.stack([array((40, 51), np.float32) + i for i in range(3)])
    wide = array((33, 70), np.float32)
    bias = np.arange(700, dtype=np.float32)
    loaded = {
        "a": array((64, 48), np.float32),
        "b": KernelShards(whole, sizes),
        "c": jax.device_put(wide, pinned),
        "d": bias,
        "e": DenseWeight(array((48, 64), np.float32) + 3, "out_in"),
        "f": jnp.asarray(bias[:9]),
        "g": stack,
    }
    dense = {
        "a": loaded["a"],
        "b": fused,
        "c": wide,
        "e": loaded["e"].value.T,
        "g": stack,
    }
    want = {name: PaddedKernel.from_dense(jnp.asarray(value)) for name, value in dense.items()}
    want |= {"d": bias, "f": bias[:9]}
    served = jax.tree.map(jnp.zeros_like, want)
    if change == "put_tree":
        with reload_stream(served) as stream:
            stream.put_tree("", loaded)
            got = stream.finish()
    else:
        got = change(served, loaded)
    assert_same_bits(got, want)
    assert watched.taken
