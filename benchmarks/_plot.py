"""The pictures: heat maps over shapes, and curves; where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


# The panels of the GEMM grid.
PANELS = {
    "cublaslt": "cuBLASLt per-tensor fast / ours",
    "rowwise": "torch row-wise / ours",
    "bf16": "bf16 torch.mm / ours",
    "share": "share of the bound",
}
Point = tuple[float, float]


def grid_value(row: dict[str, Any], panel: str) -> float | None:
    """What a panel of the GEMM grid shows for one shape."""
    return row.get("bound_share") if panel == "share" else row["ratios"].get(panel)


def heat_map(
    rows: list[dict[str, Any]],
    title: str,
    path: Path,
    panels: dict[str, str] = PANELS,
    value: Callable[[dict[str, Any], str], float | None] = grid_value,
    span: tuple[float, float] = (0.5, 2.0),
) -> Path | None:
    """A panel of M by N x K for each of `panels`, red to green over `span`, but shares.

    None, and a line, without matplotlib.
    """
    ms = sorted({row["m"] for row in rows})
    weights = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    by_shape = {(row["m"], row["n"], row["k"]): row for row in rows}
    across = 2 if len(panels) > 2 else 1
    figure = _figure(title, (7.5 * across, 1.6 + 0.55 * len(weights) * len(panels) / across))
    if figure is None:
        return None
    from matplotlib.colors import LogNorm, Normalize

    axes_of = figure.subplots(-(-len(panels) // across), across, squeeze=False).flat
    for axes, (key, label) in zip(axes_of, panels.items(), strict=True):
        grid = [[_at(by_shape, (m, n, k), key, value) for m in ms] for n, k in weights]
        norm = Normalize(0, 1) if key == "share" else LogNorm(*span)
        axes.imshow(grid, cmap="YlGn" if key == "share" else "RdYlGn", norm=norm, aspect="auto")
        axes.set_title(label, fontsize=10)
        axes.set_xticks(range(len(ms)), [str(m) for m in ms])
        axes.set_yticks(range(len(weights)), [f"{n} x {k}" for n, k in weights])
        axes.set_xlabel("M")
        axes.set_ylabel("N x K")
        for y, line in enumerate(grid):
            for x, number in enumerate(line):
                if number == number:
                    axes.text(x, y, f"{number:.2f}", ha="center", va="center", fontsize=8)
    return _save(figure, path)


def curves(
    panels: dict[str, dict[str, list[Point]]],
    across: int,
    x_label: str,
    y_label: str,
    title: str,
    path: Path,
) -> Path | None:
    """A panel for each title, with named lines on logarithmic axes; None without matplotlib."""
    down = -(-len(panels) // across)
    figure = _figure(title, (5 * across, 3.6 * down))
    if figure is None:
        return None
    axes_of = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat
    for axes, (label, lines) in zip(axes_of, panels.items(), strict=True):
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(label, fontsize=10)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
    axes_of[0].legend(fontsize=7)
    return _save(figure, path)


def _figure(title: str, size: tuple[float, float]) -> Any:
    """A figure that needs no display; None, and a line, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("No plot: matplotlib is not installed (`pip install matplotlib`).")
        return None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    return figure


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"Written: {path}")
    return path


def _at(by_shape: dict[Any, Any], shape: tuple[int, int, int], key: str, value: Any) -> float:
    found = value(by_shape[shape], key) if shape in by_shape else None
    return float("nan") if found is None else found
