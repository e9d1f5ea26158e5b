"""The kernels one by one: right, and bitwise independent of batch, tile and position."""

import functools

import direct_calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from direct_calls import FROM_TABLE, kernel_name, kernels, naming, scaled_operands
from helpers import Product, dense_product, quantized_randn, randn

from jaxfp8 import PaddedKernel, fp8_dense, scaled_matmul
from jaxfp8.quantize import FP8_DTYPE


pytestmark = pytest.mark.gpu
ACCUMULATIONS = ["fast", "promoted"]
OUT_DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32]
accumulations = pytest.mark.parametrize("accumulation", ACCUMULATIONS)
out_dtypes = pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=lambda d: d.__name__)
# e4m3 results have tests of their values in test_gpu_results_in_fp8.py.
stored_dtypes = pytest.mark.parametrize(
    "out_dtype", [*OUT_DTYPES, FP8_DTYPE], ids=lambda d: d.__name__
)
ROWS = (1, 2, 16, 17, 64, 65, 128, 300, 1023, 1024, 4096)
OFFSET = 5


@out_dtypes
@accumulations
@pytest.mark.parametrize("n", [432, 430, 428, 413])
def test_every_kernel_of_scaled_matmul(n, accumulation, out_dtype):
    """Odd M, K past the last whole tile, each activation and each kind of scale and bias.

    TMA stores rows that are a multiple of 16 bytes; others are stored by threads, 8 bytes at a
    time if they are a multiple of that (428 of 16 bits, 430 of 32).
    """
    lhs, rhs, per_token, per_channel, bias, product = scaled_operands(77, n, 1040)
    epilogues = [((per_token, per_channel, bias), a) for a in (None, "relu", "gelu", "silu")]
    epilogues += [
        ((lhs_scale, rhs_scale, None), None)
        for lhs_scale in (per_token, per_token[0, 0])
        for rhs_scale in (per_channel, per_channel[0])
    ]

    @functools.partial(jax.jit, static_argnames="kernel")
    def every(lhs, rhs, operands, kernel):
        return [
            direct_calls.matmul(
                lhs, rhs, *rest, kernel=kernel, activation=activation, out_dtype=out_dtype
            )
            for rest, (_, activation) in zip(operands, epilogues, strict=True)
        ]

    for kernel in kernels(accumulation):
        results = every(lhs, rhs, [rest for rest, _ in epilogues], kernel)
        for y, (rest, activation) in zip(results, epilogues, strict=True):
            with naming(kernel):
                product.check(y, *rest, activation=activation, kind=accumulation)


@accumulations
@pytest.mark.parametrize("k", [48, 256])
def test_many_tiles_of_few_steps_along_k(k, accumulation):
    """Blocks that have several tiles of one K tile or two each, where kernels work ahead."""
    lhs, rhs, *rest, product = scaled_operands(4096, 3424, k)
    for kernel in kernels(accumulation):
        y = direct_calls.matmul(lhs, rhs, *rest, kernel=kernel)
        with naming(kernel):
            product.check(y, *rest, kind=accumulation)


@out_dtypes
@accumulations
def test_every_kernel_of_dense(accumulation, out_dtype):
    """Logical N and K, neither a multiple of anything."""
    m, n, k = 77, 413, 1037
    x = randn(0, (m, k), out_dtype)
    bias = randn(1, (n,))
    w = randn(2, (k, n)) / np.sqrt(k)
    weights = [PaddedKernel.from_dense(w, per_channel=per_channel) for per_channel in (True, False)]
    references = [dense_product(x, weight) for weight in weights]

    @functools.partial(jax.jit, static_argnames="kernel")
    def every(x, weights, bias, kernel):
        return [
            [
                direct_calls.dense(x, w, b, kernel=kernel, out_dtype=out_dtype)[0]
                for b in (bias, None)
            ]
            for w in weights
        ]

    for kernel in kernels(accumulation):
        results = every(x, weights, bias, kernel)
        for ys, (product, *scales) in zip(results, references, strict=True):
            for y, b in zip(ys, (bias, None), strict=True):
                with naming(kernel):
                    product.check(y, *scales, b, kind=accumulation)


