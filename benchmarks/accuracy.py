"""The error of an FP8 product over K, beside bfloat16 and torch: what quantizing and sums cost.

Errors are relative, in norm, of results rounded to bfloat16 (which alone is 1.7e-3):
- "error" against the product of the inputs as they were, in float64: what a user sees.
- "sums" against the float64 product of the quantized operands: what accumulation adds to it.
- "worst row": the largest error of one row, each against its own norm.

Inputs: "independent", normal x and W; "coherent", x is rows of W, so that the diagonal's terms all
have one sign, where accumulation in the tensor core loses most; "outliers", normal, but in every
eighth row one channel of 512 is 100000 (as Sun and others saw, "Massive Activations in Large
Language Models", 2024), which one scale for all rows has to cover.
"Scaled" is per-token x per-channel, "tensor" one scale for each operand.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _clocks, _device, _report, shapes
from benchmarks._plot import curves
from jaxfp8 import quantize, scaled_matmul


# Promoted sums, bfloat16's rounding included; a product of other operands gives far more.
PROMOTED_SUMS_LIMIT = 5e-3
OUTLIER_ROWS, OUTLIER_CHANNELS, OUTLIER = 8, 512, 1e5
PRECISIONS = {"fast": "default", "promoted": "highest"}
MEASURES = ("error", "sums", "worst_row")


@dataclasses.dataclass(frozen=True)
class Quantized:
    """x and W in e4m3 with float32 scales, and their exact product.

    Attributes:
        x, w: `[M, K]` and `[N, K]`.
        x_scale, w_scale: `[M, 1]` and `[N]`, or both `[]`.
        product: float64 `[M, N]`, of the dequantized operands.
    """

    x: jax.Array
    w: jax.Array
    x_scale: jax.Array
    w_scale: jax.Array
    product: np.ndarray

    @staticmethod
    def make(x: np.ndarray, w: np.ndarray, *, per_tensor: bool) -> Quantized:
        axis = None if per_tensor else -1
        (qx, x_scale), (qw, w_scale) = (quantize(jnp.asarray(a), axis=axis) for a in (x, w))
        wide_x, wide_w = _wide(qx) * _wide(x_scale), _wide(qw) * _wide(w_scale)
        w_scale = w_scale if per_tensor else w_scale.squeeze(-1)
        return Quantized(qx, qw, x_scale, w_scale, wide_x @ wide_w.T)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--k", type=shapes.parse_sizes, help="K,K,... instead of 1024,...,16384")


def run(options: argparse.Namespace) -> int:
    """Compute, print, plot and write; 1 if a result is not finite or promoted sums are off."""
    on_gpu = _device.is_measured()
    ks = options.k or (shapes.ACCURACY_KS if on_gpu else shapes.CPU_ACCURACY_KS)
    side = shapes.ACCURACY_SIDE if on_gpu else shapes.CPU_ACCURACY_SIDE
    peer = _peer() if on_gpu else None
    cases = [(kind, k) for kind in INPUTS for k in ks]
    rows = []
    for kind, k in _report.Progress(len(cases)).steps(
        cases, lambda case: f"{case[0]}, K={case[1]}"
    ):
        rows.append(measure(kind, side, k, peer))
        for name, fault in rows[-1]["faults"].items():
            _report.Progress.say(f"    {name}: {fault}")
    content: dict[str, Any] = {
        "benchmark": "accuracy",
        "is_gpu_number": on_gpu,
        "environment": _report.environment(jax.devices()[0].device_kind),
        "rows": rows,
    }
    _print(rows)
    path = _report.write_json(options.out, "accuracy", content)
    place = content["environment"]
    _plot(rows, f"{place['device']}, {place['date'][:10]}", path.with_suffix(".png"))
    return int(not all(is_right(row) for row in rows))


def is_right(row: dict[str, Any]) -> bool:
    """Every error of ours is finite, and promoted sums are as good as they have to be."""
    if any(name.startswith("ours") for name in row["faults"]):
        return False
    ours = {name: errors for name, errors in row["errors"].items() if name.startswith("ours")}
    finite = all(np.isfinite(list(errors.values())).all() for errors in ours.values())
    promoted = [errors["sums"] for name, errors in ours.items() if "promoted" in name]
    return bool(finite and max(promoted) < PROMOTED_SUMS_LIMIT)


def measure(kind: str, side: int, k: int, peer: Any = None) -> dict[str, Any]:
    """The errors of every contestant for `side` rows and output features; see the module."""
    x, w = INPUTS[kind](np.random.default_rng(k), side, k)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    found: dict[str, dict[str, float]] = {}
    faults: dict[str, str] = {}
    for name, product, quantized in _products(x, w, peer):
        try:
            result = np.asarray(product()).astype(np.float64)
        except (RuntimeError, ValueError) as fault:  # a scaling that the peer does not have
            faults[name] = str(fault).splitlines()[0]
            continue
        found[name] = errors(result, exact, quantized)
    return {"inputs": kind, "m": side, "n": side, "k": k, "errors": found, "faults": faults}


def errors(result: np.ndarray, exact: np.ndarray, quantized: np.ndarray) -> dict[str, float]:
    """The three errors that the module explains, of float64 `[M, N]`."""
    of_rows = np.linalg.norm(result - exact, axis=1) / np.linalg.norm(exact, axis=1)
    return {
        "error": _clocks.relative_error(result, exact),
        "sums": _clocks.relative_error(result, quantized),
        "worst_row": float(of_rows.max()),
    }


def independent(rng: np.random.Generator, side: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    x, w = (rng.standard_normal((side, k), np.float32) for _ in range(2))
    return x, w


def coherent(rng: np.random.Generator, side: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    w = rng.standard_normal((side, k), np.float32)
    return w, w


def outliers(rng: np.random.Generator, side: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    x, w = independent(rng, side, k)
    large = x[::OUTLIER_ROWS, ::OUTLIER_CHANNELS]
    large[:] = np.copysign(OUTLIER, large)
    return x, w


INPUTS: dict[str, Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray]]] = {
    "independent": independent,
    "coherent": coherent,
    "outliers": outliers,
}


def _label(case: tuple[str, int]) -> str:
    return f"{case[0]}, K={case[1]}"


def _products(
    x: np.ndarray, w: np.ndarray, peer: Any
) -> Iterator[tuple[str, Callable[[], Any], np.ndarray]]:
    """Each contestant's name, its product, and the exact product of its operands as quantized."""
    for scaling in ("scaled", "tensor"):
        q = Quantized.make(x, w, per_tensor=scaling == "tensor")
        for name, precision in PRECISIONS.items():
            ours = _bind(scaled_matmul, q, precision=precision)
            yield f"ours {name}, {scaling}", ours, q.product
            if peer is not None:
                product = _bind(peer, q, fast=name == "fast")
                yield f"torch {name}, {scaling}", product, q.product
    narrow_x, narrow_w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    rounded = _wide(narrow_x) @ _wide(narrow_w).T
    yield "bf16", lambda: jnp.matmul(narrow_x, narrow_w.T), rounded


