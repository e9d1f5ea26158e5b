"""Arrays of the host on their way to a device, and those that are put together only then.

A fused or stacked weight lies in a checkpoint in pieces. Joined when the files are opened, all of
them would be on the host at once; joined when they are written, one is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import weakref
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding, SingleDeviceSharding


if TYPE_CHECKING:
    from jaxtyping import Shaped


# Of buffers in XLA on a CPU (tsl/framework/allocator.h, Allocator::kAllocatorAlignment).
ALIGNMENT = 64
PATIENCE = 2.0  # seconds

# Bytes of an array that a GPU is sent at once. XLA copies what is sent to pinned memory first, with
# a thread for each array: weights of 117 MB, one at a time, went at 5.8 GB/s whole, 18 in pieces of
# 32 MB, 27 of 8, 25 of 2; with two of them on their way 11, 20, 32 and 29 (an H200, 2026-11-23).
PIECE = 8 << 20
AT_ONCE = 32 * PIECE


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """Arrays joined along their first axis, and those stacked along new axes, when they are read.

    Equivalent numpy: `np.stack([np.concatenate(parts) for parts in pieces])`, reshaped to
    `[*stack, N, *rest]`. `np.asarray` makes it, every time anew; nothing is kept.

    Attributes:
        pieces: for each element of the stack, in row-major order, the arrays that are joined:
            `[N_i, *rest]`, all of one dtype and `rest`, the N_i adding up to the same N.
        stack: the leading axes; `()` for a single element.
    """

    pieces: tuple[tuple[Shaped[np.ndarray, "N_i *rest"], ...], ...]
    stack: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        parts = self.pieces[0]
        return (*self.stack, sum(len(part) for part in parts), *parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """The dtype of every piece."""
        return self.pieces[0][0].dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the whole, once it is made."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(
                "`copy` must not be False: this array is put together from several pieces of a "
                "file, which is a copy. Leave `copy` out."
            )
        whole = _aligned(self.shape, self.dtype)
        elements = whole.reshape(len(self.pieces), *self.shape[len(self.stack) :])
        for element, parts in zip(elements, self.pieces, strict=True):
            np.concatenate(parts, out=element)
        return whole if dtype is None else whole.astype(dtype, copy=False)


def put(array: Any, sharding: Sharding | None = None) -> jax.Array:
    """`jax.device_put`, by which a GPU is sent several pieces of an array at once.

    Of a stack on one device, a `LazyArray` is sent element by element: the host then holds one
    element, never the whole. Over several devices it holds one whole array.
    """
    if not isinstance(array, LazyArray):
        return _sent(array, sharding)
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


def _sent(array: Any, sharding: Sharding | None) -> jax.Array:
    """An array of the host on its way, a large one in pieces along its first axis.

    A GPU then holds the pieces beside the whole, but never more than `AT_ONCE` of them.
    """
    if (
        not isinstance(array, np.ndarray)
        or array.ndim < 1
        or array.nbytes < 2 * PIECE
        or not array.flags.c_contiguous
        or not isinstance(sharding, SingleDeviceSharding | None)
    ):
        return jax.device_put(array, sharding)
    zero = jax.device_put(np.zeros((), array.dtype), sharding)
    if isinstance(zero, jax.core.Tracer) or not _takes_pieces(zero):
        return jax.device_put(array, sharding)
    row = array.nbytes // len(array)
    if row > PIECE:
        return _elements_sent(array, zero, sharding)
    step = PIECE // row
    if array.nbytes <= AT_ONCE:
        pieces = [array[start : start + step] for start in range(0, len(array), step)]
        return _joined(jax.device_put(pieces, sharding))
    whole = _filled(zero, array.shape)
    for first in range(0, len(array), AT_ONCE // PIECE * step):
        wave = array[first : first + AT_ONCE // PIECE * step]
        pieces = [wave[start : start + step] for start in range(0, len(wave), step)]
        place, *arrived = jax.device_put([np.int32(first), *pieces], sharding)
        whole = jax.block_until_ready(_placed(whole, place, arrived))
    return whole


def _elements_sent(array: np.ndarray, zero: jax.Array, sharding: Sharding | None) -> jax.Array:
    """The same for what has elements above the size of a piece, such as a stack of weights."""
    whole, coming = _filled(zero, array.shape), 0
    for index, element in enumerate(array):
        whole = _set(whole, jax.device_put(np.int32(index), sharding), _sent(element, sharding))
        coming += element.nbytes
        if coming >= AT_ONCE:
            whole, coming = jax.block_until_ready(whole), 0
    return whole


def _takes_pieces(array: jax.Array) -> bool:
    # A CPU reads an array where it is.
    (device,) = array.devices()
    return device.platform == "gpu" and array.sharding.memory_kind in (None, "device")


@jax.jit
def _joined(pieces: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(pieces)


@functools.partial(jax.jit, donate_argnums=0)
def _placed(whole: jax.Array, start: Any, pieces: list[jax.Array]) -> jax.Array:
    for piece in pieces:
        whole = lax.dynamic_update_slice_in_dim(whole, piece, start, axis=0)
        start = start + piece.shape[0]
    return whole


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
        if last[0]() is None or _is_on_cpu(last[1]()):
            break
        jax.block_until_ready(_filled(jax.device_put(np.float32(0)), ()))
        time.sleep(0.0005)
    whole = np.asarray(array)
    assert isinstance(whole.base, np.ndarray)
    made = _sent(whole, sharding)
    _last = weakref.ref(whole.base), weakref.ref(made)
    return made


def _is_on_cpu(array: jax.Array | None) -> bool:
    return array is not None and any(device.platform == "cpu" for device in array.devices())


@functools.partial(jax.jit, static_argnums=1)
def _filled(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # Not `jnp.zeros`, which where a function is traced sends its zero from the host unsaid.
    return jnp.broadcast_to(value, shape)


@functools.partial(jax.jit, donate_argnums=0)
def _set(whole: jax.Array, place: Any, element: jax.Array) -> jax.Array:
    return whole.at[place].set(element)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`np.empty` that XLA on a CPU reads where it is; what begins elsewhere it copies first."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
