"""Reloading Llama-3-8B's dense weights: bfloat16 on the device into a padded FP8 tree, in place.

7.5e9 weights, read twice (absolute maxima, which also show NaN; then the cast) and written once.
Wall time, device-busy time, both as a share of the copy bandwidth measured beside it; the extra
memory at the peak; recompiles; buffers that moved. Both layouts a trainer may have; and with
`allow_nonfinite`, which with the plugin saves the pass that checks: one read and one write.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _reload_host, _report, _trace, shapes
from benchmarks._timing import wall_contestant
from jaxfp8._cutlass import problem
from jaxfp8.padded import DenseWeight, PaddedKernel, padded_size
from jaxfp8.update import reload_params


LAYOUTS = ("in_out", "out_in")
CASES = [(layout, allow) for allow in (False, True) for layout in LAYOUTS]
COPIED_BYTES = {"8b": 4 << 30, "small": 4 << 20}
SMALL = {"layers": 2, "divisor": 64}
TRACE_ROUNDS = 3

_compilations: list[str] = []


def _count(event: str, duration_secs: float, **details: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compilations.append(event)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scale",
        choices=("8b", "small"),
        help="8b needs 40 GB on the device (default: 8b on a GPU, small elsewhere)",
    )
    parser.add_argument("--no-trace", action="store_true", help="wall time alone")
    parser.add_argument(
        "--host", action="store_true", help="weights on the host instead (of 4 layers, 1.7 GB)"
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; 1 if a weight is not what `from_dense` gives, or a buffer moved."""
    jax.monitoring.register_event_duration_secs_listener(_count)
    on_gpu = jax.default_backend() == "gpu"
    scale = options.scale or ("8b" if on_gpu else "small")
    if not on_gpu:
        print(_report.NO_GPU)
    elif problem() is not None:
        print(f"The reload is XLA's on any GPU, so it is measured; but {problem()}")
    if options.host:
        return run_host(options, on_gpu, scale)
    sizes = shapes.llama_sizes(**({} if scale == "8b" else SMALL))
    copy_bandwidth = measure_copy(COPIED_BYTES[scale])
    rows = []
    trace = on_gpu and not options.no_trace
    for case in _report.Progress(len(CASES)).steps(CASES):
        rows.append(measure(sizes, *case, options.rounds, copy_bandwidth, trace=trace))
    content = {
        "benchmark": "reload",
        "is_gpu_number": on_gpu and scale == "8b",
        "environment": _report.environment(jax.devices()[0].device_kind),
        "scale": scale,
        "rounds": options.rounds,
        "weights": sum(k * n for k, n in sizes.values()),
        "copy_bytes_per_second": copy_bandwidth,
        "rows": rows,
    }
    _print(content)
    _report.write_json(options.out, "reload", content)
    return int(any(row["wrong"] or row["recompiles"] or row["moved_buffers"] for row in rows))


def run_host(options: argparse.Namespace, on_gpu: bool, scale: str) -> int:
    """The same from host memory, whose peers are the transfer itself and the host's own copies."""
    sizes = shapes.llama_sizes(**({"layers": 4} if scale == "8b" else SMALL))
    sizes = {name: size for name, size in sizes.items() if name.startswith("layer_")}
    rows, wrong = [], []
    cases = [(layout, memory) for layout in LAYOUTS for memory in _reload_host.memories()]
    for layout, memory in _report.Progress(len(cases)).steps(cases):
        loaded = trainer_tree(sizes, layout)
        served, row = _reload_host.measure(served_tree(sizes), loaded, memory, options.rounds)
        wrong += wrong_weights(served, loaded, sizes)
        rows.append(row)
        del served, loaded
    columns = ["layout", "memory", "host's copy\nGB/s", "device_put,\none by one", "by layer"]
    columns += ["reload_params,\nsends twice", "stream, put", "put_tree\nby layer"]
    lines = [
        [
            row["layout"],
            row["memory"],
            *(f"{rate:.1f}" for rate in row["gigabytes_a_second"].values()),
        ]
        for row in rows
    ]
    _report.print_table(f"{rows[0]['bytes'] / 1e9:.2f} GB of weights on the host", columns, lines)
    content = {
        "benchmark": "reload-host",
        "is_gpu_number": on_gpu and scale == "8b",
        "environment": _report.environment(jax.devices()[0].device_kind),
        "rounds": options.rounds,
        "rows": rows,
    }
    _report.write_json(options.out, "reload-host", content)
    return int(bool(wrong))