def stored(out_dtype):
    """The options that give a result of this dtype; results are about 1."""
    return {"out_dtype": out_dtype, "out_scale": 0.01 if out_dtype == FP8_DTYPE else None}


def same_bits(a: jax.Array, b: jax.Array) -> jax.Array:
    integer = jnp.dtype(f"uint{8 * a.dtype.itemsize}")
    cast = functools.partial(jax.lax.bitcast_convert_type, new_dtype=integer)
    return jnp.array_equal(cast(a), cast(b))


def check_rows(f, every_kernel, rows, shared):
    """`f(*rows, *shared, kernel=)` on cuts of the rows gives cuts of its result, bit for bit.

    Two cuts of every length, compiled together and compared on the GPU.
    """
    cuts = [(offset, m) for offset in (0, OFFSET) for m in ROWS]

    @functools.partial(jax.jit, static_argnames="kernel")
    def compare(rows, shared, want, kernel):
        return [
            same_bits(f(*(a[o : o + m] for a in rows), *shared, kernel=kernel), want[o : o + m])
            for o, m in cuts
        ]

    want = f(*rows, *shared, kernel=every_kernel[0])
    for kernel in every_kernel:
        same = compare(rows, shared, want, kernel)
        differing = [cut for cut, s in zip(cuts, same, strict=True) if not s]
        assert differing == [], f"{kernel_name(kernel)}: cuts (offset, M) with other bits"


@stored_dtypes
@accumulations
def test_rows_do_not_depend_on_batch_kernel_or_position(accumulation, out_dtype):
    """Bitwise, cut from one x at two places, by every kernel and by the table (invariant 4)."""
    total = max(ROWS) + OFFSET
    lhs, rhs, per_token, per_channel, bias, _ = scaled_operands(total, 3424, 1296)
    options = dict(activation="gelu", promoted=accumulation == "promoted", **stored(out_dtype))

    def f(lhs, lhs_scale, rhs, rhs_scale, bias, kernel):
        return direct_calls.matmul(lhs, rhs, lhs_scale, rhs_scale, bias, kernel=kernel, **options)

    check_rows(f, [*kernels(accumulation), FROM_TABLE], (lhs, per_token), (rhs, per_channel, bias))


@stored_dtypes
@accumulations
@pytest.mark.parametrize("n", [3424, 3420, 3421])
def test_rows_of_dense_do_not_depend_on_batch_kernel_or_position(n, accumulation, out_dtype):
    """N of 1, 4 and 8 classes of rows, of which cuts of odd lengths have unequal numbers."""
    k = 1283
    x, bias = randn(3, (max(ROWS) + OFFSET, k), jnp.bfloat16), randn(4, (n,))
    weight = PaddedKernel.from_dense(randn(5, (k, n)) / np.sqrt(k))
    options = dict(activation="silu", promoted=accumulation == "promoted", **stored(out_dtype))

    def f(x, weight, bias, kernel):
        y, qx, _ = direct_calls.dense(x, weight, bias, kernel=kernel, **options)
        if n % 16:
            return y
        # The scratch as well, where it is in the order of x: rows are quantized on their own.
        return jnp.concatenate([y.astype(jnp.float32), qx.astype(jnp.float32)], axis=1)

    check_rows(f, [*kernels(accumulation), FROM_TABLE], (x,), (weight, bias))


