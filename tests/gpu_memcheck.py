"""Every kernel on odd sizes, each buffer an allocation of its own, for compute-sanitizer.

Run by `test_gpu_memory.py`, which sets XLA_PYTHON_CLIENT_ALLOCATOR=platform: otherwise buffers lie
in one large pool, and an access past the end of one hits the next unseen.
"""

import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from direct_calls import FROM_TABLE, dense, kernel_name, kernels, matmul, quantize

from jaxfp8 import PaddedKernel
from jaxfp8._weights import pad_weight, weight_scale
from jaxfp8.padded import padded_size
from jaxfp8.quantize import FP8_DTYPE


assert os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR") == "platform", (
    "run it as test_gpu_memory.py does"
)
RNG = np.random.default_rng(0)
# (M, N, K): a single element, less than a tile, odd everywhere, and a little more than a tile of
# any kernel. The types of results take them in turn, and e4m3 has whole rows of 16: the last.
SCALED = [(1, 16, 16), (67, 208, 144), (33, 45, 80), (131, 272, 144)]
# The first is stored by classes of rows, of unequal numbers, by every kernel that is not swapped
# (`row_classes` in cuda/src/gemm.h wants N > 256 for the widest, and for the tallest 8 classes of
# that many rows); the others by threads, 8 bytes at a time or less, but e4m3.
DENSE = [
    (1793, 261, 50, np.float32),
    (3, 44, 33, ml_dtypes.bfloat16),
    (131, 259, 515, np.float16),
    (131, 259, 100, ml_dtypes.bfloat16),
]
# The last is quantized by an out_scale, and its rows are padded.
OUT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32, FP8_DTYPE)
OUT_SCALE = np.float32(0.5)
# The quantize kernel's ways of reading a row: rows too long to be kept, by 4, 8 and 2 bytes; then
# rows that are kept.
ROWS = [
    (3, 70001, np.float32),
    (3, 70004, ml_dtypes.bfloat16),
    (3, 70001, np.float16),
    (3, 9000, np.float16),
    (3, 50001, np.float16),
    (3, 50002, ml_dtypes.bfloat16),
    (3, 50004, ml_dtypes.bfloat16),
    (3, 28671, np.float32),
    (5, 3421, np.float16),
    (517, 3421, ml_dtypes.bfloat16),
    (5, 3422, ml_dtypes.bfloat16),
    (517, 3422, np.float16),
    (5, 3420, ml_dtypes.bfloat16),
    (517, 3420, ml_dtypes.bfloat16),
    (518, 3420, ml_dtypes.bfloat16),
    (5, 516, ml_dtypes.bfloat16),
    (517, 516, ml_dtypes.bfloat16),
    (7, 100, ml_dtypes.bfloat16),
    (7, 50, np.float32),
    (3, 1030, np.float32),
    (517, 1030, np.float32),
    (1, 3420, np.float16),
    (1, 1, np.float32),
]

# Loaded weights [K, N]: read by 16, 8, 4 and 2 bytes in either layout; past a tile of either side,
# and less than one.
WEIGHTS = [
    (144, 208, ml_dtypes.bfloat16),
    (516, 260, ml_dtypes.bfloat16),
    (514, 262, ml_dtypes.bfloat16),
    (515, 259, np.float16),
    (1100, 67, np.float32),
    (1, 1, ml_dtypes.bfloat16),
]


def fp8(*shape):
    return RNG.standard_normal(shape, np.float32).astype(ml_dtypes.float8_e4m3fn)


def vector(*shape):
    return RNG.uniform(0.5, 2, shape).astype(np.float32)


def padded(n, k):
    """A PaddedKernel made on the host, so that nothing but the custom call is compiled."""
    qvalue = np.zeros((padded_size(n), padded_size(k)), ml_dtypes.float8_e4m3fn)
    qvalue[:n, :k] = fp8(n, k)
    scale = np.ones(padded_size(n), np.float32)
    scale[:n] = vector(n)
    return PaddedKernel(qvalue, scale, k, n)


def check(y, *case):
    assert np.isfinite(np.asarray(y, np.float32)).all(), case


def main():
    calls = 0
    for kernel in (*kernels(), FROM_TABLE):
        # Every kernel with every result type, over the sizes in turn: compilation takes most time.
        for i, out_dtype in enumerate(OUT_DTYPES):
            options = dict(kernel=kernel, out_dtype=out_dtype)
            if out_dtype == FP8_DTYPE:
                options["out_scale"] = OUT_SCALE
            m, n, k = SCALED[i % len(SCALED)]
            scales = (vector(m, 1), vector(n)) if i else (vector(), vector())
            bias = vector(n) if i % 2 else None
            operands = (fp8(m, k), fp8(n, k), *scales, bias)
            check(matmul(*operands, activation="gelu", **options), kernel, n)
            if i < 2:  # of 16 bits, and rows that TMA addresses
                residual = vector(m, n).astype(out_dtype)
                check(matmul(*operands, residual=residual, **options), kernel, n)
                calls += 1
            m, n, k, dtype = DENSE[i % len(DENSE)]
            x = RNG.standard_normal((m, k), np.float32).astype(dtype)
            y = dense(x, padded(n, k), vector(n), activation="silu", **options)[0]
            check(y, kernel_name(kernel), m, n, k)
            calls += 2
    for m, k, dtype in ROWS:
        for x_scale in (None, np.float32(0.01)):
            x = RNG.standard_normal((m, k), np.float32).astype(dtype)
            for y in quantize(x, x_scale):
                check(y, m, k, x_scale)
            calls += 1
    for k, n, dtype in WEIGHTS:
        for layout in ("in_out", "out_in"):
            shape = (2, k, n) if layout == "in_out" else (2, n, k)
            alike = [RNG.standard_normal(shape, np.float32).astype(dtype) for _ in range(2)]
            scales = jax.jit(weight_scale, static_argnames="layout")(alike, layout=layout)
            for given in ([scales], []):
                pad = jax.jit(pad_weight, static_argnames="layout")
                for array in jax.tree.leaves(pad(alike, *given, layout=layout)):
                    check(array, k, n, layout)
            calls += 3
    check(dense(np.ones((1, 1), np.float32), padded(1, 1))[0], 1)
    print(f"OK {calls + 1} calls")


if __name__ == "__main__":
    main()
