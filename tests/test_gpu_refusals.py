"""The handlers refuse what Python did not catch, naming shapes and the kernel; nothing crashes."""

import functools

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
    ("widths", r"shapes do not fit: lhs F8E4M3FN\[4,48\], rhs F8E4M3FN\[64,32\]",
     {"rhs": RHS[:, :32]}),
    ("per-token of another M", r"shapes do not fit: .*lhs_scale F32\[5,1\]",
     {"lhs_scale": np.ones((5, 1), np.float32)}),
    ("flat per-token", r"shapes do not fit: .*lhs_scale F32\[4\]",
     {"lhs_scale": np.ones(4, np.float32)}),
    ("per-channel of another N", r"shapes do not fit: .*rhs_scale F32\[63\]",
     {"rhs_scale": np.ones(63, np.float32)}),
    ("half scale", r"shapes do not fit: .*rhs_scale F16\[64\]",
     {"rhs_scale": np.ones(64, np.float16)}),
    ("bias", r"shapes do not fit: .*bias F32\[50\]", {"bias": np.ones(50, np.float32)}),
    ("bf16 lhs", r"must be F8E4M3FN matrices.*got BF16\[4,48\], F8E4M3FN\[64,48\]",
     {"lhs": LHS.astype(jnp.bfloat16)}),
    ("rank", r"must be F8E4M3FN matrices.*got F8E4M3FN\[4,48\], F8E4M3FN\[1,64,48\]",
     {"rhs": RHS[None]}),
]  # fmt: skip

DENSE = [
    ("kernel", r"there is no kernel 999; M=4 N=50 K=48", {"kernel": 999}),
    ("activation", r"there is no activation 4; M=4 N=50 K=48 pitch=50 kernel=fast_",
     {"activation": 4}),
    ("narrow result", r"shapes do not fit: .*out_features 50, out BF16\[4,48\]", {"width": 48}),
    ("padded result", r"shapes do not fit: .*out BF16\[4,64\]", {"width": 64}),
    ("too many features", r"shapes do not fit: .*out_features 65", {"out_features": 65}),
    ("no features", r"shapes do not fit: .*out_features 0", {"out_features": 0}),
    ("x too wide", r"shapes do not fit: x BF16\[4,49\], qvalue F8E4M3FN\[64,48\]",
     {"x": jnp.ones((M, 49), jnp.bfloat16)}),
    ("padded bias", r"shapes do not fit: .*bias F32\[64\]", {"bias": np.ones(64, np.float32)}),
    ("x_scale of rows", r"shapes do not fit: .*x_scale F32\[4\]",
     {"x_scale": np.ones(4, np.float32)}),
    ("logical scale", r"shapes do not fit: .*scale F32\[50\]",
     {"weight": PaddedKernel(KERNEL.qvalue, KERNEL.scale[:50], 33, 50)}),
    ("fp8 x", r"x and out must be BF16, F16 or F32 matrices.*got F8E4M3FN\[4,33\]",
     {"x": X.astype(FP8_DTYPE)}),
    ("bf16 weight", r"qvalue one of F8E4M3FN; got .*BF16\[64,48\]",
     {"weight": PaddedKernel(jnp.ones((64, 48), jnp.bfloat16), KERNEL.scale, 33, 50)}),
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


def test_another_result_dtype_is_refused():
    f = functools.partial(matmul, LHS, RHS, ONE, ONE, out_dtype=jnp.float8_e4m3fn)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"jaxfp8: .*out one of BF16, F16, F32"):
        jax.block_until_ready(f())


@pytest.mark.parametrize("target", ["matmul", "dense"])
def test_no_rows_are_fine(target):
    if target == "matmul":
        y = matmul(LHS[:0], RHS, ONE, ONE)
    else:
        y, _, _ = dense(X[:0], KERNEL)
    assert np.asarray(y).shape[0] == 0
