"""The constants of every row of the kernel table, fitted again; edits nothing.

Reads files that hold times of kernels by name, as `gemm --kernels ...` and `gemm --between` write
them, and cuda/src/table.h. For each row: the constants as they are, as these times would have them,
how far that fit is off, and as a search from there would have them, by what the choices cost. Then
what the choice is worth with each: the best kernel's time / the chosen one's, at the shapes of
FILES and at those of `--check`, which are not fitted to. Then the shapes where another kernel is
more than 2 % faster than the table's. Needs no GPU, but scipy.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _report, _search, _table
from benchmarks._cost import WEIGHT_POWER, Cost, Times
from benchmarks._timing import mean_and_worst
from benchmarks.shapes import Gemm


# What another kernel has to win before it is worth a line.
WORTH = 1.02
# A row with fewer shapes than this keeps its constants.
LEAST_SHAPES = 6
# Deviations are minimized in logarithms, those above 5 % less than quadratically.
SOFT = 0.05
START = (0.2, 1.0, 2.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, help="gemm.json, kernel-times.json, ...")
    parser.add_argument("--check", nargs="+", type=Path, default=[], help="not fitted to")
    parser.add_argument(
        "--only",
        choices=_table.KINDS,
        help="rows of one accumulation; the memory's constants, which all share, are kept",
    )
    parser.add_argument(
        "--table", type=Path, default=_table.TABLE, help="default: cuda/src/table.h"
    )


def run(options: argparse.Namespace) -> int:
    """Read, fit, print and write; 1 if the files hold no times of the table's kernels."""
    contents = [json.loads(path.read_text()) for path in options.files]
    checks = [json.loads(path.read_text()) for path in options.check]
    for key in ("source_hash", "gpu"):
        if len({content["environment"].get(key) for content in contents + checks}) > 1:
            print(f"These files differ in their {key}: their times are of different programs.")
    table = _table.read(options.table)
    if options.only:
        table = table.with_rows([row for row in table.rows if row.kind == options.only])
    times, held_out = times_of(table, contents), times_of(table, checks)
    if not times:
        print("These files hold no times of the table's kernels: `gemm --kernels all` writes them.")
        return 1
    rows = [fit(row, table.memory, times) for row in table.rows]
    fitted = table.with_rows([_table.Row(row["kernel"], *row["fitted"]) for row in rows])
    searched = _search.refine(fitted, Cost(times).loss, memory=not options.only)
    for row, found in zip(rows, searched.rows, strict=True):
        row["searched"] = (found.k_tile, found.tile, found.launch)
    choices = {
        f"{where}, {name}": quality(which, at)
        for where, at in (("fitted shapes", times), ("other shapes", held_out))
        for name, which in (("table", table), ("fitted", fitted), ("searched", searched))
        if at
    }
    faster = faster_kernels(table, {**times, **held_out})
    content = {
        "benchmark": "tune",
        "is_gpu_number": all(content["is_gpu_number"] for content in contents),
        "measured": [content["environment"] for content in contents + checks],
        "rows": rows,
        "memory": {
            "written": dataclasses.asdict(table.memory),
            "searched": dataclasses.asdict(searched.memory),
        },
        "choices": choices,
        "faster": faster,
    }
    _print(rows, choices, faster)
    rate, cache_rate = (1e-6 * r for r in (searched.memory.rate, searched.memory.cache_rate))
    print(
        f"Searched with a memory of {rate:.2f} TB/s that starts after {searched.memory.start:.2f} "
        f"us, and {cache_rate:.0f} TB/s of the cache."
    )
    _report.write_json(options.out, "tune", content)
    return 0


def times_of(table: _table.Table, contents: Sequence[dict[str, Any]]) -> Times:
    """The table's kernels' times; where several files have one at a shape, the last one's."""
    kernels = {row.kernel for row in table.rows}
    found: dict[Gemm, dict[str, float]] = {}
    for row in (row for content in contents for row in content["shapes"]):
        named = {
            name.removeprefix("kernel "): time
            for name, time in row["microseconds"].items()
            if name.removeprefix("kernel ") in kernels
        }
        if named:
            found.setdefault(Gemm(row["m"], row["n"], row["k"]), {}).update(named)
    return found


