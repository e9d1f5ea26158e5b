"""Arrays of the host reach a GPU in pieces, and are there what `device_put` makes of them."""

from __future__ import annotations

import time

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
def sent(monkeypatch):
    """Small pieces, on a CPU too; the bytes of those that one program took."""
    sizes: list[list[int]] = []
    join, place = _lazy._joined, _lazy._placed

    def joined(pieces):
        sizes.append([piece.nbytes for piece in pieces])
        return join(pieces)

    def placed(whole, start, pieces):
        sizes.append([piece.nbytes for piece in pieces])
        return place(whole, start, pieces)

    monkeypatch.setattr(_lazy, "PIECE", 1024)
    monkeypatch.setattr(_lazy, "AT_ONCE", 16 * 1024)
    monkeypatch.setattr(_lazy, "_takes_pieces", lambda array: True)
    monkeypatch.setattr(_lazy, "_joined", joined)
    monkeypatch.setattr(_lazy, "_placed", placed)
    return sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("committed", [False, True])
def test_pieces_are_the_whole(shape, dtype, committed, sent):
    value = array(shape, dtype)
    sharding = jax.sharding.SingleDeviceSharding(mesh_devices(2)[1]) if committed else None
    got, want = _lazy.put(value, sharding), jax.device_put(value, sharding)
    assert_same_bits(got, want)
    assert (got.sharding, got.committed) == (want.sharding, want.committed)
    # An element between one piece and two goes as it is.
    assert bool(sent) == (value.nbytes >= 2048 and not 1024 < value[0].nbytes < 2048)
    assert all(sum(sizes) <= _lazy.AT_ONCE and max(sizes) <= 1024 for sizes in sent)
    if sent and value.dtype.itemsize < 8:  # float64 arrives as float32
        assert sum(map(sum, sent)) == value.nbytes


def test_a_large_array_goes_in_waves(sent):
    value = array((300, 48), np.float32)  # 57,600 bytes, 5 rows a piece, 16 pieces a wave
    assert_same_bits(_lazy.put(value), value)
    assert [len(sizes) for sizes in sent] == [16, 16, 16, 12]


def test_a_stack_goes_by_elements(sent):
    value = array((3, 40, 23), np.float32)  # 3,680 bytes each, 11 rows a piece
    assert_same_bits(_lazy.put(value), value)
    assert [len(sizes) for sizes in sent] == [4, 4, 4]


def test_what_does_not_go_in_pieces(sent):
    turned = array((64, 48), np.float32).T
    mesh = jax.sharding.Mesh(np.array(mesh_devices(2)), "x")
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    assert_same_bits(_lazy.put(turned), jax.device_put(turned))
    assert _lazy.put(array((64, 48), np.float32), split).sharding == split
    traced = jax.jit(lambda: _lazy.put(array((64, 48), np.float32)))()
    assert_same_bits(traced, array((64, 48), np.float32))
    assert not sent


def test_a_cpu_is_sent_the_whole(monkeypatch):
    monkeypatch.setattr(_lazy, "PIECE", 1024)
    monkeypatch.setattr(_lazy, "_joined", None)
    _lazy.put(array((64, 48), np.float32), jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0]))


@pytest.mark.parametrize("stack", [(), (2,)], ids=str)
def test_lazy_arrays_go_in_pieces(stack, sent):
    parts = (array((40, 16), np.float32), array((24, 16), np.float32))
    lazy = LazyArray((parts,) * (2 if stack else 1), stack)
    assert_same_bits(_lazy.put(lazy), np.asarray(lazy))
    assert sent == [[1024] * 4] * (2 if stack else 1)


def test_nobody_waits_for_an_array_in_use(monkeypatch):
    """On a CPU it is the host's memory, for as long as somebody holds it."""
    monkeypatch.setattr(_lazy, "PATIENCE", 60.0)
    lazy = LazyArray(((array((40, 16), np.float32),),))
    start = time.monotonic()
    held = [_lazy.put(lazy) for _ in range(3)]
    assert time.monotonic() - start < 30
    assert_same_bits(held[0], held[2])


def test_a_reload_of_pieces(sent):
    value = array((40, 51), np.float32)
    want = {"w": PaddedKernel.from_dense(jnp.asarray(value))}
    served = {"w": PaddedKernel.from_dense(jnp.zeros((40, 51)))}
    with jax.transfer_guard_host_to_device("disallow"):
        assert_same_bits(update_params(served, {"w": value}), want)
        assert_same_bits(served := reload_params(served, {"w": value}), want)
        with reload_stream(served) as stream:
            stream.put("w", value)
            assert_same_bits(stream.finish(), want)
    assert len(sent) == 5  # The stream sends it once, the others twice.


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 1023, 1024), (4096, 1024), (10_001, 1024), (5, 3000, 1024)])
def test_a_gpu_takes_pieces(shape, monkeypatch):
    taken: list[int] = []
    join, place = _lazy._joined, _lazy._placed
    monkeypatch.setattr(_lazy, "AT_ONCE", 4 * _lazy.PIECE)
    monkeypatch.setattr(_lazy, "_joined", lambda p: (taken.append(len(p)), join(p))[1])
    monkeypatch.setattr(_lazy, "_placed", lambda w, s, p: (taken.append(len(p)), place(w, s, p))[1])
    value = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    assert_same_bits(_lazy.put(value), value)
    # A piece is 2,048 rows; a stack goes by its elements, those below two pieces as they are.
    assert taken == {4: [], 4096: [2], 10_001: [4, 1], 5: []}[shape[0]]
