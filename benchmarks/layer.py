"""An MLP block (dense, gelu, dense, residual) in FP8 beside nn.Dense in bfloat16 under XLA.

A stack of blocks of distinct weights, past the L2 cache together, is compiled as a user would; the
numbers are microseconds a block. Busy: the time during which a kernel ran, from a profile. Wall:
the host's clock over many calls. Contestants run in turn, and ratios are medians of pairs. The
compiled programs are read too: custom calls, and any copy or transpose of an FP8 weight.
"static": the same block, whose first layer gives e4m3 by a calibrated scale, so that the second has
no quantize kernel; measured at the M of shapes.STATIC_ROWS.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _clocks, _device, _hlo, _mlp, _report, shapes


# Both operands rounded to 3 mantissa bits: about 0.04 for each product. Of more blocks than these
# the roundings add up like what is independent, by the root of their number: 4 give 0.06, 21 give
# 0.14. Two of 21 exchanged give 0.38 at least, scales twice too large more (384-1024, on a CPU).
ERROR_LIMIT, ERROR_LAYERS = 0.1, 4
# bf16 / ours, busy, of the block 4096 -> 14336 -> 4096 at this many rows.
TARGETS = {(4096, 14336, m): ratio for m, ratio in {16: 1.65, 1024: 1.75, 4096: 1.8}.items()}

# Fp8DirectDotGeneralOp, and post-training quantization by interception: XLA multiplies for both.
PEERS = ("flax", "qwix")

Block = tuple[int, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=shapes.parse_sizes, help="M,M,... instead of 1,16,32,...,8192"
    )
    parser.add_argument(
        "--blocks", type=_blocks, help="one group of blocks instead of all: 1280-3420,1280-3424"
    )
    parser.add_argument("--quick", action="store_true", help="M = 16 and 1024 alone")
    parser.add_argument("--peers", action="store_true", help="Flax's own FP8 product and Qwix too")
    parser.add_argument("--no-trace", action="store_true", help="wall time alone")


def _blocks(text: str) -> tuple[Block, ...]:
    """`FEATURES-HIDDEN,...`; argparse turns a ValueError into its message."""
    pairs = [tuple(map(int, block.split("-"))) for block in text.split(",")]
    return tuple((features, hidden) for features, hidden in pairs)


@dataclasses.dataclass
class Contestant:
    """A compiled stack: what it is called, how to run it, and its program."""

    kind: str
    block: Block
    layers: int
    call: Callable[[], jax.Array]
    hlo: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kind} {self.block[0]}-{self.block[1]}"


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; 1 if a result was wrong."""
    on_gpu = _device.is_measured()
    groups = shapes.LAYER_GROUPS if on_gpu else shapes.CPU_LAYER_GROUPS
    if options.blocks:
        groups = (options.blocks,)
    ms = shapes.LAYER_ROWS if on_gpu else shapes.CPU_LAYER_ROWS
    if options.quick:
        ms = shapes.QUICK_LAYER_ROWS
    ms = options.rows or ms
    cases = [(group, m) for group in groups for m in ms]
    progress = _report.Progress(len(cases))
    rows: list[dict[str, Any]] = []
    weights: dict[Block, dict[str, Any]] = {}
    for group, m in progress.steps(cases, _label):
        if set(weights) != set(group):
            weights = {}  # free the old ones first
            weights = {block: _weights(block, on_gpu) for block in group}
        kinds = ["fp8", "bf16"]
        kinds += ["scanned"] if m in shapes.SCANNED_ROWS or not on_gpu else []
        kinds += ["static"] if m in shapes.STATIC_ROWS or not on_gpu else []
        kinds += _peers() if options.peers else []
        contestants = [_compile(kind, b, m, weights[b]) for b in group for kind in kinds]
        rows += measure(contestants, m, options.rounds, trace=on_gpu and not options.no_trace)
        # After each case, so that a run that is cut off leaves what it has.
        content = {
            "benchmark": "layer",
            "is_gpu_number": on_gpu,
            "environment": _report.environment(jax.devices()[0].device_kind),
            "rounds": {"wall": options.rounds, "busy": _clocks.TRACE_ROUNDS},
            "complete": (group, m) == cases[-1],
            "rows": rows,
        }
        written = _report.write_json(options.out, "layer", content, quiet=True)
    _print(rows)
    print(f"Written: {written}")
    right = [
        error < ERROR_LIMIT * max(1, row["layers"] / ERROR_LAYERS) ** 0.5  # false for NaN
        for row in rows
        for kind, error in row["errors"].items()
        if kind not in PEERS
    ]
    return int(not all(right))


def measure(
    contestants: Sequence[Contestant], m: int, rounds: int, *, trace: bool
) -> list[dict[str, Any]]:
    """A row for each block: its contestants' times, and their ratios to FP8's."""
    outputs = {c.name: np.asarray(c.call()).astype(np.float32) for c in contestants}
    calls = {c.name: c.call for c in contestants}
    clocked = _clocks.measure(calls, {c.name: c.layers for c in contestants}, rounds, trace=trace)
    rows = []
    for block in dict.fromkeys(c.block for c in contestants):
        own = {c.kind: c for c in contestants if c.block == block}
        row: dict[str, Any] = {"features": block[0], "hidden": block[1], "m": m}
        row["layers"] = own["fp8"].layers
        row["errors"] = {
            kind: _clocks.relative_error(outputs[c.name], outputs[own["bf16"].name])
            for kind, c in own.items()
            if kind != "bf16"
        }
        row["microseconds"], row["ratios"], row["to_the_last_of_the_group"] = {}, {}, {}
        for clock, times in clocked.seconds.items():
            if times:
                row["microseconds"][clock] = {
                    kind: clocked.microseconds(c.name)[clock] for kind, c in own.items()
                }
                row["ratios"][clock] = {
                    kind: clocked.ratio(c.name, own["fp8"].name)[clock]
                    for kind, c in own.items()
                    if kind != "fp8"
                }
                # 3420 beside 3424: what the padding costs.
                row["to_the_last_of_the_group"][clock] = {
                    c.kind: clocked.ratio(own[c.kind].name, c.name)[clock]
                    for c in contestants
                    if c.block == contestants[-1].block and c.block != block
                }
        row["kernels"] = {kind: clocked.kernels(c.name) for kind, c in own.items()}
        row["largest_kernels"] = {kind: clocked.largest(c.name) for kind, c in own.items()}
        row["hlo"] = {kind: c.hlo for kind, c in own.items()}
        rows.append(row)
    return rows