def fit(row: _table.Row, memory: _table.Memory, times: Times) -> dict[str, Any]:
    """The constants that explain a kernel's times, and the deviation that is left."""
    from scipy.optimize import least_squares  # type: ignore[import-untyped]

    shapes = [shape for shape in times if row.kernel in times[shape]]
    written = (row.k_tile, row.tile, row.launch)
    found: dict[str, Any] = {"kernel": row.kernel, "shapes": len(shapes), "written": written}
    if len(shapes) < LEAST_SHAPES:
        return found | {"fitted": written, "deviation": None}
    work = [_table.Work.of(row.kernel, memory, shape) for shape in shapes]
    taken = np.array([times[shape][row.kernel] for shape in shapes])
    weights = np.array([_best(times[shape], row.kind)[1] for shape in shapes]) / taken

    def deviations(logarithms: np.ndarray) -> np.ndarray:
        constants = np.exp(logarithms)
        expected = np.array([one.time(*constants) for one in work])
        return weights**WEIGHT_POWER * np.log(expected / taken)

    result = least_squares(deviations, np.log(START), loss="soft_l1", f_scale=SOFT)
    deviation = float(np.sqrt(np.mean(np.square(result.fun))))
    constants = [round(float(constant), 3) for constant in np.exp(result.x)]
    return found | {"fitted": constants, "deviation": deviation}


def quality(table: _table.Table, times: Times) -> dict[str, dict[str, Any]]:
    """The best kernel's time / the chosen one's, by accumulation."""
    found: dict[str, list[tuple[str, float]]] = {}
    compared = _compared(table, times)
    for shape, kind, chosen, _, ratio in compared:
        if chosen is not None:
            found.setdefault(kind, []).append((str(shape), ratio))
    untimed = collections.Counter(kind for _, kind, pick, _, _ in compared if pick is None)
    return {kind: mean_and_worst(r) | {"untimed": untimed[kind]} for kind, r in found.items()}


def faster_kernels(table: _table.Table, times: Times) -> list[dict[str, Any]]:
    """The shapes where another kernel is faster by more than `WORTH`, the largest gain first."""
    found = [
        {
            "shape": str(shape),
            "accumulation": kind,
            "kernel": chosen,
            "faster": best,
            "gain": 1 / ratio,
        }
        for shape, kind, chosen, best, ratio in _compared(table, times)
        if chosen is not None and ratio * WORTH < 1
    ]
    return sorted(found, key=lambda entry: -entry["gain"])


def _compared(table: _table.Table, times: Times) -> list[tuple[Gemm, str, str | None, str, float]]:
    """Shape, accumulation, chosen kernel (None if it was not timed), best, best / chosen."""
    found: list[tuple[Gemm, str, str | None, str, float]] = []
    for shape, named in times.items():
        for kind in _table.KINDS:
            if not any(name.startswith(kind) for name in named):
                continue
            chosen = table.chosen(shape, kind)
            best, least = _best(named, kind)
            timed = chosen in named
            ratio = least / named[chosen] if timed else 1.0
            found.append((shape, kind, chosen if timed else None, best, ratio))
    return found


def _best(named: Mapping[str, float], kind: str) -> tuple[str, float]:
    name = min((name for name in named if name.startswith(kind)), key=named.__getitem__)
    return name, named[name]


def _print(
    rows: list[dict[str, Any]],
    choices: dict[str, dict[str, dict[str, Any]]],
    faster: list[dict[str, Any]],
) -> None:
    columns = [
        "kernel",
        "shapes",
        "k_tile, tile, launch\nin the table",
        "fitted",
        "off by",
        "searched",
    ]
    lines: list[list[_report.Cell]] = []
    for row in rows:
        off = "-" if row["deviation"] is None else f"{row['deviation']:.1%}"
        written, fitted, searched = (
            ", ".join(f"{constant:.3f}" for constant in row[key])
            for key in ("written", "fitted", "searched")
        )
        lines.append([row["kernel"], str(row["shapes"]), written, fitted, off, searched])
    _report.print_table("The table's rows, in microseconds", columns, lines)
    columns = ["choice", "accumulation", "shapes", "best / chosen", "worst", "at", "not timed"]
    lines = [
        [
            name,
            kind,
            str(s["shapes"]),
            f"{s['geometric_mean']:.4f}",
            f"{s['worst']:.3f}",
            s["worst_shape"],
            str(s["untimed"]),
        ]
        for name, kinds in choices.items()
        for kind, s in kinds.items()
    ]
    _report.print_table("What the choice is worth", columns, lines)
    columns = ["shape", "accumulation", "the table's kernel", "faster", "by"]
    lines = [
        [*(f[key] for key in ("shape", "accumulation", "kernel", "faster")), f"{f['gain']:.3f}"]
        for f in faster
    ]
    _report.print_table(f"Another kernel is more than {WORTH - 1:.0%} faster", columns, lines)
