"""The handlers refuse what Python did not catch, naming shapes and the kernel; nothing crashes."""

import direct_calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp8 import PaddedKernel
from jaxfp8.quantize import FP8_DTYPE


pytestmark = pytest.mark.gpu
M, N, K = 4, 64, 48
LHS, RHS = jnp.ones((M, K), FP8_DTYPE), jnp.ones((N, K), FP8_DTYPE)
X = jnp.ones((M, 33), jnp.bfloat16)
KERNEL = PaddedKernel.from_dense(np.ones((33, 50), np.float32))
ONE = np.float32(1)
matmul, dense = direct_calls.matmul, direct_calls.dense

MATMUL = [
    ("kernel", r"there is no kernel 999; M=4 N=64 K=48", {"kernel": 999}),
    ("activation", r"there is no activation 9; M=4 N=64 K=48 pitch=64 kernel=fast_\w+",
     {"activation": 9}),
    ("negative activation", r"there is no activation -1; M=4 N=64", {"activation": -1}),
    ("K", r"K must be a multiple of 16; M=4 N=64 K=33 .*kernel=fast_\w+",
     {"lhs": LHS[:, :33], "rhs": RHS[:, :33]}),
    ("K of promoted", r"K must be a multiple of 16; .*kernel=promoted_\w+",
     {"lhs": LHS[:, :33], "rhs": RHS[:, :33], "promoted": True}),
    ("widths", r"shapes do not fit: lhs F8E4M3FN\[4,48\], .*qvalue F8E4M3FN\[64,32\]",
     {"rhs": RHS[:, :32]}),
    ("per-token of another M", r"shapes do not fit: .*lhs_scale F32\[5,1\]",
     {"lhs_scale": np.ones((5, 1), np.float32)}),
    ("flat per-token", r"shapes do not fit: .*lhs_scale F32\[4\]",
     {"lhs_scale": np.ones(4, np.float32)}),
    ("per-channel of another N", r"shapes do not fit: .*, scale F32\[63\]",
     {"rhs_scale": np.ones(63, np.float32)}),
    ("half scale", r"shapes do not fit: .*, scale F16\[64\]",
     {"rhs_scale": np.ones(64, np.float16)}),
    ("bias", r"shapes do not fit: .*bias F32\[50\]", {"bias": np.ones(50, np.float32)}),
    ("bf16 lhs", r"must be F8E4M3FN matrices.*got BF16\[4,48\], F8E4M3FN\[64,48\]",
     {"lhs": LHS.astype(jnp.bfloat16)}),
    ("rank", r"must be F8E4M3FN matrices.*got F8E4M3FN\[4,48\], F8E4M3FN\[1,64,48\]",
     {"rhs": RHS[None], "out_features": 64}),
    ("result of another width", r"shapes do not fit: .*out_features 50, out BF16\[4,64\]",
     {"out_features": 50, "width": 64}),
    ("fp8 without its scale", r"shapes do not fit: .*out_scale F32\[0\], .*out F8E4M3FN\[4,64\]",
     {"out_dtype": FP8_DTYPE}),
    ("fp8 with scales", r"shapes do not fit: .*out_scale F32\[1\], .*out F8E4M3FN\[4,64\]",
     {"out_dtype": FP8_DTYPE, "out_scale": np.ones(1, np.float32)}),
    ("fp8 of logical width", r"shapes do not fit: .*out_features 50, out F8E4M3FN\[4,50\]",
     {"out_dtype": FP8_DTYPE, "out_scale": ONE, "out_features": 50, "width": 50}),
    ("fp8 of a weight that is not padded", r"shapes do not fit: .*out F8E4M3FN\[4,60\]",
     {"out_dtype": FP8_DTYPE, "out_scale": ONE, "rhs": RHS[:60],
      "rhs_scale": np.ones(60, np.float32)}),
    ("float with a scale", r"shapes do not fit: .*out_scale F32\[\], .*out BF16\[4,64\]",
     {"out_scale": ONE}),
    ("residual of another type", r"shapes do not fit: .*residual F32\[4,64\], .*out BF16\[4,64\]",
     {"residual": np.ones((M, N), np.float32)}),
    ("residual of other rows", r"shapes do not fit: .*residual BF16\[5,64\], .*out BF16\[4,64\]",
     {"residual": jnp.ones((5, N), jnp.bfloat16)}),
    ("residual of another width", r"shapes do not fit: .*residual BF16\[4,48\]",
     {"residual": jnp.ones((M, 48), jnp.bfloat16)}),
    ("one row of residual", r"shapes do not fit: .*residual BF16\[64\]",
     {"residual": jnp.ones(N, jnp.bfloat16)}),
    ("float16 residual", r"shapes do not fit: .*residual F16\[4,64\], .*out BF16\[4,64\]",
     {"residual": jnp.ones((M, N), jnp.float16)}),
    ("float32 residual", r"shapes do not fit: .*residual F32\[4,64\], .*out F32\[4,64\]",
     {"out_dtype": jnp.float32, "residual": np.ones((M, N), np.float32)}),
    ("residual of an fp8 result", r"shapes do not fit: .*residual F8E4M3FN\[4,64\]",
     {"out_dtype": FP8_DTYPE, "out_scale": ONE, "residual": jnp.ones((M, N), FP8_DTYPE)}),
    ("e5m2 result", r"out one of BF16, F16, F32, F8E4M3FN; got .*F8E5M2\[4,64\]",
     {"out_dtype": jnp.float8_e5m2, "width": 64}),
]  # fmt: skip

