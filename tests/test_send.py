"""Arrays reach a GPU in pieces, ahead of the programs that read them, and are what was sent."""

from __future__ import annotations

import time

import jax
import jax.extend
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from send_cases import AHEAD, PIECE, array, as_on_a_gpu
from update_cases import assert_same_bits, mesh_devices

from jaxfp8 import _pieces, _send
from jaxfp8._lazy import LazyArray


DTYPES = [ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e4m3fn, np.int32]
SHAPES = [(64, 48), (37, 51), (3, 40, 23), (4001,), (2, 3, 500)]


@pytest.fixture
def watched(monkeypatch):
    return as_on_a_gpu(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("committed", [False, True])
def test_pieces_are_the_whole(shape, dtype, committed, watched):
    value = array(shape, dtype)
    sharding = jax.sharding.SingleDeviceSharding(mesh_devices(2)[1]) if committed else None
    got = _send.put(value, sharding)
    want = jax.device_put(value, sharding)
    assert_same_bits(got, want)
    assert (got.sharding, got.committed) == (want.sharding, want.committed)
    assert bool(watched.taken) == (value.nbytes >= 2 * PIECE)
    assert all(count <= _pieces.TOGETHER for count in watched.taken)


def test_a_program_takes_some_pieces(watched):
    value = array((300, 48), np.float32)  # 5 rows a piece
    assert_same_bits(_send.put(value), value)
    assert watched.taken == [4] * 15


def test_the_next_arrays_are_on_their_way(watched):
    shapes = [(300, 48), (7,), (64, 48), (200, 48), (150, 48)]
    values = [array(shape, np.float32) + i for i, shape in enumerate(shapes)]
    arrays = _send.arriving((value, None) for value in values)
    first = next(arrays)
    # All of the first is there, and behind it as much is on its way as may be.
    assert watched.waited == values[0].nbytes
    assert AHEAD <= watched.sent - watched.waited < AHEAD + _pieces.TOGETHER * PIECE
    for got, value in zip([first, *arrays], values, strict=True):
        assert_same_bits(got, value)
    assert watched.waited == watched.sent == sum(value.nbytes for value in values)
    assert AHEAD <= watched.most_ahead < AHEAD + 2 * _pieces.TOGETHER * PIECE


@pytest.mark.parametrize("row", [300, 3000, 5000])
def test_a_wave_of_long_rows_is_no_larger(row, watched):
    value = array((40, row // 4), np.float32)
    assert_same_bits(_send.put(value), value)
    assert max(watched.taken) * row <= max(_pieces.TOGETHER * PIECE, row)


def test_a_transfer_that_fails_is_that_array_s(watched):
    """Its like are on their way before; those before it are handed out."""
    values = [array((64, 48), np.float32) + i for i in range(4)]
    watched.fails_at = 8  # Each asks where it goes, and is sent in four waves.
    arrays = _send.arriving((value, None) for value in values)
    assert_same_bits(next(arrays), values[0])
    with pytest.raises(RuntimeError, match="out of memory"):
        next(arrays)
    with pytest.raises(StopIteration):
        next(arrays)


def test_a_lazy_array_is_not_read_ahead(watched):
    class Read(LazyArray):
        def __array__(self, dtype=None, copy=None):
            reads.append(len(reads))
            return super().__array__(dtype, copy)

    reads: list[int] = []
    value = array((64, 48), np.float32)
    lazy = Read(((value[:40], value[40:]),))
    arrays = _send.arriving([(value, None), (lazy, None), (value, None), (lazy, None)])
    for want in (0, 1, 1, 2):
        assert_same_bits(next(arrays), value)
        assert len(reads) == want


def test_what_does_not_go_in_pieces(watched):
    turned = array((64, 48), np.float32).T
    mesh = jax.sharding.Mesh(np.array(mesh_devices(2)), "x")
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    assert_same_bits(_send.put(turned), jax.device_put(turned))
    assert _send.put(array((64, 48), np.float32), split).sharding == split
    assert_same_bits(_send.put(array((1, 4800), np.float32)), array((1, 4800), np.float32))
    traced = jax.jit(lambda: _send.put(array((64, 48), np.float32)))()
    assert_same_bits(traced, array((64, 48), np.float32))
    assert not watched.taken


def test_more_rows_than_an_int32_counts_go_whole(watched):
    many = np.empty(1 << 31, np.uint8)  # Never touched: it takes no memory.
    assert _pieces.waves(many, None) is None
    pieces, rest = next(_pieces.waves(many[:-1], None))
    assert [len(piece) for piece in pieces] == [PIECE] * 4
    assert rest == ((1 << 31) - 2) // (4 * PIECE)


def test_what_is_there_is_handed_on(watched):
    there = jnp.arange(4000.0)
    device = jax.sharding.SingleDeviceSharding(mesh_devices(2)[1])
    arrays = _send.arriving([(there, None), (there, device), (there, device)])
    assert next(arrays) is there and watched.calls <= 1
    for count in (1, 2):  # From device to device nothing waits, and nothing goes ahead.
        moved = next(arrays)
        assert moved.sharding == device and watched.calls == count
    assert_same_bits(moved, jax.device_put(there, device))
    assert watched.waited == 0


@pytest.mark.parametrize("kind", ["numpy", "there", "pinned_host"])
def test_a_cpu_is_sent_the_whole_when_it_is_asked_for(kind, monkeypatch):
    cpu = jax.devices("cpu")[0]
    where = jax.sharding.SingleDeviceSharding(cpu)
    pinned = jax.sharding.SingleDeviceSharding(cpu, memory_kind="pinned_host")
    value = array((64, 48), np.float32)
    first = {"numpy": value, "there": jnp.asarray(value), "pinned_host": None}[kind]
    other = value
    if kind == "pinned_host":
        first = other = jax.device_put(value, pinned)
    device_put, calls = jax.device_put, []
    monkeypatch.setattr(_pieces, "PIECE", 1024)
    monkeypatch.setattr(_pieces, "begun", None)
    monkeypatch.setattr(
        jax, "device_put", lambda x, *a: (calls.append(x.shape), device_put(x, *a))[1]
    )
    arrays = _send.arriving([(first, None if kind == "there" else where), *[(other, where)] * 3])
    for count, got in enumerate(arrays, kind != "there"):
        assert calls.count((64, 48)) == count
        assert_same_bits(got, value)


@pytest.mark.parametrize("stack", [(), (2,)], ids=str)
def test_lazy_arrays_go_in_pieces(stack, watched):
    parts = (array((40, 16), np.float32), array((24, 16), np.float32))
    lazy = LazyArray((parts,) * (2 if stack else 1), stack)
    assert_same_bits(_send.put(lazy), np.asarray(lazy))
    assert watched.taken == [4] * (2 if stack else 1)


def test_nobody_waits_for_an_array_in_use(monkeypatch):
    """On a CPU it is the host's memory, for as long as somebody holds it."""
    monkeypatch.setattr(_send, "PATIENCE", 60.0)
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    lazy = LazyArray(((array((40, 16), np.float32),),))
    start = time.monotonic()
    held = [_send.put(lazy, cpu) for _ in range(3)]
    assert time.monotonic() - start < 30
    assert_same_bits(held[0], held[2])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 1025, 1024), (4096, 1024), (10_001, 1024), (5, 300, 1024)])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("dtype", [np.int32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_a_gpu_takes_pieces(shape, pinned, dtype, monkeypatch):
    taken: list[int] = []
    begun, placed = _pieces.begun, _pieces.placed
    monkeypatch.setattr(_pieces, "begun", lambda s, p: (taken.append(len(p)), begun(s, p))[1])
    monkeypatch.setattr(
        _pieces, "placed", lambda w, s, p: (taken.append(len(p)), placed(w, s, p))[1]
    )
    size = np.prod(shape) * (4 // np.dtype(dtype).itemsize)
    value = np.arange(size).reshape(*shape[:-1], -1)
    value = (value if dtype == np.int32 else value % 31 - 15).astype(dtype)
    sources = [value, value[:1], value]
    if pinned:
        (gpu,) = {jax.devices()[0]}
        there = jax.sharding.SingleDeviceSharding(gpu, memory_kind="pinned_host")
        sources = [jax.device_put(source, there) for source in sources]
    for got, source in zip(_send.arriving((s, None) for s in sources), sources, strict=True):
        assert_same_bits(got, source)
        assert got.sharding.memory_kind == "device"
    pieces = -(-value.nbytes // _pieces.PIECE)
    assert sum(taken) == (0 if pinned or shape[0] == 5 else 2 * pieces)


@pytest.mark.parametrize("program", ["begun", "placed"])
def test_programs_of_pieces_have_no_constants(program):
    """What is a constant stays with the program, on the host and on the device.

    Files are read where nothing is traced, and `jnp.zeros` is computed there.
    """
    pieces = [jnp.ones((5, 48))] * 2
    whole = jnp.ones((64, 48)) if program == "placed" else (64, 48)
    arguments = (whole, jnp.int32(10), pieces) if program == "placed" else (whole, pieces)
    with jax.ensure_compile_time_eval():
        traced = getattr(_pieces, program).trace(*arguments)
    literals = [
        atom.val
        for equation in traced.jaxpr.eqns
        for atom in equation.invars
        if isinstance(atom, jax.extend.core.Literal)
    ]
    assert all(np.size(constant) == 1 for constant in [*traced.jaxpr.consts, *literals])
