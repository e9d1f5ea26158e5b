"""Arrays on their way to devices: in pieces, and ahead of the program that reads them.

On a GPU memory that a transfer is to fill may still be in use by a program, so XLA lets a transfer
wait for the programs that were sent off before it; and a program waits for its arrays. Where a
program is sent off before its arrays are there, the transfers behind it therefore wait for those
before it, and the link is idle. So here the host waits for an array, while the next ones are on
their way, and then hands it out. A reload from pinned memory then sends 49 GB/s, and 35 before; the
link carries 55 (an H200, 2026-11-23).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
import weakref
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from jaxfp8 import _pieces
from jaxfp8._lazy import LazyArray


# Bytes that are on their way to a GPU beside the array that is waited for.
AHEAD = 192 << 20
PATIENCE = 2.0  # seconds


def in_host_memory(array: Any) -> bool:
    """Whether programs cannot compute with it yet: of numpy, or offloaded by `pinned_host`."""
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or array.sharding.memory_kind == "pinned_host"


def unpinned(sharding: Sharding) -> Sharding:
    """The same devices, and their own memory."""
    device: Any = next(iter(sharding.device_set))
    return sharding.with_memory_kind(device.default_memory().kind)


def put(array: Any, sharding: Sharding | None = None) -> jax.Array:
    """`jax.device_put` of one array, as `arriving` does it."""
    return next(arriving([(array, sharding)]))


def arriving(
    wanted: Iterable[tuple[Any, Sharding | None]],
) -> Generator[jax.Array, None, None]:
    """Arrays where they are wanted, in this order, with those that come later on their way.

    What comes from the host to a GPU is there when it is handed out: its memory may be overwritten.
    On a CPU it may still be that memory, and nothing goes ahead. A LazyArray is read when it is
    asked for, and not before. What a transfer raises is raised when that array is asked for.

    Args:
        wanted: of numpy, JAX, or LazyArrays, and where; None is the device where an array lies,
            and for those of numpy the default one, as for `jax.device_put`.
    """
    line = _Line(wanted)
    try:
        while line.more():
            yield line.take()
    finally:
        line.drop()  # Who handles an error may want the memory.


@dataclasses.dataclass(frozen=True)
class _Wave:
    """An array on its way, or some of the pieces of one.

    Attributes:
        arrays: what was sent.
        waits: whether it is waited for. While it is, others are sent.
        cost: how much of `AHEAD` it takes.
        shape: of the whole that the pieces make; None for an array itself.
        rest: how many waves of the same whole come after it.
        error: what was raised in place of sending it.
    """

    arrays: list[jax.Array]
    waits: bool
    cost: int
    shape: tuple[int, ...] | None = None
    rest: int = 0
    error: Exception | None = None


class _Line:
    """What is still to be sent, and what is on its way, both in order."""

    def __init__(self, wanted: Iterable[tuple[Any, Sharding | None]]):
        self._wanted = collections.deque(wanted)
        self._waves: Iterator[_Wave] = iter(())
        self._flying: collections.deque[_Wave] = collections.deque()
        self._ahead = 0

    def more(self) -> bool:
        """Whether there is another array; it is on its way then."""
        if not self._flying and self._wanted:
            self._waves = _sent(*self._wanted.popleft())
            self._send()
        return bool(self._flying)

    def take(self) -> jax.Array:
        """The next array."""
        wave = self._next()
        if wave.shape is None:
            (array,) = wave.arrays
            return array
        whole, start = _pieces.begun(wave.shape, wave.arrays)
        while wave.rest:
            wave = self._next()
            whole, start = _pieces.placed(whole, start, wave.arrays)
        return whole

    def drop(self) -> None:
        """Forget what is on its way, and what is not."""
        self._wanted.clear()
        self._flying.clear()
        self._waves = iter(())

    def _next(self) -> _Wave:
        wave = self._flying.popleft()
        self._ahead -= wave.cost
        if wave.error is not None:
            raise wave.error
        if wave.waits:
            self._send()
            jax.block_until_ready(wave.arrays)
        return wave

    def _send(self) -> None:
        while self._ahead < AHEAD:
            try:
                wave = next(self._waves, None)
            except Exception as error:
                self._wanted.clear()
                wave = _Wave([], False, AHEAD, error=error)
            if wave is not None:
                self._flying.append(wave)
                self._ahead += wave.cost
            elif self._wanted and not isinstance(self._wanted[0][0], LazyArray):
                self._waves = _sent(*self._wanted.popleft())
            else:
                return


def _sent(array: Any, sharding: Sharding | None) -> Iterator[_Wave]:
    """An array, or its pieces wave by wave, sent when it is asked for."""
    if isinstance(array, LazyArray):
        yield _Wave([_read(array, sharding)], False, AHEAD)
    elif isinstance(array, jax.Array):
        pinned = in_host_memory(array)
        where = unpinned(array.sharding) if pinned and sharding is None else sharding
        if where is None or array.sharding == where:
            yield _Wave([array], False, AHEAD if _pieces.is_on(array, "cpu") else 0)
        else:
            comes = pinned or _pieces.is_on(array, "cpu")
            yield _alone(jax.device_put(array, where), comes=comes)
    elif (waves := _pieces.waves(array, sharding)) is not None:
        for pieces, rest in waves:
            cost = sum(piece.nbytes for piece in pieces)
            yield _Wave(jax.device_put(pieces, sharding), True, cost, array.shape, rest)
    else:
        yield _alone(jax.device_put(array, sharding))


def _alone(array: jax.Array, *, comes: bool = True) -> _Wave:
    """What was sent whole; whether it came from the host."""
    if comes and _pieces.is_on(array, "gpu"):
        return _Wave([array], True, array.nbytes)
    return _Wave([array], False, AHEAD)  # Nothing waits, so nothing is gained by going ahead.


def _read(array: LazyArray, sharding: Sharding | None) -> jax.Array:
    """A LazyArray, read and sent.

    Of a stack on one device, element by element: the host then holds one element, never the whole.
    Over several devices it holds one whole array.
    """
    # Where a function is traced, files are constants.
    with jax.ensure_compile_time_eval():
        if not array.stack or not isinstance(sharding, SingleDeviceSharding | None):
            return _read_and_sent(array, sharding)
        elements = (len(array.pieces), *array.shape[len(array.stack) :])
        whole = _filled(jax.device_put(np.zeros((), array.dtype), sharding), elements)
        for index, parts in enumerate(array.pieces):
            element = _read_and_sent(LazyArray((parts,)), sharding)
            # Put there outright, for `jax.transfer_guard`, like the zeros.
            place = jax.device_put(np.int32(index), sharding)
            whole = jax.block_until_ready(_set(whole, place, element))
            del element
        return whole.reshape(array.shape)


# The memory of the array that was read last, and what was made of it.
_last: tuple[weakref.ref[np.ndarray], weakref.ref[jax.Array]] | None = None


def _read_and_sent(array: LazyArray, sharding: Sharding | None) -> jax.Array:
    """An array read and sent, when the one before is no more on the host.

    XLA frees a numpy array when it is called for the next time, not when it has read it, and
    sometimes only at a later call: up to a tenth of a second later, seen at 180 MB (jax 0.10.2 on
    a busy CPU). So it is called until it has, but not for ever, and not where what was made of it
    is still in use on a CPU, where it is the same memory.
    """
    global _last
    end = time.monotonic() + PATIENCE
    while (last := _last) is not None and time.monotonic() < end:
        if last[0]() is None or _pieces.is_on(last[1](), "cpu"):
            break
        jax.block_until_ready(_filled(jax.device_put(np.float32(0)), ()))
        time.sleep(0.0005)
    whole = np.asarray(array)
    assert isinstance(whole.base, np.ndarray)
    made = put(whole, sharding)
    _last = weakref.ref(whole.base), weakref.ref(made)
    return made


@functools.partial(jax.jit, static_argnums=1)
def _filled(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # Not `jnp.zeros`, which where a function is traced sends its zero from the host unsaid.
    return jnp.broadcast_to(value, shape)


@functools.partial(jax.jit, donate_argnums=0)
def _set(whole: jax.Array, place: Any, element: jax.Array) -> jax.Array:
    return whole.at[place].set(element)
