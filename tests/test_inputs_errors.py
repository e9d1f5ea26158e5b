"""Bad quantized inputs and out_scales: each error names the argument, and what came."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import randn

from jaxfp8 import PaddedKernel, QuantizedInput, fp8_dense, quantize_input, scaled_matmul
from jaxfp8.dense_float import fp8_dense_float
from jaxfp8.quantize import FP8_DTYPE


M, K, N = 4, 33, 50
X, W = np.asarray(randn(0, (M, K))), np.asarray(randn(1, (K, N)))
KERNEL = PaddedKernel.from_dense(W)
NARROW = PaddedKernel.from_dense(np.ones((20, N), np.float32))
QX = quantize_input(X)
QVALUE, SCALE = QX.qvalue[:, :K], QX.scale


def case(name, error, match, *args, **options):
    return pytest.param(error, match, args, options, id=name)


OF_QUANTIZED_X = [
    case("another width", ValueError, r"`x` must have 33 features.*\(4, 32\)",
         quantize_input(X[:, :32]), KERNEL),
    case("another width of the same padded one", ValueError, r"`x` must have 20.*\(4, 18\)",
         quantize_input(X[:, :18]), NARROW),
    case("pair of the padded width", ValueError, r"`x` must have 33.*\(4, 48\)",
         (QX.qvalue, SCALE), KERNEL),
    case("pair of another width", ValueError, r"`x` must have 20.*\(4, 18\)",
         (QVALUE[:, :18], SCALE), NARROW),
    case("buffer of another width", ValueError, r"`x` says that it has 33 features, which pad to "
         r"48, but the shape of `x\.qvalue` is \(4, 33\)\. Make it with `quantize_input`",
         QuantizedInput(QVALUE, SCALE, K), KERNEL),
    case("no features", ValueError, r"`x\[0\]` must have shape \[\*lead, K\].*\(4, 0\)",
         (QVALUE[:, :0], SCALE), KERNEL),
    case("scalar qvalue", ValueError, r"`x\[0\]` must have.*\(\)", (QVALUE[0, 0], SCALE), KERNEL),
    case("one of a pair", TypeError, r"pair `\(qx, scale\)` of arrays, but it is a tuple of 1: Arr",
         (QVALUE,), KERNEL),
    case("a triple", TypeError, r"`x` must be.*a QuantizedInput.*tuple of 3: \w+, \w+, int",
         (QVALUE, SCALE, K), KERNEL),
    case("a pair of others", TypeError, r"tuple of 2: \w+, NoneType", (QVALUE, None), KERNEL),
    case("a list", TypeError, r"`x` must be a real float array.*but it is a list", [QVALUE, SCALE],
         KERNEL),
    case("cast values", TypeError, r"`x\.qvalue` must be float8_e4m3fn.*it is bfloat16\. Make them "
         r"with `quantize_input`", jax.tree.map(lambda a: a.astype(jnp.bfloat16), QX), KERNEL),
    case("bf16 pair", TypeError, r"`x\[0\]` must be float8_e4m3fn.*bfloat16",
         (QVALUE.astype(jnp.bfloat16), SCALE), KERNEL),
    case("e5m2 pair", TypeError, r"`x\[0\]` must be float8_e4m3fn.*float8_e5m2",
         (QVALUE.astype(jnp.float8_e5m2), SCALE), KERNEL),
    case("no array", TypeError, r"`x\.qvalue` must be float8_e4m3fn.*it is str",
         QuantizedInput("qvalue", "scale", K), KERNEL),
    case("flat scale", ValueError, r"`x\.scale` must have shape \[\] or \[4, 1\] \(static, or one "
         r"for each row\), but its shape is \(4,\)", QuantizedInput(QX.qvalue, SCALE[:, 0], K),
         KERNEL),
    case("scale of other rows", ValueError, r"`x\[1\]` must have.*\(3, 1\)", (QVALUE, SCALE[:3]),
         KERNEL),
    case("scale of one", ValueError, r"`x\[1\]` must have.*\(1,\)", (QVALUE, np.ones(1)), KERNEL),
    case("int scale", TypeError, r"`x\[1\]` must be a float array.*int32", (QVALUE, np.int32(1)),
         KERNEL),
    case("x_scale too", ValueError, r"`x_scale` must be None for an `x` that is quantized", QX,
         KERNEL, x_scale=0.1),
    case("x_scale beside a pair", ValueError, r"`x_scale` must be None", (QVALUE, SCALE), KERNEL,
         x_scale=0.1),
]  # fmt: skip
OF_OUT_SCALE = [
    case("bf16 too", ValueError, r"`out_dtype` must be None or float8_e4m3fn with an `out_scale`, "
         r"but it is bfloat16", X, KERNEL, out_scale=0.1, out_dtype=jnp.bfloat16),
    case("e5m2", ValueError, r"`out_dtype` must be None or.*float8_e5m2", X, KERNEL, out_scale=0.1,
         out_dtype=jnp.float8_e5m2),
    case("e5m2 alone", ValueError, r"`out_dtype` must be.*float8_e5m2", X, KERNEL,
         out_dtype=jnp.float8_e5m2),
    case("of rows", ValueError, r"`out_scale` must have shape \[\] .*\(4, 1\)", X, KERNEL,
         out_scale=SCALE),
    case("of features", ValueError, r"`out_scale` must have.*\(50,\)", QX, KERNEL,
         out_scale=np.ones(N)),
    case("of one", ValueError, r"`out_scale` must have.*\(1,\)", X, KERNEL, out_scale=np.ones(1)),
    case("int", TypeError, r"`out_scale` must be a float.*int32", X, KERNEL, out_scale=1),
    case("fp8", TypeError, r"`out_scale` must be a float.*float8", X, KERNEL,
         out_scale=jnp.ones((), FP8_DTYPE)),
    case("no scale for a quantized x", ValueError, r"`out_dtype` must be.*an `out_scale`", QX,
         KERNEL, out_dtype=FP8_DTYPE),
]  # fmt: skip


# Everything is checked before anything runs, so naming "cutlass" needs no GPU here.
implementations = pytest.mark.parametrize("implementation", [None, "xla", "cutlass"])


@implementations
@pytest.mark.parametrize(("error", "match", "args", "options"), OF_QUANTIZED_X + OF_OUT_SCALE)
def test_fp8_dense(error, match, args, options, implementation):
    f = functools.partial(fp8_dense, implementation=implementation, **options)
    with pytest.raises(error, match=match):
        f(*args)


@implementations
@pytest.mark.parametrize(
    ("x", "options", "error", "match"),
    [
        (X.astype(np.int8), {}, TypeError, r"`x` must be a real float.*int8"),
        (
            jnp.zeros((M, K), FP8_DTYPE),
            {},
            TypeError,
            r"`x` must be a real float.*its scale: pass both to `fp8_dense`",
        ),
        (QX, {}, TypeError, r"`x` must be a real float array.*but it is a QuantizedInput"),
        ((QVALUE, SCALE), {}, TypeError, r"`x` must be a real float array.*but it is a tuple"),
        (np.float32(1), {}, ValueError, r"`x` must have shape \[\*lead, K\].*\(\)"),
        (X[:, :0], {}, ValueError, r"`x` must have shape \[\*lead, K\].*\(4, 0\)"),
        (X, {"x_scale": np.ones((M, 1))}, ValueError, r"`x_scale` must have shape \[\].*\(4, 1\)"),
        (X, {"x_scale": 1}, TypeError, r"`x_scale` must be a float.*int32"),
    ],
)
def test_quantize_input(x, options, error, match, implementation):
    with pytest.raises(error, match=match):
        quantize_input(x, implementation=implementation, **options)


@pytest.mark.parametrize("x", [QX, (QVALUE, SCALE)], ids=["QuantizedInput", "pair"])
def test_a_quantized_x_where_none_is_taken(x):
    with pytest.raises(TypeError, match=r"`x` must be a real float array.*but it is a"):
        fp8_dense_float(x, W)
    with pytest.raises(TypeError, match=r"`lhs` must be float8_e4m3fn, but it is"):
        scaled_matmul(x, KERNEL.qvalue, 1.0, 1.0)
