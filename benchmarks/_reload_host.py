"""A reload of weights that lie on the host: how near it comes to sending them and nothing else."""

from __future__ import annotations

import concurrent.futures
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxfp8.padded import DenseWeight
from jaxfp8.stream import reload_stream
from jaxfp8.update import reload_params


# What XLA must copy to pinned memory first, and what lies there.
MEMORIES = ("numpy", "pinned_host")
COPIED = 8 << 20  # bytes that a thread copies at a time


def memories() -> list[str]:
    """Those of MEMORIES that the first device has."""
    kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    return [name for name in MEMORIES if name == "numpy" or name in kinds]


def measure(
    served: Any, loaded: dict[str, dict[str, Any]], memory: str, rounds: int
) -> tuple[Any, dict[str, Any]]:
    """Gigabytes of weights a second, of transfers alone and of reloads.

    In turn, after one round that compiles. Of every weight `reload_params` sends a copy to be
    checked and one to be written, the others one. Beside them what the host itself can copy, with
    a thread for each core: what is not pinned is copied first.

    Args:
        served: a padded tree; consumed.
        loaded: its weights on the device, as `reload_params` takes them; `layer_0/q` is of layer_0.
        memory: of MEMORIES, where they lie when they are read.
        rounds: how often each is read.

    Returns:
        The tree, and the row.
    """
    host = jax.tree.map(lambda leaf: np.array(leaf), loaded)
    copied = _host_copy(jax.tree.leaves(host))
    if memory != "numpy":
        there = SingleDeviceSharding(jax.devices()[0], memory_kind=memory)
        host = jax.block_until_ready(jax.device_put(host, there))
    leaves = jax.tree.leaves(host)
    size = sum(leaf.nbytes for leaf in leaves)
    layers: dict[str, dict[str, Any]] = {}
    for name, layer in host.items():
        layers.setdefault(name.partition("/")[0], {})[name] = layer
    device = SingleDeviceSharding(jax.devices()[0])

    def one_by_one() -> None:
        for leaf in leaves:  # what was sent is freed when it is there, as a reload does
            jax.block_until_ready(jax.device_put(leaf, device))

    def by_layer() -> None:
        for layer in layers.values():
            jax.block_until_ready(jax.device_put(layer, device))

    def reloaded() -> None:
        nonlocal served
        served = jax.block_until_ready(reload_params(served, host))

    def put() -> None:
        nonlocal served
        with reload_stream(served) as stream:
            for name, layer in host.items():
                for key, leaf in layer.items():
                    stream.put(f"{name}/{key}", leaf)
            served = jax.block_until_ready(stream.finish())

    def put_tree() -> None:
        nonlocal served
        with reload_stream(served) as stream:
            for layer in layers.values():
                stream.put_tree("", layer)
            served = jax.block_until_ready(stream.finish())

    contestants: dict[str, Callable[[], None]] = {
        "host_copy": copied,
        "device_put_one_by_one": one_by_one,
        "device_put_by_layer": by_layer,
        "reload_params": reloaded,
        "put": put,
        "put_tree": put_tree,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(loaded.values()))["kernel"]
    return served, {
        "bytes": size,
        "layout": first.layout if isinstance(first, DenseWeight) else "in_out",
        "memory": memory,
        "gigabytes_a_second": {name: 1e-9 * size / taken for name, taken in medians.items()},
    }


def _host_copy(leaves: list[np.ndarray]) -> Callable[[], None]:
    """Copies the arrays within the host's memory."""
    pairs = []
    for leaf in leaves:
        source, target = (a.reshape(-1).view(np.uint8) for a in (leaf, np.zeros_like(leaf)))
        for start in range(0, leaf.nbytes, COPIED):
            part = slice(start, start + COPIED)
            pairs.append((target[part], source[part]))

    def copy() -> None:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for result in [pool.submit(np.copyto, *pair) for pair in pairs]:
                result.result()

    return copy
