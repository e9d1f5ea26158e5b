"""The kernel that the table picks beside all others, at shapes that no row was chosen by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import _report, _table, shapes
from benchmarks._timing import mean_and_worst
from benchmarks.shapes import Gemm


# time(best) / time(chosen), of one accumulation: geometric mean, and worst.
TARGETS = (0.97, 0.90)
PANELS = {kind: f"{kind}: best kernel's time / the table's" for kind in _table.KINDS}
SPAN = (0.85, 1.0)  # red to green
# A kernel named outright is the table's own where the row has the same options. Further off than
# this, the plugin was built from another table.
TWIN_TOLERANCE = 0.05


def todo(*, everything: bool, on_gpu: bool) -> list[Gemm]:
    """All shapes, or every other M of each weight, in turn: each M and each weight is there."""
    if not on_gpu:
        return [Gemm(m, n, k) for n, k in shapes.CPU_GEMM_WEIGHTS for m in shapes.CPU_GEMM_ROWS]
    return [
        Gemm(m, n, k)
        for i, (n, k) in enumerate(shapes.BETWEEN_WEIGHTS)
        for j, m in enumerate(shapes.BETWEEN_ROWS)
        if everything or (i + j) % 2 == 0
    ]


def is_worth_timing(kernel: str, m: int) -> bool:
    """False for a tile of under 64 rows that x fills more than 8 times, or of 128 up, a quarter.

    In the tile sweeps of one H200 (2026-11-22, 22 to 50 configurations a shape) the best of the
    138 pairs that this leaves out took 1.48 times the fastest kernel's time.
    """
    rows = _table.tile_rows(kernel)
    return rows is None or not (rows < 64 and m > 8 * rows or rows >= 128 and 4 * m <= rows)


def chosen(table: _table.Table, shape: Gemm) -> dict[str, str]:
    """What the table picks, by accumulation."""
    return {kind: table.chosen(shape, kind) for kind in _table.KINDS}


def compare(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The best kernel's time / the chosen one's, by accumulation; 1 where it is the chosen one.

    Args:
        row: one shape of the GEMM benchmark, with "chosen" and the kernels' ratios in it.
    """
    found = {}
    for kind, pick in row["chosen"].items():
        ratios = {
            name.removeprefix("kernel "): ratio
            for name, ratio in row["ratios"].items()
            if name.startswith(f"kernel {kind}")
        }
        if not ratios:
            continue
        # The same kernel once more tells of nothing but noise.
        twin = ratios.pop(pick, None)
        best = min(ratios, key=ratios.__getitem__, default=pick)
        if ratios.get(best, 1.0) >= 1.0:
            best = pick
        found[kind] = {
            "best": best,
            "best_over_chosen": min(1.0, *ratios.values()) if ratios else 1.0,
            "twin": twin,
        }
    return found


def summarise(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Geometric mean and worst of best / chosen, by accumulation."""
    found: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        for kind, compared in row.get("between", {}).items():
            shape = str(Gemm(row["m"], row["n"], row["k"]))
            found.setdefault(kind, []).append((shape, compared["best_over_chosen"]))
    return {kind: mean_and_worst(ratios) for kind, ratios in found.items()}


def panel_value(row: dict[str, Any], kind: str) -> float | None:
    """What the heat map shows for one shape."""
    return row.get("between", {}).get(kind, {}).get("best_over_chosen")


def show(rows: Sequence[dict[str, Any]], summary: dict[str, dict[str, Any]]) -> None:
    """The table, the summary against its targets, and a word if the plugin has another table."""
    columns = ["M", "N", "K", "accumulation", "us", "table's kernel", "best kernel"]
    columns += ["best /\ntable's", "noise"]
    lines = []
    for row in rows:
        for kind, found in row.get("between", {}).items():
            ours = row["microseconds"]["ours" if kind == "fast" else "ours_promoted"]
            line: list[_report.Cell] = [str(row[key]) for key in "mnk"]
            line += [kind, f"{ours:.2f}", row["chosen"][kind], found["best"]]
            ratio = found["best_over_chosen"]
            style = "green" if ratio >= TARGETS[0] else "red" if ratio < TARGETS[1] else ""
            line.append((f"{ratio:.3f}", style))
            line.append(_report.number(found["twin"], 3))
            lines.append(line)
    if not lines:
        print("There are no compiled kernels here to choose between.")
        return
    _report.print_table("The table's kernel beside all of the same accumulation", columns, lines)
    print('"noise": the same kernel, named outright, against the table\'s.')
    for kind, s in summary.items():
        print(
            f"{kind}: geometric mean {s['geometric_mean']:.3f} over {s['shapes']} shapes, worst "
            f"{s['worst']:.3f} at {s['worst_shape']}; targets {TARGETS[0]}, {TARGETS[1]}"
        )
    twins = [f["twin"] for row in rows for f in row.get("between", {}).values() if f["twin"]]
    if any(abs(twin - 1) > TWIN_TOLERANCE for twin in twins):
        print(
            "A kernel differs from itself by more than 5 %: was the plugin built from this "
            "checkout's cuda/src/table.h?"
        )