def _bind(product: Callable[..., Any], q: Quantized, **options: Any) -> Callable[[], Any]:
    return lambda: product(q.x, q.w, q.x_scale, q.w_scale, **options)


def _wide(a: jax.Array) -> np.ndarray:
    return np.asarray(a).astype(np.float64)


def _peer() -> Callable[..., np.ndarray] | None:
    """torch's product where torch sees the GPU; else None, and a line."""
    try:
        import torch

        seen = torch.cuda.is_available()
    except ModuleNotFoundError:
        seen = False
    if not seen:
        print("No peer: torch with CUDA is not installed (`pip install torch`).")
        return None
    from benchmarks._accuracy_torch import scaled_product

    return scaled_product


def _print(rows: list[dict[str, Any]]) -> None:
    names = dict.fromkeys(name for row in rows for name in row["errors"])
    for measured in MEASURES:
        lines = [
            [row["inputs"], str(row["k"])]
            + [_cell(row["errors"].get(name, {}).get(measured)) for name in names]
            for row in rows
        ]
        columns = ["inputs", "K", *(name.replace(", ", "\n") for name in names)]
        _report.print_table(f"Relative error: {measured.replace('_', ' ')}", columns, lines)


def _cell(error: float | None) -> str:
    return "-" if error is None else f"{error:.2e}"


def _plot(rows: list[dict[str, Any]], title: str, path: Any) -> None:
    """A panel for each kind of input, above by "error", below by "sums"."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for measured in ("error", "sums"):
        for kind in INPUTS:
            lines = panels.setdefault(f"{kind}: {measured}", {})
            for row in rows:
                for name, errors in row["errors"].items() if row["inputs"] == kind else ():
                    lines.setdefault(name, []).append((row["k"], errors[measured]))
    curves(panels, len(INPUTS), "K", "relative error", title, path)
