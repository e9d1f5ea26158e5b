"""Which one device arrays lie on, and programs on that."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding


def where_they_lie(arrays: Sequence[Any]) -> contextlib.AbstractContextManager:
    """Runs a `jit` of uncommitted arrays on their device, which is else the default one.

    Arrays of several devices it leaves to `jit`.
    """
    devices = set(map(device_of, arrays))
    where = devices.pop() if len(devices) == 1 else None
    return contextlib.nullcontext() if where is None else jax.default_device(where)


def cuda_device(arrays: Sequence[Any]) -> jax.Device | None:
    """The one CUDA device that all arrays are on, if there is one."""
    devices = set(map(device_of, arrays))
    if len(devices) != 1:
        return None
    (device,) = devices
    return device if device is not None and device.platform == "gpu" else None


def device_of(array: Any) -> jax.Device | None:
    """The one device whose own memory an array is in; None else, and for numpy and tracers."""
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        return None
    if not isinstance(array.sharding, SingleDeviceSharding):
        return None
    if array.sharding.memory_kind not in (None, "device"):
        return None
    return next(iter(array.sharding.device_set))


def source_device(source: Any) -> jax.Device | None:
    """Where an array is measured: one of the host on the device that `device_put` takes it to."""
    if isinstance(source, jax.Array):
        return device_of(source)
    return device_of(jax.device_put(np.zeros((), np.float32)))
