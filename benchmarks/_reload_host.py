"""A reload of weights that lie on the host: how near it comes to sending them and nothing else."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxfp8.padded import DenseWeight
from jaxfp8.stream import reload_stream
from jaxfp8.update import reload_params


def measure(served: Any, loaded: dict[str, Any], rounds: int) -> tuple[Any, dict[str, Any]]:
    """Gigabytes of weights a second, by `device_put` alone, `reload_params` and `reload_stream`.

    In turn, after one round that compiles. Of every weight `reload_params` sends a copy to be
    checked and one to be written, the others one.

    Args:
        served: a padded tree; consumed.
        loaded: its weights on the device, as `reload_params` takes them.
        rounds: how often each is read.

    Returns:
        The tree, and the row.
    """
    host = jax.tree.map(lambda leaf: np.array(leaf), loaded)
    leaves = jax.tree.leaves(host)
    size = sum(leaf.nbytes for leaf in leaves)

    def sent() -> None:
        for leaf in leaves:  # what was sent is freed when it is there, as a reload does
            jax.block_until_ready(jax.device_put(leaf))

    def reloaded() -> None:
        nonlocal served
        served = jax.block_until_ready(reload_params(served, host))

    def streamed() -> None:
        nonlocal served
        with reload_stream(served) as stream:
            for name, layer in host.items():
                for key, leaf in layer.items():
                    stream.put(f"{name}/{key}", leaf)
            served = jax.block_until_ready(stream.finish())

    contestants: dict[str, Callable[[], None]] = {
        "device_put": sent,
        "reload_params": reloaded,
        "reload_stream": streamed,
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
        "gigabytes_a_second": {name: 1e-9 * size / taken for name, taken in medians.items()},
    }
