"""Arrays of the host reach a GPU in pieces, and are there what `device_put` makes of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from update_cases import assert_same_bits, mesh_devices

from jaxfp8 import PaddedKernel, _lazy, reload_params, reload_stream, update_params
from jaxfp8._lazy import LazyArray


DTYPES = [ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e4m3fn, np.int32]
SHAPES = [(64, 48), (37, 51), (3, 40, 23), (4001,)]


def array(shape, dtype):
    return np.random.default_rng(0).integers(-9, 9, shape).astype(dtype)


@pytest.fixture
def joined(monkeypatch):
    """Small pieces, on a CPU too; the sizes of those that were joined."""
    sizes: list[list[int]] = []

    def recorded(pieces, shape, join=_lazy._joined):
        sizes.append([piece.size for piece in pieces])
        return join(pieces, shape)

    monkeypatch.setattr(_lazy, "PIECE", 1024)
    monkeypatch.setattr(_lazy, "_takes_pieces", lambda array: True)
    monkeypatch.setattr(_lazy, "_joined", recorded)
    return sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("committed", [False, True])
def test_pieces_are_the_whole(shape, dtype, committed, joined):
    value = array(shape, dtype)
    sharding = jax.sharding.SingleDeviceSharding(mesh_devices(2)[1]) if committed else None
    got, want = _lazy.put(value, sharding), jax.device_put(value, sharding)
    assert_same_bits(got, want)
    assert (got.sharding, got.committed) == (want.sharding, want.committed)
    if value.nbytes < 2048:
        assert not joined
    else:
        (sizes,) = joined
        assert sum(sizes) == value.size and set(sizes[:-1]) == {1024 // value.itemsize}


def test_what_does_not_go_in_pieces(joined):
    turned = array((64, 48), np.float32).T
    mesh = jax.sharding.Mesh(np.array(mesh_devices(2)), "x")
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    assert_same_bits(_lazy.put(turned), jax.device_put(turned))
    assert _lazy.put(array((64, 48), np.float32), split).sharding == split
    traced = jax.jit(lambda: _lazy.put(array((64, 48), np.float32)))()
    assert_same_bits(traced, array((64, 48), np.float32))
    assert not joined


def test_a_cpu_is_sent_the_whole(monkeypatch):
    monkeypatch.setattr(_lazy, "PIECE", 1024)
    monkeypatch.setattr(_lazy, "_joined", None)
    _lazy.put(array((64, 48), np.float32), jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0]))


@pytest.mark.parametrize("stack", [(), (2,)], ids=str)
def test_lazy_arrays_go_in_pieces(stack, joined):
    parts = (array((40, 16), np.float32), array((24, 16), np.float32))
    lazy = LazyArray((parts,) * (2 if stack else 1), stack)
    assert_same_bits(_lazy.put(lazy), np.asarray(lazy))
    assert joined == [[256] * 4] * (2 if stack else 1)


def test_a_reload_of_pieces(joined):
    value = array((40, 51), np.float32)
    want = {"w": PaddedKernel.from_dense(jnp.asarray(value))}
    served = {"w": PaddedKernel.from_dense(jnp.zeros((40, 51)))}
    with jax.transfer_guard_host_to_device("disallow"):
        assert_same_bits(update_params(served, {"w": value}), want)
        assert_same_bits(served := reload_params(served, {"w": value}), want)
        with reload_stream(served) as stream:
            stream.put("w", value)
            assert_same_bits(stream.finish(), want)
    assert len(joined) == 5  # The stream sends it once, the others twice.


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2 * _lazy.PIECE - 4, 2 * _lazy.PIECE, 41_000_004])
def test_a_gpu_takes_pieces(size, monkeypatch):
    pieces: list[int] = []
    join = _lazy._joined
    monkeypatch.setattr(
        _lazy, "_joined", lambda some, shape: (pieces.append(len(some)), join(some, shape))[1]
    )
    value = array((size // 4,), np.int32)
    assert_same_bits(_lazy.put(value), value)
    assert pieces == ([-(-size // _lazy.PIECE)] if size >= 2 * _lazy.PIECE else [])
