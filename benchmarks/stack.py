"""A stack of sixteen dense layers under `jit`: the host's clock against the device-busy time.

Wall is the host's clock over many calls, one after another, blocked on at the end; busy the time
during which a kernel ran, from a profile. Above 1 in "/ busy" the device waits for the host. A
result is "held" until the next one is there (`y = f(x)` in a loop), or "dropped" before the next
call (`y = None; y = f(x)`, or x donated to a result of its shape), which then has its memory.
Kernels are counted a layer. "In graphs" is the share of them that CUDA graphs launched, which XLA
calls command buffers; XLA writes a graph again ("graphs updated", a call) when a buffer in it has
moved. Beside it, in turn, the same stack of nn.Dense in bfloat16, and "nn.scan", the FP8 stack as
an unrolled `nn.scan` over pairs of layers, which has a few stacked arrays in place of 48.
"Arguments" is a program that takes the FP8 stack's arrays and adds 1 to x: what JAX itself needs to
call a program of so many arguments.

`--graphs` runs all of that under several XLA_FLAGS, each in a process of its own: as XLA chooses,
without command buffers, and with them from one command on.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _clocks, _dense_stack, _device, _graphs, _hlo, _mlp, _report, shapes


KINDS = ("fp8", "bf16", "scanned")
WALLS = {"wall": "held", "dropped": "dropped"}
# Of sixteen products, each with both operands rounded to 3 mantissa bits: 0.04 each, and they add
# as independent ones. A layer in another's place gives 1.4, a scale twice too large 1.
ERROR_LIMIT = 0.3
# Either wall / busy of the FP8 stack at this many rows.
TARGET = {16: 1.10}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled stack: how to run it, and its program's text."""

    call: Callable[[], jax.Array]
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=shapes.parse_sizes, help="M,M,... instead of 1,16,64,256")
    parser.add_argument("--no-trace", action="store_true", help="wall time alone")
    parser.add_argument("--graphs", action="store_true", help="under several XLA_FLAGS")


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; 1 if a result was wrong or a child failed."""
    if options.graphs:
        return run_settings(options)
    on_gpu = _device.is_measured()
    ms = options.rows or (shapes.STACK_ROWS if on_gpu else shapes.CPU_STACK_ROWS)
    stacks = shapes.STACKS if on_gpu else shapes.CPU_STACKS
    layers = shapes.STACK_LAYERS if on_gpu else shapes.CPU_STACK_LAYERS
    cases = [(_dense_stack.widths(sizes, layers), m) for sizes in stacks for m in ms]
    rows: list[dict[str, Any]] = []
    params: dict[str, Any] = {}
    made_for = None
    for widths, m in _report.Progress(len(cases)).steps(cases, _label):
        if made_for != widths:
            params, made_for = {}, widths  # free the old ones first
            dense = _dense_stack.dense_params(widths)
            fp8 = _mlp.fp8_layers(dense)
            params = {"bf16": dense, "fp8": fp8, "scanned": _dense_stack.stacked(fp8)}
        stack = {kind: _compile(kind, widths, m, params[kind]) for kind in KINDS}
        trace = on_gpu and not options.no_trace
        floor = {
            "arguments": _arguments_alone(widths, m, params["fp8"]),
            "arguments of nn.scan": _arguments_alone(widths, m, params["scanned"]),
        }
        rows.append(measure(stack, floor, widths, m, options.rounds, trace=trace))
    content = {
        "benchmark": "stack",
        "is_gpu_number": on_gpu,
        "environment": _report.environment(jax.devices()[0].device_kind),
        "rounds": {"wall": options.rounds, "busy": _clocks.TRACE_ROUNDS},
        "rows": rows,
    }
    _print({"": rows})
    _report.write_json(options.out, "stack", content)
    errors = [error for row in rows for error in row["errors"].values()]
    return int(not all(error < ERROR_LIMIT for error in errors))  # false for NaN


def run_settings(options: argparse.Namespace) -> int:
    """One child for each of `_graphs.SETTINGS`; this process leaves the GPU alone."""
    arguments = ["--rounds", str(options.rounds)]
    arguments += ["--rows", ",".join(map(str, options.rows))] if options.rows else []
    arguments += ["--no-trace"] if options.no_trace else []
    found: dict[str, dict[str, Any] | None] = {}
    for setting in _report.Progress(len(_graphs.SETTINGS)).steps(_graphs.SETTINGS):
        found[setting] = _graphs.in_child("stack", _graphs.SETTINGS[setting], arguments)
    written = {setting: child for setting, child in found.items() if child is not None}
    on_gpu = bool(written) and all(child["is_gpu_number"] for child in written.values())
    if not on_gpu:
        print(_report.NO_GPU)
    content = {
        "benchmark": "stack-graphs",
        "is_gpu_number": on_gpu,
        "environment": _report.environment(),
        "settings": {
            setting: {"flags": _graphs.SETTINGS[setting], "rows": child and child["rows"]}
            for setting, child in found.items()
        },
    }
    _print({setting: child["rows"] for setting, child in written.items()})
    _report.write_json(options.out, "stack-graphs", content)
    return int(any(child is None or child["exit_code"] for child in found.values()))


def measure(
    stack: dict[str, Compiled],
    floor: dict[str, Callable[[], jax.Array]],
    widths: tuple[int, ...],
    m: int,
    rounds: int,
    *,
    trace: bool,
) -> dict[str, Any]:
    """The row of one stack and M: microseconds a layer, ratios, kernels and graphs by kind."""
    outputs = {kind: np.asarray(c.call()).astype(np.float32) for kind, c in stack.items()}
    layers = len(widths) - 1
    calls = {kind: c.call for kind, c in stack.items()}
    clocked = _clocks.measure(
        calls, dict.fromkeys(stack, layers), rounds, trace=trace, graphs=trace, dropped=True
    )
    bare = _clocks.measure(floor, dict.fromkeys(floor, layers), rounds, trace=False)
    microseconds = {kind: clocked.microseconds(kind) for kind in stack}
    microseconds |= {name: bare.microseconds(name) for name in floor}
    sizes = list(zip(widths[:-1], widths[1:], strict=True))
    graphs: dict[str, dict[str, Any]] = {}
    for kind, compiled in stack.items():
        graphs[kind] = {
            "share": clocked.in_graphs(kind),
            "marks": clocked.marks(kind),
            "in_program": _hlo.command_buffers(compiled.text),
        }
    return {
        "widths": sorted(set(widths)),
        "layers": layers,
        "m": m,
        "errors": {
            kind: _clocks.relative_error(outputs[kind], outputs["bf16"])
            for kind in stack
            if kind != "bf16"
        },
        "microseconds": microseconds,
        "over_busy": {
            clock: {
                kind: microseconds[kind][clock] / microseconds[kind]["busy"] if trace else None
                for kind in stack
            }
            for clock in WALLS
        },
        "bf16_over": {kind: clocked.ratio("bf16", kind) for kind in stack if kind != "bf16"},
        "kernels": {kind: clocked.kernels(kind) for kind in stack},
        "graphs": graphs,
        "hlo": {kind: _hlo.read(c.text, sizes) for kind, c in stack.items()},
    }


def _label(case: tuple[tuple[int, ...], int]) -> str:
    widths, m = case
    return f"M={m}, {_name(sorted(set(widths)))}"


def _name(sizes: Sequence[int], kind: str = "fp8") -> str:
    return "-".join(map(str, [*sizes, sizes[0]])) + (", nn.scan" if kind == "scanned" else "")


def _compile(kind: str, widths: tuple[int, ...], m: int, params: dict[str, Any]) -> Compiled:
    x = jax.random.normal(jax.random.key(1), (m, widths[0]), jnp.bfloat16)
    variables = {"params": params}
    model: Any = _dense_stack.DenseStack(widths, kind)
    if kind == "scanned":
        model = _dense_stack.ScannedDenseStack(widths)
    apply = jax.jit(model.apply)
    compiled = apply.lower(variables, x).compile()
    return Compiled(lambda: compiled(variables, x), compiled.as_text() or "")


def _arguments_alone(
    widths: tuple[int, ...], m: int, params: dict[str, Any]
) -> Callable[[], jax.Array]:
    x = jnp.zeros((m, widths[0]), jnp.bfloat16)
    compiled = jax.jit(lambda params, x: x + 1, keep_unused=True).lower(params, x).compile()
    return lambda: compiled(params, x)


def _print(settings: dict[str, list[dict[str, Any]]]) -> None:
    """One line for each setting, stack and M, and one for it under `nn.scan`.

    The settings of one stack and M lie beside each other.
    """
    columns = ["XLA_FLAGS"] if len(settings) > 1 else []
    columns += ["stack", "M", "arguments\nwall"]
    for name in ("ours", "bf16"):
        columns.append(f"{name}\nbusy")
        for clock in WALLS.values():
            columns += [f"{name}\n{clock}", "/ busy"]
    columns += ["bf16 / ours\nbusy", *WALLS.values()]
    columns += ["kernels\nours", "kernels\nbf16", "in graphs\nours", "in graphs\nbf16"]
    columns += ["graphs\nupdated", "error"]
    lines = []
    for rows in zip(*settings.values(), strict=True):
        for setting, row in zip(settings, rows, strict=True):
            for kind in row["bf16_over"]:
                lines.append([*([setting] if len(settings) > 1 else []), *_line(row, kind)])
    _report.print_table("Dense layers, microseconds a layer", columns, lines)
    for setting, rows in settings.items():
        for row in rows:
            for kind in row["bf16_over"]:
                ratios = {WALLS[clock]: over[kind] for clock, over in row["over_busy"].items()}
                if None not in ratios.values() and row["m"] in TARGET:
                    said = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
                    print(
                        f"{setting or 'wall / busy'}, {_name(row['widths'], kind)}, M={row['m']}: "
                        f"{said}, target {TARGET[row['m']]:.2f}"
                    )


def _line(row: dict[str, Any], ours: str) -> list[_report.Cell]:
    line: list[_report.Cell] = [_name(row["widths"], ours), str(row["m"])]
    arguments = "arguments of nn.scan" if ours == "scanned" else "arguments"
    line.append(_report.number(row["microseconds"][arguments]["wall"], 2))
    for kind in (ours, "bf16"):
        times = row["microseconds"][kind]
        line.append(_report.number(times.get("busy"), 2))
        for clock in WALLS:
            ratio = row["over_busy"][clock][kind]
            within = ratio is not None and ratio <= max(TARGET.values())
            line.append(_report.number(times[clock], 2))
            line.append((_report.number(ratio, 2), "green" if within else ""))
    line += [_report.ratio_cell(row["bf16_over"][ours].get(clock)) for clock in ("busy", *WALLS)]
    line += [_report.number(row["kernels"][kind], 1) for kind in (ours, "bf16")]
    for kind in (ours, "bf16"):
        graphs = row["graphs"][kind]
        line.append(_graphs.captured(graphs["share"], graphs["marks"], graphs["in_program"]))
    marks = row["graphs"][ours]["marks"]
    line.append(_report.number(marks and marks["updated"], 1))
    line.append(f"{row['errors'][ours]:.3f}")
    return line
