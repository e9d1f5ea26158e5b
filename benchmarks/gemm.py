"""Our GEMM kernels beside cuBLASLt, torch's row-wise kernel and bfloat16, shape by shape.

Device time: CUDA graphs of launches on weights rotated past the L2 cache, normal random data,
contestants in turn forwards and backwards in one process, the median of pairwise ratios. Every
result is compared with float32 first; one that is wrong is not timed, and the exit code is 1.

`--between` times no peers, but the kernel that the table picks beside all of the same accumulation
(but those that `_between.is_worth_timing` calls hopeless), at shapes that the table was not made
from: promoted ones from M = 512 on, and every other M of each weight in turn, to take minutes and
not tens of them. `--all` leaves out neither.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import _between, _report, _table, shapes
from benchmarks._plot import heat_map
from benchmarks._timing import (
    Contestant,
    interleave,
    mean_and_worst,
    pairwise_ratio,
    wall_contestant,
    warm_up,
)
from benchmarks.shapes import Gemm, Peak


PEERS = {"cublaslt": "x\ncuBLASLt", "rowwise": "x\nrow-wise", "bf16": "x\nbf16"}
# What the peer's time / ours is to reach, as a geometric mean over the whole grid.
TARGETS = {
    "cublaslt": "1.10, worst 0.95",
    "cublaslt, alone": "1.02",
    "rowwise": "1.5",
    "bf16": "1.85",
    "cublaslt_exact": "1.0",
}
WARM_UP_SECONDS = 0.03


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", help="MxNxK,MxNxK,... instead of the grid")
    parser.add_argument("--quick", action="store_true", help="twelve shapes of the sixty")
    parser.add_argument(
        "--kernels",
        choices=("table", "all", *_table.KINDS),
        default="table",
        help="all: time every compiled kernel for each shape too, to choose the table's rows; "
        "fast, promoted: those of one accumulation that are not hopeless, and no peers; the "
        "table shows the best of fast ones, the JSON has all",
    )
    parser.add_argument("--between", action="store_true", help="the table at shapes off the grid")
    parser.add_argument("--all", action="store_true", help="with --between: every shape")
    parser.add_argument("--quantize", action="store_true", help="the quantize kernel too (GPU)")


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; 1 if a result was wrong."""
    on_gpu = _report.gpu_name() is not None and _torch_sees_gpu()
    if on_gpu:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the memory is torch's
        peak = shapes.peak_of(_report.gpu_name() or "")
        prepare = _gpu_preparation(peak, options)
        if not peak.known:
            print("This GPU's peak is not in benchmarks/shapes.py: the bound is that of an H200.")
    else:
        peak, prepare = None, _prepare_on_cpu
        print(_report.NO_GPU)
    todo = _shapes(options, on_gpu)
    every_kernel = options.between or options.kernels != "table"
    table = _table.read()
    rows = []
    for shape in _report.Progress(len(todo)).steps(todo):
        rows.append(measure(shape, peak, prepare(shape), options.rounds))
        if every_kernel:
            rows[-1]["chosen"] = _between.chosen(table, shape)
        if options.between:
            rows[-1]["between"] = _between.compare(rows[-1])
        for name, fault in rows[-1]["faults"].items():
            _report.Progress.say(f"    {name}: {fault}")
    summary = _between.summarise(rows) if options.between else summarise(rows)
    quantize = _quantize_rows(options.rounds) if on_gpu and options.quantize else []
    name = "gemm-between" if options.between else "gemm"
    content = {
        "benchmark": name,
        "is_gpu_number": on_gpu,
        "environment": _report.environment(),
        "peak": peak and dataclasses.asdict(peak),
        "rounds": options.rounds,
        "summary": summary,
        "shapes": rows,
        "quantize": quantize,
    }
    (_between.show if options.between else _print)(rows, summary)
    path = _report.write_json(options.out, name, content)
    if on_gpu:
        place = content["environment"]
        title, picture = f"{place['gpu']}, {place['date'][:10]}", path.with_suffix(".png")
        if options.between:
            heat_map(rows, title, picture, _between.PANELS, _between.panel_value, _between.SPAN)
        else:
            heat_map(rows, title, picture)
    faults = [name for row in rows for name in row["faults"]]
    wrong = any(name.startswith(("ours", "kernel")) for name in faults)
    return int(wrong or any(row["wrong_codes"] for row in quantize))


