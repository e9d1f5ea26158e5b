"""Write README's tables of figures from the files in benchmarks/results.

    python tools/readme_tables.py           # rewrites README.md, says which tables changed
    python tools/readme_tables.py --check   # changes nothing; fails if a table is not the files'

A table is found by its whole head. Sentences between the tables are written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
# Of sixty; the rest are in gemm.json and gemm.png.
GEMM_SHAPES = (
    *((1, 4096, 4096), (16, 4096, 14336), (64, 8192, 8192), (128, 28672, 4096)),
    *((256, 4096, 14336), (512, 3424, 1280), (1024, 1280, 3424), (1024, 8192, 8192)),
    *((4096, 4096, 4096), (8192, 8192, 8192), (8192, 28672, 4096)),
)
HOST_RATES = (
    *("host_copy", "device_put_one_by_one", "device_put_by_layer"),
    *("reload_params", "put", "put_tree"),
)
LAYOUTS = {"in_out": "`[K, N]`", "out_in": "`[N, K]`"}


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def gemm() -> Iterator[list[str]]:
    data = result("gemm")
    rows = {(row["m"], row["n"], row["k"]): row for row in data["shapes"]}
    for shape in GEMM_SHAPES:
        row = rows[shape]
        yield [
            " × ".join(map(str, shape)),
            f"{row['microseconds']['ours']:.1f}",
            f"{row['tflops']:.0f}",
            f"{row['gigabytes_per_second']:.0f}",
            f"{row['bound_share']:.0%}".replace("%", " %"),
            *(f"{row['ratios'][peer]:.2f}" for peer in ("cublaslt", "rowwise", "bf16")),
        ]
    for title, suffix, bold in (
        (f"**{data['summary']['cublaslt']['shapes']} shapes, geometric mean (worst)**", "", "**"),
        ("the same without dependent launch", ", alone", ""),
    ):
        means = [data["summary"][peer + suffix] for peer in ("cublaslt", "rowwise", "bf16")]
        cells = [f"{bold}{s['geometric_mean']:.3f} ({s['worst']:.3f}){bold}" for s in means]
        yield [title, "", "", "", "", *cells]


def layer() -> Iterator[list[str]]:
    for row in result("layer")["rows"]:
        busy, kernels, ratios = row["microseconds"]["busy"], row["kernels"], row["ratios"]
        yield [
            f"{row['features']}→{row['hidden']}→{row['features']}",
            str(row["m"]),
            f"{busy['fp8']:.1f}",
            f"{busy['bf16']:.1f}",
            f"{ratios['busy']['bf16']:.2f}",
            f"{ratios['wall']['bf16']:.2f}",
            f"{kernels['fp8']:.0f} / {kernels['bf16']:.1f}",
        ]


def stack() -> Iterator[list[str]]:
    for row in result("stack")["rows"]:
        times, widths = row["microseconds"], row["widths"]
        widths = "→".join(map(str, [*widths, widths[0]]))
        ours, bf16, scanned = (
            [f"{times[kind][clock]:.1f}" for clock in ("busy", "wall", "dropped")]
            for kind in ("fp8", "bf16", "scanned")
        )
        alone, alone_scanned = (
            f"{times[kind]['wall']:.1f}" for kind in ("arguments", "arguments of nn.scan")
        )
        yield [f"{widths}, {row['m']}", *ours, *bf16, alone]
        yield ["the same, `nn.scan`", *scanned, "", "", "", alone_scanned]


def reload() -> Iterator[list[str]]:
    framework = {"in_out": "Flax ", "out_in": "torch "}
    for row in result("reload")["rows"]:
        layout = LAYOUTS[row["layout"]]
        extra = row["extra_bytes_at_peak"] / 1e6
        yield [
            f"{layout}, `allow_nonfinite=True`"
            if row["allow_nonfinite"]
            else framework[row["layout"]] + layout,
            f"{row['milliseconds']['wall']:.1f}",
            f"{row['milliseconds']['busy']:.1f}",
            f"{row['share_of_copy_bandwidth']['busy']:.0%}".replace("%", " %"),
            f"{extra:.0f} MB" if extra >= 0.5 else "0",
            str(row["recompiles"]),
            str(row["moved_buffers"]),
        ]


def reload_host() -> Iterator[list[str]]:
    def rates(name):
        return {(r["memory"], r["layout"]): r["gigabytes_a_second"] for r in result(name)["rows"]}

    fast, slow = rates("reload-host"), rates("reload-host-slow")
    for memory, title in (("pinned_host", "pinned memory"), ("numpy", "numpy")):
        for layout, name in LAYOUTS.items():
            rows = fast[memory, layout], slow[memory, layout]
            yield [
                title,
                name,
                *(" / ".join(f"{row[of]:.0f}" for row in rows) for of in HOST_RATES),
            ]


# By the head.
TABLES = {
    (
        "| M × N × K | µs | TFLOP/s | GB/s | of the bound | × cuBLASLt per-tensor, fast "
        "| × torch row-wise | × bf16 |"
    ): gemm,
    (
        "| block | M | ours, busy | bf16 `nn.Dense`, busy | bf16 / ours | wall, bf16 / ours "
        "| kernels, ours / bf16 |"
    ): layer,
    "| stack, M | ours, busy | held | dropped | bf16, busy | held | dropped | arguments |": stack,
    (
        "| weights given as | wall ms | device-busy ms | of copy bandwidth, busy "
        "| extra memory at peak | recompiles | buffers moved |"
    ): reload,
    (
        "| weights in | given as | the host's own copy, 16 threads "
        "| `device_put`, one by one | `device_put`, by layer "
        "| `reload_params`, which sends them twice | `stream.put` "
        "| `stream.put_tree`, by layer |"
    ): reload_host,
}


def rewritten(text: str) -> tuple[str, list[str]]:
    """README with its tables made again, and the first cells of those that changed.

    Raises:
        ValueError: if a table's head is not there.
    """
    lines, changed = text.split("\n"), []
    for head, rows in TABLES.items():
        start = lines.index(head)
        end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
        # An empty cell is one space wide.
        new = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows()]
        if new != lines[start + 2 : end]:
            changed.append(head.split("|")[1].strip())
        lines[start + 2 : end] = new
    return "\n".join(lines), changed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    text, changed = rewritten(path.read_text())
    if not check:
        path.write_text(text)
    for head in changed:
        print(f"{'differs from' if check else 'written from'} benchmarks/results: the table {head}")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