@pytest.mark.parametrize("m", [16, 256])
@pytest.mark.parametrize("k", [4096, 16384])
def test_coherent_sums_tell_fast_from_promoted(k, m):
    """All terms positive, so that no loss in the tensor core is made up for by another.

    Simulated at K = 4096 (test_tolerances.py): fast 6.7e-2, promoted 6.0e-4; for a Gram matrix an
    H200 gave 3.4e-2 and, with bfloat16's own 1.7e-3, 1.8e-3.
    """
    rng = np.random.default_rng(6)
    lhs, rhs = (np.abs(quantized_randn(rng, s).astype(np.float32)) for s in ((m, k), (512, k)))
    lhs, rhs = (jnp.asarray(a).astype(jnp.float8_e4m3fn) for a in (lhs, rhs))
    want = np.asarray(Product.of(lhs, rhs).dot)
    error = {}
    for precision in ("default", "highest"):
        y = scaled_matmul(
            lhs,
            rhs,
            1.0,
            1.0,
            out_dtype=jnp.float32,
            precision=precision,
            implementation="cutlass",
        )
        error[precision] = np.linalg.norm(np.asarray(y) - want) / np.linalg.norm(want)
    assert error["highest"] < 2e-3
    assert error["default"] > 1e-2


@pytest.mark.parametrize("precision", ["default", "highest"])
@pytest.mark.parametrize("k", [4096, 16384])
def test_independent_sums_are_fine_either_way(k, precision):
    rng = np.random.default_rng(7)
    lhs, rhs = quantized_randn(rng, (200, k)), quantized_randn(rng, (512, k))
    y = scaled_matmul(
        jnp.asarray(lhs),
        jnp.asarray(rhs),
        1.0,
        1.0,
        out_dtype=jnp.float32,
        precision=precision,
        implementation="cutlass",
    )
    kind = "fast" if precision == "default" else "promoted"
    Product.of(lhs, rhs).check(y, 1.0, 1.0, kind=kind)


def test_a_chain_of_layers_again_and_again():
    """XLA replays a command buffer from the second run on: new inputs, the same results."""
    sizes = [1280, 3420, 1283, 100, 1280]
    weights = [
        PaddedKernel.from_dense(randn(i, shape) / np.sqrt(shape[0]))
        for i, shape in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    ]

    def chain(x, weights):
        for weight in weights:
            x = fp8_dense(x, weight, activation="gelu")
        return x

    jitted = jax.jit(chain)
    for m in (16, 300):
        for seed in range(5):
            x = randn(seed, (m, sizes[0]), jnp.bfloat16)
            assert same_bits(jitted(x, weights), chain(x, weights))


@pytest.mark.parametrize(("n", "k"), [(16400, 16), (24, 16400)])
def test_more_than_two_to_the_31_elements(n, k):
    """The result, then x, past what a 32-bit index reaches: 131075 x 16400."""
    m = 2**17 + 3
    x = jnp.tile(randn(8, (1024, k), jnp.bfloat16), (129, 1))[:m]
    weight = PaddedKernel.from_dense(randn(9, (k, n)))
    y = fp8_dense(x, weight, implementation="cutlass")
    assert y.shape == (m, n)
    # The period of x is 1024 rows, so the rows of the result repeat, the last ones too.
    first = fp8_dense(x[:1024], weight, implementation="cutlass")
    assert same_bits(y[:1024], first)
    assert same_bits(y[-3:], first[:3])
    assert same_bits(y[2**16 : 2**16 + 1024], first)


@pytest.mark.parametrize("n", [1, 3, 5, 7, 9])
def test_results_narrower_than_a_tma_store(n):
    """What TMA would clip to 16 bytes is more than such a row has: threads store it."""
    x = randn(7, (4096, 48), jnp.bfloat16)
    weight = PaddedKernel.from_dense(randn(8, (48, n)))
    product, *scales = dense_product(x, weight)
    first = fp8_dense(x, weight, implementation="cutlass")
    product.check(first, *scales, None, kind="fast")
    for _ in range(100):
        assert same_bits(fp8_dense(x, weight, implementation="cutlass"), first)


@pytest.mark.parametrize("n", [254, 255, 3420, 30522])
@pytest.mark.parametrize("m", [1023, 1024, 2050])
def test_rows_that_tma_cannot_address(m, n):
    """Many rows, which are stored by classes: each element once, and beside its neighbours."""
    x = randn(7, (m, 48), jnp.bfloat16)
    weight = PaddedKernel.from_dense(randn(8, (48, n)))
    product, *scales = dense_product(x, weight)
    product.check(fp8_dense(x, weight, implementation="cutlass"), *scales, None, kind="fast")
