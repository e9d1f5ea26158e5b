"""Shapes, references and tolerances of the tests of the operations."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxfp8 import PaddedKernel, quantize
from jaxfp8._cutlass import cuda_devices
from jaxfp8.padded import padded_size
from jaxfp8.quantize import FP8_DTYPE, cast_to_fp8


# Two programs that differ in the order of float32 sums. On a GPU XLA's own products may be TF32, or
# FP8 with 14 bits of accumulator, and are not the same for every M.
CLOSE = dict(rtol=5e-3, atol=5e-3) if cuda_devices() else dict(rtol=1e-5, atol=1e-5)

# One test body for both: xla runs everywhere, cutlass where a GPU is.
implementations = pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("cutlass", marks=pytest.mark.gpu)]
)

# (M, N, K). vLLM's matrices for its CUTLASS kernels: those it calls aligned, and the ones that it
# had to pad, from its reports of wrong results.
ALIGNED = [
    (1, 256, 128),
    (1, 16384, 1024),
    (1, 24576, 496),
    (16, 256, 496),
    (16, 16384, 128),
    (16, 24576, 4096),
    (32, 8192, 4096),
    (32, 16384, 4096),
    (33, 1024, 1024),
    (33, 8192, 128),
    (64, 2048, 496),
    (64, 16384, 1024),
    (100, 8192, 496),
    (128, 32768, 4096),
    (256, 4096, 4096),
    (512, 256, 1024),
    (512, 8192, 4096),
    (512, 16384, 128),
    (512, 24576, 128),
]
UNALIGNED = [
    (32, 3420, 1280),
    (32, 1280, 6840),
    (1, 3420, 1280),
    (64, 6840, 1280),
    (16, 100, 200),
    (33, 255, 513),
]
# (per token, per channel, bias)
COMBINATIONS = list(itertools.product((True, False), repeat=3))

ACCUMULATIONS = ("fast", "promoted", "float32")
# Of one rounding to nearest (half a unit in the last place). float32 pays for the epilogue's own
# operations in `EPILOGUE`.
UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
# Smallest normal number; below it the spacing is constant, and XLA on CPU flushes to zero.
TINY = {"bfloat16": 2.0**-126, "float16": 2.0**-14, "float32": 2.0**-126}
# Two multiplications and an addition in float32, each rounded, and one rounding to spare.
EPILOGUE = 4 * 2.0**-24
# Largest slope of gelu (1.129) and silu (1.0998), by which an error before them may grow.
SLOPE = 1.13


def accumulation(implementation: str, promoted: bool) -> str:
    """How sums are formed. On a GPU XLA may rewrite its own dot into a fast FP8 one."""
    if implementation == "cutlass":
        return "promoted" if promoted else "fast"
    return "fast" if cuda_devices() else "float32"


def sum_error(k: int, kind: str) -> tuple[float, float]:
    """`(c, norm)`: bounds on the error of a dot product of K terms whose signs are independent.

    Elementwise `|error| <= c * sum_k |x_k w_k|`, and in norm `|error| <= norm * |result|`.

    *float32*: K additions of exact products, each rounded: c = K 2^-24 holds always (Higham,
    "Accuracy and stability of numerical algorithms", 3.1). In norm roundings are independent:
    sqrt(K) 2^-24.

    *fast*: Hopper's FP8 MMA adds 32 products to the accumulator in fixed point, aligned to the
    largest of the 33 and cut off 13 bits below it, and keeps 1+8+13 bits (DeepSeek-V3 report,
    3.3.2; DeepGEMM issues 37 and 50). Each of 33 K/32 terms loses up to q = 2^-13 m, m the largest
    magnitude so far, uniformly: q/sqrt(3) rms. If signs are independent then so are the losses,
    and m grows like the partial sum, to s sqrt(K) for products of rms s, on average half of that:
    rms error = sqrt(33 K/32) * 2^-13 * (s sqrt(K) / 2) / sqrt(3) = 0.29 * 2^-13 * s K. The sum of
    magnitudes is 0.64 s K for normal x and w, so the rms error is 2^-14.1 of it *at any K*, and
    c = 2^-10 leaves 16 deviations: 6 for the largest of 10^8 elements, times 2.7 for those few
    whose own partial sums lie far out. In norm the same is 2^-14.8 sqrt(K); fewer bits are lost
    than this says (a product has only 8), so 2^-15 sqrt(K) is the bound: at K = 4096 2.0e-3, where
    `tests/test_tolerances.py` simulates 1.3e-3 and an H200 gave 1.2e-3.
    A worst case, every loss of one sign, would be 33 * 2^-13 K/64 and no use: it occurs, with
    coherent sums, and `test_gpu_numerics.py` shows it.

    *promoted*: the same from zero for every 128 terms, whose sums are then added in float32: the
    losses of K/128 such groups add as independent ones, so both shrink by sqrt(128/K).

    What the bounds still catch: c is 2^-10 * 0.64 sqrt(K) of a typical result, so 4 % at K = 4096
    for fast, and 0.7 % for promoted; one K tile of 128 left out is 18 % there, one element 1.6 %.
    The bound in norm sees that one element (1.6e-2 against 2.0e-3 and the output's rounding).
    """
    if kind == "float32":
        # A GPU's or a CPU's vector unit may add in any order, and round twice.
        return 2 * k * 2.0**-24, 2 * math.sqrt(k) * 2.0**-24
    groups = max(k / 128, 1.0)
    if kind == "fast":
        return 2.0**-10, 2.0**-15 * math.sqrt(max(k, 128))
    return 2.0**-10 / math.sqrt(groups) + k / 128 * 2.0**-24, 2.0**-15 * math.sqrt(128)


def activate(z: Any, activation: str | None, xp: Any = np) -> Any:
    """The activations from their definitions, in float64."""
    if activation == "relu":
        return xp.maximum(z, 0)
    if activation == "gelu":
        return 0.5 * z * (1 + xp.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    if activation == "silu":
        return z / (1 + xp.exp(-z))
    return z


def randn(seed: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal numbers, made on the host: nothing is compiled."""
    a = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(np.asarray(a).astype(dtype))


def quantized_randn(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Normal numbers in e4m3, each row stretched to 448."""
    a = rng.standard_normal(shape, np.float32)
    return (a * (448 / np.abs(a).max(-1, keepdims=True))).astype(ml_dtypes.float8_e4m3fn)


def random_scales(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Positive scales, no two alike, so that one taken from another row or channel shows."""
    return np.exp2(rng.standard_normal(shape, np.float32)) * np.float32(2e-3)


def bits(a: jax.Array) -> np.ndarray:
    """The bit patterns, on the host."""
    a = np.asarray(a)
    return a.view(f"u{a.dtype.itemsize}")


@dataclasses.dataclass(frozen=True)
class Product:
    """`lhs @ rhs.T` of two e4m3 arrays in float64, and the same of their magnitudes.

    The two cost most and serve every combination of scales and bias of one shape. A large product
    on a machine with a GPU stays on it, and is checked there.
    """

    dot: Any
    magnitude: Any
    k: int

    @staticmethod
    def of(lhs: Any, rhs: Any) -> Product:
        k = lhs.shape[-1]
        if cuda_devices() and lhs.size * rhs.shape[0] > 2**28:
            with jax.enable_x64(True):
                a, b = (jnp.asarray(q).astype(jnp.float64) for q in (lhs, rhs))
                return Product(_dot64(a, b), _dot64(jnp.abs(a), jnp.abs(b)), k)
        a, b = (np.asarray(q).astype(np.float64) for q in (lhs, rhs))
        return Product(a @ b.T, np.abs(a) @ np.abs(b).T, k)

    def expected(
        self,
        lhs_scale: Any,
        rhs_scale: Any,
        bias: Any = None,
        residual: Any = None,
        *,
        activation: str | None = None,
        kind: str,
    ) -> tuple[Any, Any]:
        """`activation(lhs_scale * rhs_scale * dot + bias) + residual`, and its error unrounded.

        slope * (c * sum_k |x_k||w_k| + EPILOGUE * (|scaled| + |bias|)), elementwise; and of the
        last sum one rounding in float32.
        """
        c, _ = sum_error(self.k, kind)
        xp = jnp if isinstance(self.dot, jax.Array) else np
        with jax.enable_x64(True):
            lhs_scale, rhs_scale, bias, residual = (
                xp.asarray(np.zeros(1) if a is None else np.asarray(a).astype(np.float64))
                for a in (lhs_scale, rhs_scale, bias, residual)
            )
            scale = lhs_scale * rhs_scale
            scaled = self.dot * scale
            want = activate(scaled + bias, activation, xp)
            before = c * self.magnitude * scale + EPILOGUE * (xp.abs(scaled) + xp.abs(bias))
            if activation in ("gelu", "silu"):
                # tanh and exp are good to a few units; beside -1 or 1 that is an absolute error.
                before = SLOPE * before + 8 * 2.0**-24 * xp.abs(scaled + bias)
            want = want + residual
            return want, before + 2.0**-24 * xp.abs(want) * (residual.size > 1)

    def check(self, y: Any, *scales: Any, activation: str | None = None, kind: str) -> None:
        """Assert that y is what is `expected` to the derived tolerance, and one rounding.

        Elementwise; without an activation, and for enough elements to average over, also in norm.
        """
        unit, tiny = UNIT_ROUNDOFF[y.dtype.name], TINY[y.dtype.name]
        _, norm = sum_error(self.k, kind)
        want, before = self.expected(*scales, activation=activation, kind=kind)
        xp = jnp if isinstance(self.dot, jax.Array) else np
        with jax.enable_x64(True):
            y = xp.asarray(np.asarray(y).astype(np.float64))
            assert y.shape == want.shape
            bound = unit * (xp.abs(want) + tiny) + (1 + unit) * before
            error = xp.abs(y - want)
            inside = error <= bound  # false for NaN
            if not inside.all():
                excess = xp.where(inside, 0, xp.nan_to_num(error / bound, nan=xp.inf))
                at = tuple(map(int, np.unravel_index(int(excess.argmax()), excess.shape)))
                raise AssertionError(
                    f"{int((~inside).sum())} of {y.size} elements are off; the worst at {at}: got "
                    f"{y[at]}, want {want[at]}, error {error[at]:.3g}, allowed {bound[at]:.3g}."
                )
            if activation is None and y.size >= 4096:
                # A uniform error of up to `unit` has an rms of unit/sqrt(3).
                allowed = unit / math.sqrt(3) + norm
                relative = float(xp.linalg.norm(error) / xp.linalg.norm(want))
                assert relative <= allowed, f"off by {relative:.3g} in norm, allowed {allowed:.3g}"


@jax.jit
def _dot64(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())))