def _peers() -> list[str]:
    if importlib.util.find_spec("qwix") is not None:
        return list(PEERS)
    _report.Progress.say("qwix is not installed, so it is left out: pip install qwix")
    return ["flax"]


def _label(case: tuple[tuple[Block, ...], int]) -> str:
    group, m = case
    return f"M={m}, " + " and ".join(f"{f}-{h}-{f}" for f, h in group)


def _weights(block: Block, on_gpu: bool) -> dict[str, Any]:
    layers = _mlp.layers_past_cache(*block) if on_gpu else 3
    dense = _mlp.dense_params(*block, layers)
    fp8 = _mlp.fp8_params(dense)
    own = {"fp8": fp8, "scanned": _mlp.stacked(fp8), "static": _mlp.static_params(fp8, *block)}
    return {"bf16": dense, "flax": dense, "qwix": dense, **own}


def _compile(kind: str, block: Block, m: int, weights: dict[str, Any]) -> Contestant:
    layers = len(weights["bf16"])
    x = jax.random.normal(jax.random.key(1), (m, block[0]), jnp.bfloat16)
    if kind == "scanned":
        stack: Any = _mlp.ScannedStack(*block, "fp8", layers)
    else:
        stack = _mlp.Stack(*block, "bf16" if kind == "qwix" else kind, layers)
    variables = {"params": weights[kind]}
    if kind == "flax":
        variables = _mlp.flax_variables(stack, weights[kind], x)
    if kind == "qwix":
        stack, params = _mlp.qwix_stack(weights[kind], stack, x)
        variables = {"params": params}
    compiled = jax.jit(stack.apply).lower(variables, x).compile()
    hlo = _hlo.read(compiled.as_text() or "", [block])
    return Contestant(kind, block, layers, lambda: compiled(variables, x), hlo)


def _print(rows: Sequence[dict[str, Any]]) -> None:
    clock = "busy" if all("busy" in row["microseconds"] for row in rows) else "wall"
    kinds = [k for k in ("bf16", "scanned", "static", *PEERS) if any(k in r["hlo"] for r in rows)]
    peers = [k for k in PEERS if k in kinds]
    columns = ["block", "M", "ours", "bf16", *(f"{kind}\n/ ours" for kind in kinds), "error"]
    columns += ["kernels\nours", "kernels\nbf16", "wall\nours", "wall\nbf16"]
    columns += [f"wall, {kind}\n/ ours" for kind in ("bf16", *peers)]
    columns += ["unaligned /\naligned", "the same,\nbf16"]
    lines = []
    for row in rows:
        times, wall = row["microseconds"][clock], row["microseconds"]["wall"]
        to_aligned = row["to_the_last_of_the_group"][clock]
        line: list[_report.Cell] = [f"{row['features']}-{row['hidden']}", str(row["m"])]
        line += [f"{times['fp8']:.1f}", f"{times['bf16']:.1f}"]
        line += [_report.ratio_cell(row["ratios"][clock].get(kind)) for kind in kinds]
        line.append(f"{row['errors']['fp8']:.3f}")
        line += [_report.number(row["kernels"][kind], 1) for kind in ("fp8", "bf16")]
        line += [f"{wall['fp8']:.1f}", f"{wall['bf16']:.1f}"]
        line += [_report.ratio_cell(row["ratios"]["wall"].get(kind)) for kind in ("bf16", *peers)]
        line += [_report.number(to_aligned.get(kind), 3) for kind in ("fp8", "bf16")]
        lines.append(line)
    meaning = "device-busy unless it says wall" if clock == "busy" else "wall"
    title = f"MLP block, microseconds a block ({meaning})"
    _report.print_table(title, columns, lines)
    for row in rows:
        target = TARGETS.get((row["features"], row["hidden"], row["m"]))
        if target is not None:
            ratio = row["ratios"][clock]["bf16"]
            line = f"{row['features']}-{row['hidden']}, M={row['m']}: {ratio:.2f}, target {target}"
            static = row["ratios"][clock].get("static")
            print(line + (f"; static {ratio / static:.2f}" if static else ""))
    for (features, hidden), kind, hlo in _programs(rows):
        print(
            f"{kind} {features}-{hidden}: custom calls {hlo['custom_calls'] or 'none'}; operations "
            f"on FP8 weights: {hlo['operations_on_fp8_weights'] or 'none'}"
        )


def _programs(rows: Sequence[dict[str, Any]]) -> list[tuple[Block, str, dict[str, Any]]]:
    """Each distinct block and kind, at the largest M where it was compiled."""
    last = {
        ((row["features"], row["hidden"]), kind): row["hlo"][kind]
        for row in rows
        for kind in row["hlo"]
        if kind in ("fp8", "scanned", "static")
    }
    return [(block, kind, hlo) for (block, kind), hlo in last.items()]
