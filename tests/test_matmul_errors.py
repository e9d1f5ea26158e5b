"""Bad input to the operations: each error names the argument in backticks, and what came."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import randn
from jax.lax import DotAlgorithmPreset

from jaxfp8 import PaddedKernel, fp8_dense, quantize_input, scaled_matmul
from jaxfp8._options import is_promoted
from jaxfp8.dense_float import fp8_dense_float
from jaxfp8.quantize import FP8_DTYPE


M, K, N = 4, 33, 50
X, W = np.asarray(randn(0, (M, K))), np.asarray(randn(1, (K, N)))
KERNEL = PaddedKernel.from_dense(W)
STACK = PaddedKernel.from_dense(np.stack([W, W]))
FP8_X = jnp.zeros((M, K), FP8_DTYPE)
LHS, RHS = jnp.ones((M, 48), FP8_DTYPE), jnp.ones((64, 48), FP8_DTYPE)


# Everything is checked before anything runs, so naming "cutlass" needs no GPU here.
implementations = pytest.mark.parametrize("implementation", [None, "xla", "cutlass"])


def replaced(**leaves):
    return dataclasses.replace(KERNEL, **leaves)


def case(name, error, match, *args, **options):
    return pytest.param(error, match, args, options, id=name)


# What `fp8_dense` and `fp8_dense_float` say alike, then of the kernel.
OF_X = [
    case("x too wide", ValueError, r"`x` must have 33 features.*\(4, 34\)", np.ones((4, 34))),
    case("x of the padded width", ValueError, r"`x` must have 33.*\(4, 48\)", np.ones((4, 48))),
    case("x too narrow", ValueError, r"`x` must have 33.*\(3, 4, 32\)", np.ones((3, 4, 32))),
    case("x a scalar", ValueError, r"`x` must have 33 features.*\(\)", np.float32(1)),
    case("x of N columns", ValueError, r"`x` must have 33 features.*\(4, 50\)", np.ones((4, 50))),
    case("int x", TypeError, r"`x` must be a real.*int32.*Cast it", np.ones((M, K), np.int32)),
    case("bool x", TypeError, r"`x` must be a real float.*bool", np.ones((M, K), bool)),
    case("complex x", TypeError, r"`x` must be a real float.*complex64", X.astype(np.complex64)),
    case("no x", TypeError, r"`x` must be a real float.*a NoneType", None),
    case("name of a dtype as x", TypeError, r"`x` must be a real float.*a str", "float32"),
    case("dtype as x", TypeError, r"`x` must be a real float.*a type", np.float32),
    case("fp8 x", TypeError, r"`x` must be a real float.*float8_e4m3fn.*`scaled_matmul`", FP8_X),
    case("e5m2 x", TypeError, r"`x` must be.*float8_e5m2", jnp.zeros((M, K), jnp.float8_e5m2)),
]
OF_BIAS_AND_OPTIONS = [
    case("short bias", ValueError, r"`bias` must have shape \[50\].*\(49,\)", X, ..., np.ones(49)),
    case("padded bias", ValueError, r"`bias` must have shape \[50\].*\(64,\)", X, ..., np.ones(64)),
    case("bias of rows", ValueError, r"`bias` must.*\(4, 50\)", X, ..., np.ones((4, 50))),
    case("scalar bias", ValueError, r"`bias` must have shape.*\(\)", X, ..., np.float32(1)),
    case("int bias", TypeError, r"`bias` must be a float.*int32", X, ..., np.ones(50, np.int32)),
    case("fp8 bias", TypeError, r"`bias` must be.*float8", X, ..., jnp.zeros(50, FP8_DTYPE)),
    case("dtype as bias", TypeError, r"`bias` must be a float array, but it is a type", X, ...,
         np.float32),
    case("list as bias", TypeError, r"`bias` must be a float array, but it is a list", X, ...,
         [0.0] * 50),
    case("activation", ValueError, r"`activation` must be one of None, 'relu', 'gelu', 'silu', but "
         r"it is 'tanh'", X, ..., activation="tanh"),
    case("callable activation", ValueError, r"`activation` must be one of.*Apply any other", X, ...,
         activation=jnp.tanh),
    case("out_dtype", ValueError, r"`out_dtype` must be.*int8", X, ..., out_dtype=jnp.int8),
    case("fp8 out_dtype", ValueError, r"`out_dtype` must be.*float8_e4m3fn, which `fp8_dense` "
         r"writes where it is given an `out_scale`", X, ..., out_dtype=FP8_DTYPE),
    case("precision", ValueError, r"`precision` must be None.*'best'", X, ..., precision="best"),
    case("bf16 preset", ValueError, r"`precision` must be None.*BF16_BF16_F32", X, ...,
         precision=DotAlgorithmPreset.BF16_BF16_F32),
]  # fmt: skip
OF_THE_KERNEL = [
    case("array kernel", TypeError, r"`kernel` must be a PaddedKernel.*from_dense", X, W),
    case("fp8 array kernel", TypeError, r"`kernel` must be a PaddedKernel", X, KERNEL.qvalue),
    case("stack", ValueError, r"`kernel` must be one layer's.*\(2,\).*jax\.vmap", X, STACK),
    case("cast kernel", TypeError, r"`kernel` must hold a float8_e4m3fn.*bfloat16 and bfloat16", X,
         jax.tree.map(lambda a: a.astype(jnp.bfloat16), KERNEL)),
    case("cast scale", TypeError, r"`kernel` must hold.*float32 `scale`.*bfloat16", X,
         replaced(scale=KERNEL.scale.astype(jnp.bfloat16))),
    case("transposed kernel", ValueError, r"`kernel` has in_features=33.*\(48, 64\)", X,
         replaced(qvalue=KERNEL.qvalue.T)),
    case("unpadded kernel", ValueError, r"`kernel` has.*\[\*stack, 64, 48\].*\(50, 33\)", X,
         replaced(qvalue=KERNEL.qvalue[:50, :33])),
    case("wrong sizes", ValueError, r"`kernel` has in_features=60", X, replaced(in_features=60)),
    case("logical scale", ValueError, r"`kernel` has.*`scale` \[\*stack, 64\].*\(50,\)", X,
         replaced(scale=KERNEL.scale[:50])),
    case("x_scale of rows", ValueError, r"`x_scale` must have shape \[\].*\(4, 1\)", X, KERNEL,
         x_scale=np.ones((4, 1))),
    case("x_scale of one", ValueError, r"`x_scale` must have shape \[\].*\(1,\)", X, KERNEL,
         x_scale=np.ones(1)),
    case("int x_scale", TypeError, r"`x_scale` must be a float.*int32", X, KERNEL, x_scale=1),
]  # fmt: skip


@implementations
@pytest.mark.parametrize(
    ("error", "match", "args", "options"), OF_X + OF_BIAS_AND_OPTIONS + OF_THE_KERNEL
)
def test_fp8_dense(error, match, args, options, implementation):
    args = [KERNEL if a is ... else a for a in args]
    args += [KERNEL] if len(args) == 1 else []
    f = functools.partial(fp8_dense, implementation=implementation, **options)
    with pytest.raises(error, match=match):
        f(*args)


@implementations
@pytest.mark.parametrize(("error", "match", "args", "options"), OF_X + OF_BIAS_AND_OPTIONS)
def test_fp8_dense_float(error, match, args, options, implementation):
    args = [W if a is ... else a for a in args]
    args += [W] if len(args) == 1 else []
    f = functools.partial(fp8_dense_float, implementation=implementation, **options)
    for transformed in (f, jax.grad(lambda *a: f(*a).sum(), argnums=1)):
        with pytest.raises(error, match=match):
            transformed(*args)


@pytest.mark.parametrize(
    ("w", "error", "match"),
    [
        (W[0], ValueError, r"`w` must have shape \[K, N\].*\(50,\)"),
        (W[None], ValueError, r"`w` must have shape \[K, N\].*\(1, 33, 50\)"),
        (W.astype(np.int8), TypeError, r"`w` must be a real float.*int8"),
        (KERNEL.qvalue.T, TypeError, r"`w` must be a real float.*float8_e4m3fn"),
        (W[:, :0], ValueError, r"`w` must have shape.*at least 1.*\(33, 0\)"),
        (W[:0], ValueError, r"`w` must have shape.*at least 1.*\(0, 50\)"),
        (W.T, ValueError, r"`x` must have 50 features"),
    ],
)
def test_float_weights(w, error, match):
    with pytest.raises(error, match=match):
        fp8_dense_float(X, w)


SCALES = {"lhs_scale": np.ones((M, 1)), "rhs_scale": np.ones(64)}
SCALED = [
    ("bf16 lhs", TypeError, r"`lhs` must be float8_e4m3fn.*bfloat16.*`quantize`",
     {"lhs": jnp.ones((M, 48), jnp.bfloat16)}),
    ("e5m2 rhs", TypeError, r"`rhs` must be float8_e4m3fn.*float8_e5m2",
     {"rhs": jnp.ones((64, 48), jnp.float8_e5m2)}),
    ("another K", ValueError, r"`lhs` must be.*\(4, 48\) and \(64, 32\)", {"rhs": RHS[:, :32]}),
    ("[K, N] rhs", ValueError, r"K-major.*\(4, 48\) and \(48, 64\)", {"rhs": RHS.T}),
    ("rank of rhs", ValueError, r"`rhs` \[N_pad, K_pad\].*\(1, 64, 48\)", {"rhs": RHS[None]}),
    ("scalar lhs", ValueError, r"`lhs` must be.*shapes are \(\)", {"lhs": LHS[0, 0]}),
    ("N % 16", ValueError, r"`rhs` must have both sides.*multiple of 16.*\(50, 48\)",
     {"rhs": RHS[:50], "rhs_scale": np.ones(50)}),
    ("K % 16", ValueError, r"`rhs` must have both sides.*\(64, 33\)",
     {"rhs": RHS[:, :33], "lhs": LHS[:, :33]}),
    ("N of 0", ValueError, r"`rhs` must have both sides a positive.*\(0, 48\)",
     {"rhs": RHS[:0], "rhs_scale": np.ones(0)}),
    ("K of 0", ValueError, r"`rhs` must have both sides a positive.*\(64, 0\)",
     {"rhs": RHS[:, :0], "lhs": LHS[:, :0]}),
    ("per-token of another M", ValueError, r"`lhs_scale` must have.*\[\] or \[4, 1\].*\(5, 1\)",
     {"lhs_scale": np.ones((5, 1))}),
    ("per-token of M 1", ValueError, r"`lhs_scale` must have.*\(1, 1\)",
     {"lhs_scale": np.ones((1, 1))}),
    ("flat per-token", ValueError, r"`lhs_scale` must have.*per token\).*\(4,\)",
     {"lhs_scale": np.ones(4)}),
    ("per-channel of another N", ValueError, r"`rhs_scale` must have shape \[\] or \[64\].*\(48,\)",
     {"rhs_scale": np.ones(48)}),
    ("column per-channel", ValueError, r"`rhs_scale` must have.*per channel\).*\(64, 1\)",
     {"rhs_scale": np.ones((64, 1))}),
    ("int scale", TypeError, r"`rhs_scale` must be a float.*int32", {"rhs_scale": 1}),
    ("bias", ValueError, r"`bias` must have shape \[64\].*\(50,\)", {"bias": np.ones(50)}),
    ("int bias", TypeError, r"`bias` must be a float.*int32", {"bias": np.ones(64, np.int32)}),
    ("activation", ValueError, r"`activation` must be one of.*'elu'", {"activation": "elu"}),
    ("out_dtype", ValueError, r"`out_dtype` must be.*float64", {"out_dtype": np.float64}),
    ("precision", ValueError, r"`precision` must be None.*7", {"precision": 7}),
]  # fmt: skip


@implementations
@pytest.mark.parametrize(("error", "match", "change"), [c[1:] for c in SCALED],
                         ids=[c[0] for c in SCALED])  # fmt: skip
def test_scaled_matmul(error, match, change, implementation):
    arguments = {"lhs": LHS, "rhs": RHS, **SCALES, "implementation": implementation} | change
    with pytest.raises(error, match=match):
        scaled_matmul(**arguments)


@pytest.mark.parametrize("f", [fp8_dense, fp8_dense_float, scaled_matmul, quantize_input])
def test_unknown_implementation(f):
    args = {
        fp8_dense: (X, KERNEL),
        fp8_dense_float: (X, W),
        scaled_matmul: (LHS, RHS, 1.0, 1.0),
        quantize_input: (X,),
    }[f]
    with pytest.raises(ValueError, match=r"`implementation` must be None, .*, but it is 'triton'"):
        f(*args, implementation="triton")


def test_an_error_under_jit_and_vmap_is_the_same():
    for f in (jax.jit(fp8_dense), jax.vmap(fp8_dense, in_axes=(0, None))):
        with pytest.raises(ValueError, match=r"`x` must have 33 features"):
            f(np.ones((2, 4, 34), np.float32), KERNEL)


PRECISIONS = [
    ("default", False),
    ("fastest", False),
    ("high", True),
    ("highest", True),
    ("bfloat16", False),
    ("float32", True),
    (jax.lax.Precision.DEFAULT, False),
    (jax.lax.Precision.HIGH, True),
    (jax.lax.Precision.HIGHEST, True),
    (DotAlgorithmPreset.ANY_F8_ANY_F8_F32, True),
    (DotAlgorithmPreset.ANY_F8_ANY_F8_F32_FAST_ACCUM, False),
    ("ANY_F8_ANY_F8_F32", True),
    ("ANY_F8_ANY_F8_F32_FAST_ACCUM", False),
    (("default", "highest"), True),
    ([jax.lax.Precision.DEFAULT, None], False),
]


@pytest.mark.parametrize(("precision", "promoted"), PRECISIONS, ids=str)
def test_what_a_precision_means(precision, promoted):
    assert is_promoted(precision) is promoted
    # Every entry point takes it.
    fp8_dense(X, KERNEL, precision=precision)
    fp8_dense_float(X, W, precision=precision)
    scaled_matmul(LHS, RHS, 1.0, 1.0, precision=precision)


def test_no_precision_follows_the_configuration():
    assert not is_promoted(None)
    for name, promoted in (("default", False), ("high", True), ("ANY_F8_ANY_F8_F32", True)):
        with jax.default_matmul_precision(name):
            assert is_promoted(None) is promoted
    message = (
        r"`jax_default_matmul_precision`, which `precision=None` follows, must be .*BF16_BF16_F32.*"
        r"Give the layer a `precision` of its own\."
    )
    with jax.default_matmul_precision("BF16_BF16_F32"), pytest.raises(ValueError, match=message):
        fp8_dense(X, KERNEL)