@jax.jit
def _per_token(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return quantize(x, axis=-1)


def dense_product(x: jax.Array, kernel: PaddedKernel) -> tuple[Product, jax.Array, np.ndarray]:
    """`(product, x's scales, the kernel's)` of the logical parts, for `fp8_dense` per token."""
    n, k = kernel.out_features, kernel.in_features
    qx, scale = _per_token(np.asarray(x).reshape(-1, k))
    weight_scale = np.asarray(kernel.scale)
    if kernel.per_channel:
        weight_scale = weight_scale[:n]
    return Product.of(qx, kernel.qvalue[:n, :k]), scale, weight_scale


def check_quantized(q: Any, y: Any, scale: Any, slack: Any = None) -> None:
    """Assert that q is `y / scale` in e4m3, padded with zeros to a multiple of 16.

    Bit for bit; or, with the error `slack` that y may have, no code outside of those that
    `y - slack` and `y + slack` round to. A row of NaN may be padded with anything.
    """
    n = y.shape[-1]
    assert (q.dtype, q.shape) == (FP8_DTYPE, (*y.shape[:-1], padded_size(n)))
    q, y = np.asarray(q), np.asarray(y)
    padding = q[..., n:].astype(np.float32)
    assert (padding[~np.isnan(y).all(-1)] == 0).all()
    if slack is None:
        np.testing.assert_array_equal(bits(q[..., :n]), bits(cast_to_fp8(y, scale)))
        return
    with np.errstate(invalid="ignore", over="ignore"):
        ends = np.float32(y - slack), np.float32(y + slack)
    low, high = (np.asarray(cast_to_fp8(end, scale), np.float32) for end in ends)
    codes = q[..., :n].astype(np.float32)
    inside = (low <= codes) & (codes <= high) | np.isnan(codes) & np.isnan(low) & np.isnan(high)
    assert inside.all(), (
        f"{(~inside).sum()} of {inside.size} codes are off; the first is {codes[~inside][0]}, not "
        f"in [{low[~inside][0]}, {high[~inside][0]}]"
    )


def cuda_text(f: Any, *args: Any) -> str:
    """The StableHLO of `f` lowered for CUDA, which needs no GPU."""
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
