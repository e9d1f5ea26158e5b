"""Inputs quantized once: for several layers that read the same x, and by the layer before.

"shared": q, k, v or gate, up of one x, with `quantize_input` beside a quantize kernel in each.
"chain": dense with gelu, then dense, where the first gives e4m3 by a static scale (`out_scale`)
beside one that gives bfloat16. Microseconds of one such group; the weights of all groups together
lie past the L2 cache. Results are compared: shared ones bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _clocks, _device, _report, shapes
from jaxfp8 import PaddedKernel, fp8_dense, quantize_input


# A second rounding to 3 mantissa bits of what the next layer takes, by a scale for all rows: 0.04
# beside the rounding that both have.
CHAIN_ERROR_LIMIT = 0.1


@dataclasses.dataclass(frozen=True)
class Case:
    """A group of layers.

    Attributes:
        name: what it is.
        k: features of x.
        widths: output features of each layer.
        chained: each layer reads the one before, else all read x.
    """

    name: str
    k: int
    widths: tuple[int, ...]
    chained: bool

    def sizes(self) -> list[tuple[int, int]]:
        """In and out features of each layer."""
        ins = (self.k, *self.widths[:-1]) if self.chained else (self.k,) * len(self.widths)
        return list(zip(ins, self.widths, strict=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=shapes.parse_sizes, help="M,M,... instead of 16,...,4096")
    parser.add_argument("--no-trace", action="store_true", help="wall time alone")


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; 1 if a result was wrong."""
    on_gpu = _device.is_measured()
    shared = shapes.SHARED_INPUTS if on_gpu else shapes.CPU_SHARED_INPUTS
    chains = shapes.CHAINS if on_gpu else shapes.CPU_CHAINS
    cases = [Case(name, k, widths, False) for name, (k, widths) in shared.items()]
    cases += [Case(f"{k}-{n}-{k}", k, (n, k), True) for k, n in chains]
    ms = options.rows or (shapes.INPUT_ROWS if on_gpu else shapes.CPU_INPUT_ROWS)
    todo = [(case, m) for case in cases for m in ms]
    rows = [
        measure(case, m, options.rounds, on_gpu=on_gpu, trace=on_gpu and not options.no_trace)
        for case, m in _report.Progress(len(todo)).steps(todo, lambda t: f"{t[0].name}, M={t[1]}")
    ]
    content = {
        "benchmark": "inputs",
        "is_gpu_number": on_gpu,
        "environment": _report.environment(jax.devices()[0].device_kind),
        "rounds": {"wall": options.rounds, "busy": _clocks.TRACE_ROUNDS},
        "rows": rows,
    }
    _print(rows)
    _report.write_json(options.out, "inputs", content)
    limits = [(row["error"], CHAIN_ERROR_LIMIT if row["chained"] else 0.0) for row in rows]
    return int(not all(error <= limit for error, limit in limits))  # false for NaN


def measure(case: Case, m: int, rounds: int, *, on_gpu: bool, trace: bool) -> dict[str, Any]:
    """The row of one group and M."""
    copies = shapes.copies_past_cache(sum(k * n for k, n in case.sizes())) if on_gpu else 2
    keys = iter(jax.random.split(jax.random.key(0), copies * len(case.sizes())))
    make = jax.jit(lambda key, k, n: _kernel(key, k, n), static_argnums=(1, 2))
    groups = [[make(next(keys), k, n) for k, n in case.sizes()] for _ in range(copies)]
    x = jax.random.normal(jax.random.key(1), (m, case.k), jnp.bfloat16)
    scale = jnp.float32(0.0)
    if case.chained:
        hidden = jax.jit(lambda: fp8_dense(x, groups[0][0], activation="gelu"))()
        scale = jnp.max(jnp.abs(hidden)).astype(jnp.float32) / 448
    calls = {}
    for name, function in _contestants(case).items():
        compiled = jax.jit(function).lower(x, groups, scale).compile()
        calls[name] = _bound(compiled, x, groups, scale)

    results = {name: [np.asarray(y, np.float32) for y in call()] for name, call in calls.items()}
    clocked = _clocks.measure(calls, dict.fromkeys(calls, copies), rounds, trace=trace)
    return {
        "case": case.name,
        "chained": case.chained,
        "m": m,
        "copies": copies,
        "error": max(
            _clocks.relative_error(once, each)
            for once, each in zip(results["once"], results["each"], strict=True)
        ),
        "microseconds": {name: clocked.microseconds(name) for name in calls},
        "each_over_once": clocked.ratio("each", "once"),
        "kernels": {name: clocked.kernels(name) for name in calls},
    }


def _bound(compiled: Any, *arguments: Any) -> Callable[[], Any]:
    return lambda: compiled(*arguments)


def _kernel(key: jax.Array, k: int, n: int) -> PaddedKernel:
    return PaddedKernel.from_dense(jax.random.normal(key, (k, n)) * k**-0.5)


def _contestants(case: Case) -> dict[str, Callable[..., list[jax.Array]]]:
    """Of every group the last layer's result, or all results of layers that share x."""
    dtype = jnp.bfloat16

    # Each group's x is the same numbers in an array of its own, or XLA quantizes once for all.
    def own(x: Any, groups: Any) -> Any:
        return [jax.lax.optimization_barrier(x) for _ in groups]

    def chain(x: Any, groups: Any, scale: Any, *, once: bool) -> list[jax.Array]:
        results = []
        for x_own, (up, down) in zip(own(x, groups), groups, strict=True):
            options: dict[str, Any] = {"out_scale": scale} if once else {}
            hidden = fp8_dense(x_own, up, activation="gelu", **options)
            results.append(fp8_dense(hidden, down, out_dtype=dtype))
        return results

    def share(x: Any, groups: Any, scale: Any, *, once: bool) -> list[jax.Array]:
        results = []
        for x_own, kernels in zip(own(x, groups), groups, strict=True):
            given: Any = quantize_input(x_own) if once else x_own
            results += [fp8_dense(given, kernel, out_dtype=dtype) for kernel in kernels]
        return results

    both: Any = chain if case.chained else share
    return {
        "each": lambda *arguments: both(*arguments, once=False),
        "once": lambda *arguments: both(*arguments, once=True),
    }


def _print(rows: list[dict[str, Any]]) -> None:
    columns = ["layers", "M", "quantized", "busy, in\neach", "once", "ratio"]
    columns += ["wall, in\neach", "once", "ratio", "kernels,\nin each", "once", "difference"]
    lines = []
    for row in rows:
        times, ratios = row["microseconds"], row["each_over_once"]
        line: list[_report.Cell] = [row["case"], str(row["m"])]
        line.append("by the layer before" if row["chained"] else "once for all")
        for clock in ("busy", "wall"):
            line += [_report.number(times[name].get(clock), 1) for name in ("each", "once")]
            line.append(_report.ratio_cell(ratios.get(clock)))
        line += [_report.number(row["kernels"][name], 1) for name in ("each", "once")]
        line.append(f"{row['error']:.3f}")
        lines.append(line)
    _report.print_table("Inputs quantized once, microseconds a group of layers", columns, lines)
