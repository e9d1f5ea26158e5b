"""The evidence of every row of the kernel table, again, and what would change; edits nothing.

Reads what `gemm --kernels all` and `gemm --between` wrote, and cuda/src/table.h. For each row: how
many of the shapes it decides, the best of the other kernels there, that one's time / the row's, and
the gain in geometric mean if the row took it. Then the shapes where another kernel is more than 2 %
faster. A shape in several files counts as the last one has it. Needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _report, _table
from benchmarks._timing import geometric_mean, mean_and_worst
from benchmarks.shapes import Gemm


# What another kernel has to win before it is worth a line.
WORTH = 1.02


@dataclasses.dataclass(frozen=True)
class Times:
    """What the table picks for a shape, and every other kernel's time / the pick's."""

    pick: str
    others: dict[str, float]

    def best(self) -> tuple[str, float]:
        """The fastest kernel and its time / the pick's, which may be the pick's own, 1."""
        name = min(self.others, key=self.others.__getitem__, default=self.pick)
        if self.others.get(name, 1.0) < 1.0:
            return name, self.others[name]
        return self.pick, 1.0


# By shape and accumulation.
Relative = dict[tuple[Gemm, str], Times]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, help="gemm.json, gemm-between.json, ...")
    parser.add_argument(
        "--table", type=Path, default=_table.TABLE, help="default: cuda/src/table.h"
    )


def run(options: argparse.Namespace) -> int:
    """Read, print and write; 1 if the files hold no shape at which the table's pick was timed."""
    contents = [json.loads(path.read_text()) for path in options.files]
    for key in ("source_hash", "gpu"):
        if len({content["environment"].get(key) for content in contents}) > 1:
            print(f"These files differ in their {key}: their times are of different programs.")
    table = _table.read(options.table)
    relative, missing = relative_times(table, contents)
    rows = [evidence(index, row, table, relative) for index, row in enumerate(table)]
    faster = faster_kernels(relative)
    summary = {
        kind: mean_and_worst(
            [(str(shape), times.best()[1]) for (shape, of), times in relative.items() if of == kind]
        )
        for kind in dict.fromkeys(kind for _, kind in relative)
    }
    content = {
        "benchmark": "tune",
        "is_gpu_number": all(content["is_gpu_number"] for content in contents),
        "measured": [content["environment"] for content in contents],
        "rows": rows,
        "faster": faster,
        "missing": missing,
        "best_over_chosen": summary,
    }
    _print(rows, faster, missing, summary)
    _report.write_json(options.out, "tune", content)
    return int(not relative)


def relative_times(
    table: Sequence[_table.Row], contents: Iterable[dict[str, Any]]
) -> tuple[Relative, list[str]]:
    """Times over that of the table's pick; and the shapes where that pick was not timed.

    What the benchmark calls "ours" is the pick if the table then had the same kernel and options;
    otherwise the pick counts as it was timed by name, which is with `_table.FORCED`.
    """
    found: Relative = {}
    missing: dict[tuple[Gemm, str], str] = {}
    measured = ((row, kind) for c in contents for row in c["shapes"] for kind in _table.KINDS)
    for row, kind in measured:
        prefix = f"kernel {kind}"
        times = {
            name.removeprefix("kernel "): ratio
            for name, ratio in row["ratios"].items()
            if name.startswith(prefix)
        }
        if not times:
            continue
        shape = Gemm(row["m"], row["n"], row["k"])
        pick = table[_table.select(table, shape, kind)]
        found.pop((shape, kind), None)
        missing.pop((shape, kind), None)
        by_name = times.pop(pick.kernel, None)
        if row.get("chosen", {}).get(kind) == {"kernel": pick.kernel, **pick.options}:
            own = 1.0
            if by_name is not None and pick.options != _table.FORCED:
                times[f"{pick.kernel} {_options(_table.FORCED)}"] = by_name
        elif by_name is not None:
            own = by_name
        else:
            missing[shape, kind] = f"{shape}: {pick.kernel} was not timed"
            continue
        found[shape, kind] = Times(pick.kernel, {name: r / own for name, r in times.items()})
    return found, list(missing.values())