DENSE = [
    ("kernel", r"there is no kernel 999; M=4 N=50 K=48", {"kernel": 999}),
    ("activation", r"there is no activation 4; M=4 N=50 K=48 pitch=50 kernel=fast_",
     {"activation": 4}),
    ("narrow result", r"shapes do not fit: .*out_features 50, out BF16\[4,48\]", {"width": 48}),
    ("padded result", r"shapes do not fit: .*out BF16\[4,64\]", {"width": 64}),
    ("too many features", r"shapes do not fit: .*out_features 65", {"out_features": 65}),
    ("no features", r"shapes do not fit: .*out_features 0", {"out_features": 0}),
    ("x too wide", r"shapes do not fit: x BF16\[4,49\], .*qvalue F8E4M3FN\[64,48\]",
     {"x": jnp.ones((M, 49), jnp.bfloat16)}),
    ("padded bias", r"shapes do not fit: .*bias F32\[64\]", {"bias": np.ones(64, np.float32)}),
    ("x_scale of rows", r"shapes do not fit: .*x_scale F32\[4\]",
     {"x_scale": np.ones(4, np.float32)}),
    ("logical scale", r"shapes do not fit: .*scale F32\[50\]",
     {"weight": PaddedKernel(KERNEL.qvalue, KERNEL.scale[:50], 33, 50)}),
    ("fp8 x", r"shapes do not fit: x F8E4M3FN\[4,33\]", {"x": X.astype(FP8_DTYPE)}),
    ("int8 result", r"x and out must be matrices of BF16, F16 or F32.*got BF16\[4,33\], S8\[4,50\]",
     {"out_dtype": jnp.int8, "width": 50}),
    ("fp8 without its scale", r"shapes do not fit: .*out_scale F32\[0\], .*out F8E4M3FN\[4,64\]",
     {"out_dtype": FP8_DTYPE}),
    ("fp8 of logical width", r"shapes do not fit: .*out_features 50, out F8E4M3FN\[4,50\]",
     {"out_dtype": FP8_DTYPE, "out_scale": ONE, "width": 50}),
    ("fp8 with scales", r"shapes do not fit: .*out_scale F32\[50\]",
     {"out_dtype": FP8_DTYPE, "out_scale": np.ones(50, np.float32)}),
    ("float with a scale", r"shapes do not fit: .*out_scale F32\[\], .*out BF16\[4,50\]",
     {"out_scale": ONE}),
    ("residual of rows that TMA does not address", r"shapes do not fit: .*residual BF16\[4,50\]",
     {"residual": jnp.ones((M, 50), jnp.bfloat16)}),
    ("bf16 weight", r"qvalue one of F8E4M3FN; got .*BF16\[64,48\]",
     {"weight": PaddedKernel(jnp.ones((64, 48), jnp.bfloat16), KERNEL.scale, 33, 50)}),
]  # fmt: skip


QUANTIZE = [
    ("narrow", r"results its F8E4M3FN padded to 16 .*got BF16\[4,33\], F32\[0\], F8E4M3FN\[4,32\]",
     {"k_pad": 32}),
    ("no multiple of 16", r"padded to 16 .*F8E4M3FN\[4,40\], F32\[4,1\]", {"k_pad": 40}),
    ("logical width", r"padded to 16 .*F8E4M3FN\[4,33\]", {"k_pad": 33}),
    ("fp8 x", r"x must be a BF16, F16 or F32 matrix.*got F8E4M3FN\[4,33\]",
     {"x": X.astype(FP8_DTYPE)}),
    ("x_scale of rows", r"x must be .*got BF16\[4,33\], F32\[4\]",
     {"x_scale": np.ones(4, np.float32)}),
]  # fmt: skip


def ids(table):
    return [row[0] for row in table]


@pytest.mark.parametrize(("name", "match", "change"), MATMUL, ids=ids(MATMUL))
def test_scaled_matmul(name, match, change):
    arguments = {"lhs": LHS, "rhs": RHS, "lhs_scale": ONE, "rhs_scale": ONE}
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=f"(?s)INVALID_ARGUMENT.*jaxfp8: .*{match}"
    ):
        jax.block_until_ready(matmul(**(arguments | change)))
    # A refusal leaves nothing behind.
    y = matmul(**arguments)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.full((M, N), K))


@pytest.mark.parametrize(("name", "match", "change"), DENSE, ids=ids(DENSE))
def test_dense(name, match, change):
    arguments = {"x": X, "weight": KERNEL}
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=f"(?s)INVALID_ARGUMENT.*jaxfp8: .*{match}"
    ):
        jax.block_until_ready(dense(**(arguments | change)))
    y, _, _ = dense(**arguments)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.full((M, 50), 33))


@pytest.mark.parametrize(("name", "match", "change"), QUANTIZE, ids=ids(QUANTIZE))
def test_quantize(name, match, change):
    arguments = {"x": X}
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=f"(?s)INVALID_ARGUMENT.*jaxfp8: .*{match}"
    ):
        jax.block_until_ready(direct_calls.quantize(**(arguments | change)))
    qx, scale = map(np.asarray, direct_calls.quantize(**arguments))
    np.testing.assert_array_equal(qx.astype(np.float32)[:, :33], np.full((M, 33), 448))
    np.testing.assert_array_equal(scale, np.full((M, 1), np.float32(1) / np.float32(448)))


@pytest.mark.parametrize("target", ["matmul", "matmul to fp8", "dense", "dense to fp8", "quantize"])
def test_no_rows_are_fine(target):
    options = dict(out_dtype=FP8_DTYPE, out_scale=ONE) if target.endswith("fp8") else {}
    if target == "quantize":
        y, _ = direct_calls.quantize(X[:0])
    elif target.startswith("matmul"):
        y = matmul(LHS[:0], RHS, ONE, ONE, **options)
    else:
        y, _, _ = dense(X[:0], KERNEL, **options)
    assert np.asarray(y).shape[0] == 0
