"""Large numpy arrays in pieces, wave by wave, and the programs that make one of them on a GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding, SingleDeviceSharding


# Bytes of a numpy array that a GPU is sent at once. XLA copies what is sent to pinned memory first,
# with a thread for each array: whole weights of 117 MB, one at a time, went at 5.8 GB/s.
PIECE = 8 << 20
# Pieces that are sent by one call, and put in their place by one program.
TOGETHER = 4


Wave: TypeAlias = tuple[list[np.ndarray], int]  # pieces; how many waves come after them


def waves(array: Any, sharding: Sharding | None) -> Iterator[Wave] | None:
    """The rows of an array, in pieces, for `begun` and then `placed`; None where it goes whole."""
    if (
        not isinstance(array, np.ndarray)
        or array.ndim < 1
        or array.nbytes < 2 * PIECE
        or not array.flags.c_contiguous
        or not isinstance(sharding, SingleDeviceSharding | None)
    ):
        return None
    rows = array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array
    if not 2 <= len(rows) < 1 << 31:  # Programs count rows by int32.
        return None
    if not _takes_pieces(jax.device_put(np.zeros((), array.dtype), sharding)):
        return None
    step = max(1, PIECE // rows[0].nbytes)
    return _waves(rows, step, min(TOGETHER, max(1, TOGETHER * PIECE // rows[:step].nbytes)))


def _waves(rows: np.ndarray, step: int, count: int) -> Iterator[Wave]:
    starts = range(0, len(rows), step * count)
    for rest, start in zip(reversed(range(len(starts))), starts, strict=True):
        part = rows[start : start + step * count]
        yield [part[first : first + step] for first in range(0, len(part), step)], rest


def is_on(array: jax.Array | None, platform: str) -> bool:
    """Whether an array, not traced, is in a memory of such devices."""
    if array is None or isinstance(array, jax.core.Tracer):
        return False
    return any(device.platform == platform for device in array.devices())


def _takes_pieces(array: jax.Array) -> bool:
    # A CPU reads an array where it is; where a function is traced, files are constants.
    return is_on(array, "gpu") and array.sharding.memory_kind in (None, "device")


@functools.partial(jax.jit, static_argnums=0)
def begun(shape: tuple[int, ...], pieces: list[jax.Array]) -> tuple[jax.Array, Any]:
    """A whole with its first rows, and how many these are."""
    rows = jnp.concatenate(pieces)
    # Not put into `jnp.zeros`. Where files are read those are computed while this is traced, and
    # then stay as a constant: a whole weight on the device and one on the host, for ever.
    ends = [(0, math.prod(shape) // math.prod(rows.shape[1:]) - len(rows), 0)]
    ends += [(0, 0, 0)] * (rows.ndim - 1)
    whole = lax.pad(rows, np.zeros((), rows.dtype), ends)
    return whole.reshape(shape), np.int32(len(rows))


@functools.partial(jax.jit, donate_argnums=0)
def placed(
    whole: jax.Array, start: jax.Array, pieces: list[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The same with the rows that come next."""
    rows = whole.reshape(-1, *pieces[0].shape[1:])
    for piece in pieces:
        rows = lax.dynamic_update_slice_in_dim(rows, piece, start, axis=0)
        start = start + piece.shape[0]
    return rows.reshape(whole.shape), start