def evidence(
    index: int, row: _table.Row, table: Sequence[_table.Row], relative: Relative
) -> dict[str, Any]:
    """What the times say of one row.

    "gain" is the geometric mean of the row's time / the runner-up's over its shapes: above 1, the
    runner-up is the better choice. "gain_overall" is what that makes over every shape of the same
    accumulation, the others as they are. The runner-up was timed at all shapes of the row.
    """
    decided = {
        shape: times.others
        for (shape, kind), times in relative.items()
        if kind == row.kind and _table.select(table, shape, kind) == index
    }
    found: dict[str, Any] = {
        "row": index,
        "accumulation": row.kind,
        "limits": str(row),
        "kernel": row.kernel,
        "options": row.options,
        "written": row.evidence,
        "shapes": [str(shape) for shape in decided],
    }
    everywhere = set.intersection(*map(set, decided.values())) if decided else set()
    others = {
        kernel: geometric_mean(times[kernel] for times in decided.values())
        for kernel in sorted(everywhere)
    }
    if others:
        best = min(others, key=others.__getitem__)
        ratios = [times[best] for times in decided.values()]
        of_kind = sum(kind == row.kind for _, kind in relative)
        found |= {
            "runner_up": best,
            "runner_up_over_row": [min(ratios), max(ratios)],
            "gain": 1 / others[best],
            "gain_overall": (1 / others[best]) ** (len(decided) / of_kind),
        }
    return found


def faster_kernels(relative: Relative) -> list[dict[str, Any]]:
    """The shapes where another kernel is faster by more than `WORTH`, the largest gain first."""
    found = []
    for (shape, kind), times in relative.items():
        faster, ratio = times.best()
        if ratio * WORTH < 1:
            entry = {"shape": str(shape), "accumulation": kind, "kernel": times.pick}
            found.append(entry | {"faster": faster, "gain": 1 / ratio})
    return sorted(found, key=lambda entry: -entry["gain"])


def _options(options: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _print(
    rows: list[dict[str, Any]],
    faster: list[dict[str, Any]],
    missing: list[str],
    summary: dict[str, dict[str, Any]],
) -> None:
    columns = ["row", "kernel", "shapes", "runner-up", "runner-up\n/ row"]
    columns += ["gain if\nchanged", "overall", "the table says"]
    lines = [_line(row) for row in rows]
    _report.print_table("The table's rows, by these times", columns, lines)
    columns = ["shape", "accumulation", "the table's kernel", "faster", "by"]
    lines = [
        [*(f[key] for key in ("shape", "accumulation", "kernel", "faster")), f"{f['gain']:.3f}"]
        for f in faster
    ]
    _report.print_table(f"Another kernel is more than {WORTH - 1:.0%} faster", columns, lines)
    for kind, s in summary.items():
        print(
            f"{kind}: best kernel's time / the table's: geometric mean {s['geometric_mean']:.3f} "
            f"over {s['shapes']} shapes, worst {s['worst']:.3f} at {s['worst_shape']}"
        )
    for line in missing:
        print(f"left out: {line}")
    print(f"A kernel that is not the row's own was timed with {_options(_table.FORCED)}.")


def _line(row: dict[str, Any]) -> list[_report.Cell]:
    """Kernels without the accumulation in their names, which the row's own says."""
    kind, kernel = row["accumulation"], row["kernel"]
    if row["options"] != _table.FORCED:
        kernel += f" {_options(row['options'])}"
    line: list[_report.Cell] = [f"{kind} {row['limits']}", kernel.removeprefix(f"{kind}_")]
    line.append(str(len(row["shapes"])))
    if "runner_up" not in row:
        return [*line, "-", "-", "-", "-", row["written"]]
    low, high = row["runner_up_over_row"]
    line.append(row["runner_up"].removeprefix(f"{kind}_"))
    line.append(f"{low:.2f}-{high:.2f}" if len(row["shapes"]) > 1 else f"{low:.2f}")
    style = "yellow" if row["gain"] > 1 else ""
    line += [(f"{row['gain']:.3f}", style), (f"{row['gain_overall']:.4f}", style)]
    return [*line, row["written"]]
