"""The heat maps of the GEMM grid, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any


PANELS = {
    "cublaslt": "cuBLASLt per-tensor fast / ours",
    "rowwise": "torch row-wise / ours",
    "bf16": "bf16 torch.mm / ours",
    "share": "share of the bound",
}


def heat_map(rows: list[dict[str, Any]], title: str, path: Path) -> Path | None:
    """A panel for each peer and one for the bound; None, and a line, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm, Normalize
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("No plot: matplotlib is not installed (`pip install matplotlib`).")
        return None
    ms = sorted({row["m"] for row in rows})
    weights = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    figure = Figure(figsize=(15, 1.6 + 1.1 * len(weights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    for axes, (key, label) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        grid = [[_value(rows, m, n, k, key) for m in ms] for n, k in weights]
        norm = Normalize(0, 1) if key == "share" else LogNorm(0.5, 2)
        axes.imshow(grid, cmap="YlGn" if key == "share" else "RdYlGn", norm=norm, aspect="auto")
        axes.set_title(label, fontsize=10)
        axes.set_xticks(range(len(ms)), [str(m) for m in ms])
        axes.set_yticks(range(len(weights)), [f"{n} x {k}" for n, k in weights])
        axes.set_xlabel("M")
        axes.set_ylabel("N x K")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if value == value:
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"Written: {path}")
    return path


def _value(rows: list[dict[str, Any]], m: int, n: int, k: int, key: str) -> float:
    for row in rows:
        if (row["m"], row["n"], row["k"]) == (m, n, k):
            value = row.get("bound_share") if key == "share" else row["ratios"].get(key)
            return float("nan") if value is None else value
    return float("nan")