def measure_copy(size: int) -> float:
    """Bytes a second of a device-to-device copy, read and write counted."""
    source = jnp.ones(size // 4, jnp.float32)
    copy = jax.jit(jnp.copy)
    jax.block_until_ready(copy(source))
    readings = [wall_contestant(lambda: copy(source), calls=4)()() for _ in range(7)]
    return 2 * source.nbytes / statistics.median(readings)


def measure(
    sizes: dict[str, tuple[int, int]],
    layout: str,
    allow_nonfinite: bool,
    rounds: int,
    copy_bandwidth: float,
    *,
    trace: bool,
) -> dict[str, Any]:
    """Reload `rounds` times from a tree in `layout`, the first time apart: it compiles."""
    loaded = trainer_tree(sizes, layout)
    served = served_tree(sizes)
    options = {"allow_nonfinite": allow_nonfinite}
    ballast = _fill_to_peak()
    before, addresses = _memory(), _addresses(served)
    start = time.perf_counter()
    served = jax.block_until_ready(reload_params(served, loaded, **options))
    first = time.perf_counter() - start
    after, compiled = _memory(), len(_compilations)
    del ballast
    walls = []
    for _ in range(rounds):
        start = time.perf_counter()
        served = jax.block_until_ready(reload_params(served, loaded, **options))
        walls.append(time.perf_counter() - start)
    seconds = {"wall": statistics.median(walls)}
    if trace:

        def reload() -> Any:
            nonlocal served
            served = reload_params(served, loaded, **options)
            return served

        contestants = {"reload": reload}
        busy = _trace.measure_busy(contestants, TRACE_ROUNDS, calls=1, pause=1.0)["reload"]
        seconds["busy"] = statistics.median(b.seconds for b in busy)
    # Without the plugin XLA measures what it then casts.
    moved = bytes_moved(sizes, reads=1 if allow_nonfinite and problem() is None else 2)
    return {
        "layout": layout,
        "allow_nonfinite": allow_nonfinite,
        "leaves": len(jax.tree.leaves(served)),
        "milliseconds": {clock: 1e3 * s for clock, s in seconds.items()},
        "first_milliseconds": 1e3 * first,
        "bytes_moved": moved,
        "share_of_copy_bandwidth": {c: moved / s / copy_bandwidth for c, s in seconds.items()},
        **_extra_memory(before, after),
        "recompiles": len(_compilations) - compiled,
        "moved_buffers": sum(a != b for a, b in zip(addresses, _addresses(served), strict=True)),
        "wrong": wrong_weights(served, loaded, sizes),
    }


def bytes_moved(sizes: dict[str, tuple[int, int]], reads: int) -> int:
    """Each bfloat16 weight read so often, each e4m3 weight and float32 scale written once."""
    return sum(
        2 * reads * k * n + padded_size(k) * padded_size(n) + 4 * padded_size(n)
        for k, n in sizes.values()
    )


def trainer_tree(sizes: dict[str, tuple[int, int]], layout: str) -> dict[str, Any]:
    """Normal bfloat16 weights on the device."""
    tree = {}
    for index, name in enumerate(sizes):
        shape = sizes[name] if layout == "in_out" else sizes[name][::-1]
        value = _normal(jax.random.fold_in(jax.random.key(0), index), shape)
        tree[name] = {"kernel": value if layout == "in_out" else DenseWeight(value, "out_in")}
    return tree


@jax.jit(static_argnums=1)
def _normal(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def served_tree(sizes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """A padded per-channel tree of zeros, every leaf a buffer of its own."""

    def kernel(k: int, n: int) -> PaddedKernel:
        qvalue = jnp.zeros((padded_size(n), padded_size(k)), jnp.float8_e4m3fn)
        return PaddedKernel(qvalue, jnp.ones(padded_size(n), jnp.float32), k, n)

    return {name: {"kernel": kernel(k, n)} for name, (k, n) in sizes.items()}


def wrong_weights(served: Any, loaded: Any, sizes: dict[str, tuple[int, int]]) -> list[str]:
    """The weights whose bits differ from `from_dense`'s, one of each shape looked at."""

    @jax.jit
    def differs(kernel: PaddedKernel, weight: Any) -> jax.Array:
        w = weight.value.T if isinstance(weight, DenseWeight) else weight
        fresh = PaddedKernel.from_dense(w)
        return jnp.any(kernel.qvalue != fresh.qvalue) | jnp.any(kernel.scale != fresh.scale)

    one_of_each = {size: name for name, size in sizes.items()}.values()
    return [name for name in one_of_each if differs(served[name]["kernel"], loaded[name]["kernel"])]


def _addresses(tree: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def _memory() -> dict[str, int] | None:
    return jax.local_devices()[0].memory_stats()


def _fill_to_peak() -> jax.Array | None:
    """Memory up to the peak so far, which never goes down: so the next allocation raises it."""
    memory = _memory()
    if memory is None:
        return None
    return jnp.zeros(memory["peak_bytes_in_use"] - memory["bytes_in_use"], jnp.uint8)


def _extra_memory(before: dict[str, int] | None, after: dict[str, int] | None) -> dict[str, Any]:
    """Peak of the first reload above what was allocated before it; None where not counted."""
    if before is None or after is None:
        return {"extra_bytes_at_peak": None}
    return {"extra_bytes_at_peak": after["peak_bytes_in_use"] - before["bytes_in_use"]}


def _print(content: dict[str, Any]) -> None:
    columns = ["layout", "checked", "wall\nms", "busy\nms", "of copy bandwidth,\nwall", "busy"]
    columns += ["first\nms", "extra MB\nat peak", "recompiles", "buffers\nmoved", "wrong"]
    lines = []
    for row in content["rows"]:
        extra = row["extra_bytes_at_peak"]
        line: list[_report.Cell] = [row["layout"], "scales" if row["allow_nonfinite"] else "all"]
        line.append(f"{row['milliseconds']['wall']:.2f}")
        line.append(_optional(row["milliseconds"].get("busy"), "{:.2f}"))
        share = row["share_of_copy_bandwidth"]
        line += [_optional(share.get(clock), "{:.0%}") for clock in ("wall", "busy")]
        line.append(f"{row['first_milliseconds']:.0f}")
        line.append("-" if extra is None else f"{extra / 1e6:.0f}")
        line += [str(row["recompiles"]), str(row["moved_buffers"]), str(len(row["wrong"]))]
        lines.append(line)
    title = (
        f"Reload of {content['weights'] / 1e9:.2f}e9 weights, bfloat16 to FP8; the device copies "
        f"at {content['copy_bytes_per_second'] / 1e12:.2f} TB/s"
    )
    _report.print_table(title, columns, lines)


def _optional(value: float | None, text: str) -> str:
    return "-" if value is None else text.format(value)