def measure(shape: Gemm, peak: Peak | None, prepared: Any, rounds: int) -> dict[str, Any]:
    """The row of one shape: microseconds of each contestant, and the peers' ratios."""
    warm_up(prepared.contestants, WARM_UP_SECONDS)
    seconds = interleave(prepared.contestants, rounds)
    row: dict[str, Any] = {
        **dataclasses.asdict(shape),
        "launches": prepared.launches,
        "copies": prepared.copies,
        "microseconds": {name: 1e6 * statistics.median(t) for name, t in seconds.items()},
        "ratios": ratios(seconds),
        "faults": prepared.faults,
    }
    if "ours" in seconds:
        ours = statistics.median(seconds["ours"])
        row["tflops"] = shape.operations / ours * 1e-12
        row["gigabytes_per_second"] = shape.bytes / ours * 1e-9
        row["bound_share"] = shape.bound(peak) / ours if peak else None
    for kind in ("fast", "promoted"):
        names = [name for name in seconds if name.startswith(f"kernel {kind}")]
        if names:
            row[f"best_{kind}_kernel"] = min(names, key=row["microseconds"].__getitem__)
    return row


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Every contestant's time / ours of the same accumulation, where both were timed."""
    found = {}
    for name, taken in seconds.items():
        exact = name == "cublaslt_exact" or name.startswith("kernel promoted")
        ours = "ours_promoted" if exact else "ours"
        if name != ours and ours in seconds:
            found[name] = pairwise_ratio(taken, seconds[ours])
        if name in PEERS and "ours_alone" in seconds:
            found[f"{name}, alone"] = pairwise_ratio(taken, seconds["ours_alone"])
    return found


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Geometric mean and worst ratio of each peer over the shapes where it was timed."""
    summary = {}
    for peer in (*PEERS, *(f"{peer}, alone" for peer in PEERS), "cublaslt_exact"):
        ratios = [
            (str(Gemm(row["m"], row["n"], row["k"])), row["ratios"][peer])
            for row in rows
            if peer in row["ratios"]
        ]
        if ratios:
            summary[peer] = mean_and_worst(ratios)
    return summary


def _print(rows: Sequence[dict[str, Any]], summary: dict[str, dict[str, Any]]) -> None:
    columns = ["M", "N", "K", "us\nours", "TFLOP/s", "GB/s", "% of\nbound", *PEERS.values()]
    columns += ["us ours\npromoted", "x cuBLASLt\nexact"]
    best = any("best_fast_kernel" in row for row in rows)
    columns += ["best kernel", "best /\ntable"] if best else []
    lines = []
    for row in rows:
        line: list[_report.Cell] = [str(row[key]) for key in "mnk"]
        if "ours" in row["microseconds"]:
            line += [
                f"{row['microseconds']['ours']:.2f}",
                f"{row['tflops']:.0f}",
                f"{row['gigabytes_per_second']:.0f}",
                "-" if row["bound_share"] is None else f"{100 * row['bound_share']:.0f}",
            ]
        else:
            line += [("WRONG", "red"), "-", "-", "-"]
        line += [_report.ratio_cell(row["ratios"].get(peer)) for peer in PEERS]
        exact = row["microseconds"].get("ours_promoted")
        line.append("-" if exact is None else f"{exact:.2f}")
        line.append(_report.ratio_cell(row["ratios"].get("cublaslt_exact")))
        if best:
            name = row.get("best_fast_kernel")
            line.append("-" if name is None else name.removeprefix("kernel "))
            line.append(_report.ratio_cell(row["ratios"].get(name)))
        lines.append(line)
    _report.print_table("GEMM, ours beside its peers (peer's time / ours)", columns, lines)
    print('"alone": without dependent launch, which the layer uses for small M.')
    for peer, s in summary.items():
        target = f"; target {TARGETS[peer]}" if peer in TARGETS else ""
        print(
            f"{peer}: geometric mean {s['geometric_mean']:.3f} over {s['shapes']} shapes, "
            f"worst {s['worst']:.3f} at {s['worst_shape']}{target}"
        )


def _shapes(options: argparse.Namespace, on_gpu: bool) -> list[Gemm]:
    if options.shapes:
        return [Gemm.parse(text) for text in options.shapes.split(",")]
    if options.between:
        return _between.todo(everything=options.all, on_gpu=on_gpu)
    ms, weights = shapes.GEMM_ROWS, shapes.GEMM_WEIGHTS
    if options.quick:
        ms, weights = shapes.QUICK_GEMM_ROWS, shapes.QUICK_GEMM_WEIGHTS
    if not on_gpu:
        ms, weights = shapes.CPU_GEMM_ROWS, shapes.CPU_GEMM_WEIGHTS
    return [Gemm(m, n, k) for n, k in weights for m in ms]


def _torch_sees_gpu() -> bool:
    try:
        import torch
    except ModuleNotFoundError:
        raise SystemExit(
            "The peers are torch's: install torch for CUDA 13 beside jaxfp8 (`pip install torch`)."
        ) from None
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def _gpu_preparation(peak: Peak, options: argparse.Namespace) -> Callable[[Gemm], Any]:
    from benchmarks._gemm_torch import Bench, Selection

    selection = Selection()
    if options.between:
        start = 1 if options.all else shapes.PROMOTED_FROM_ROWS
        selection = Selection(False, _between.is_worth_timing, start)
    elif options.kernels == "all":
        selection = Selection(kernels=lambda kernel, m: True, promoted_from=1)
    elif options.kernels != "table":

        def is_wanted(kernel: str, m: int) -> bool:
            return kernel.startswith(options.kernels) and _between.is_worth_timing(kernel, m)

        start = 1 if options.kernels == "promoted" else shapes.PROMOTED_FROM_ROWS
        selection = Selection(peers=False, kernels=is_wanted, promoted_from=start)
    return Bench(peak, selection).prepare


def _quantize_rows(rounds: int) -> list[dict[str, Any]]:
    from benchmarks import _quantize_torch

    _report.Progress.say("the quantize kernel")
    rows = _quantize_torch.measure(rounds, WARM_UP_SECONDS / 3)
    keys = ("m", "k", "microseconds", "gigabytes_per_second", "copy_over_ours", "wrong_codes")
    columns = ["M", "K", "us", "GB/s", "copy\n/ ours", "wrong\ncodes"]
    cells = [[f"{row[key]:.2f}".removesuffix(".00") for key in keys] for row in rows]
    _report.print_table("Quantizing x, bfloat16 to e4m3, a scale for each row", columns, cells)
    return rows


@dataclasses.dataclass
class _PreparedOnCpu:
    contestants: dict[str, Contestant]
    faults: dict[str, str]
    launches: int = 1
    copies: int = 1


def _prepare_on_cpu(shape: Gemm) -> _PreparedOnCpu:
    """`scaled_matmul` in plain JAX beside a bfloat16 product: the same program, smaller."""
    import jax

    from jaxfp8 import quantize, scaled_matmul

    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=(s, shape.k)), jnp.float32) for s in (shape.m, shape.n))
    (qx, x_scale), (qw, w_scale) = quantize(x, axis=-1), quantize(w, axis=-1, keepdims=False)
    ours = jax.jit(lambda: scaled_matmul(qx, qw, x_scale, w_scale))
    peer = jax.jit(lambda: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16).T)
    expected = (np.float32(qx) * x_scale) @ (np.float32(qw) * w_scale[:, None]).T
    error = np.linalg.norm(np.float32(ours()) - expected) / np.linalg.norm(expected)
    if not error < 5e-3:
        return _PreparedOnCpu({}, {"ours": f"relative error {error:.2e}"})
    calls = {"ours": ours, "bf16": peer}
    jax.block_until_ready([call() for call in calls.values()])
    contestants = {name: wall_contestant(call, calls=3) for name, call in calls.items()}
    return _PreparedOnCpu(contestants, {})
