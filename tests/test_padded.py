"""PaddedKernel: the layout, the padding, the logical size that travels, and what is refused."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfp8.padded import (
    DenseWeight,
    FP8Weight,
    PaddedKernel,
    check_kernel,
    check_layout,
    padded_size,
)
from jaxfp8.quantize import FP8_DTYPE, INV_FP8_MAX


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sizes(kernel: PaddedKernel) -> tuple[int, int]:
    return kernel.in_features, kernel.out_features


def assert_same_bits(a: PaddedKernel, b: PaddedKernel) -> None:
    assert sizes(a) == sizes(b)
    np.testing.assert_array_equal(
        np.asarray(a.qvalue).view(np.uint8), np.asarray(b.qvalue).view(np.uint8)
    )
    np.testing.assert_array_equal(
        np.asarray(a.scale).view(np.uint32), np.asarray(b.scale).view(np.uint32)
    )


def assert_padding_holds(kernel: PaddedKernel) -> None:
    """Invariant 1: outside the logical size, qvalue is +0 and the scale is 1."""
    k, n = sizes(kernel)
    codes = np.asarray(kernel.qvalue).view(np.uint8)
    assert not codes[..., n:, :].any() and not codes[..., :, k:].any()
    if kernel.per_channel:
        np.testing.assert_array_equal(np.asarray(kernel.scale)[..., n:], 1.0)


def test_padded_size():
    known = {1: 16, 15: 16, 16: 16, 17: 32, 3420: 3424, 6840: 6848, 30522: 30528, 10: 16}
    assert {size: padded_size(size) for size in known} == known


@pytest.mark.parametrize(("k", "n"), [(64, 100), (100, 10), (16, 32), (1, 1), (33, 33)])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("stack", [(), (2, 3)])
def test_from_dense_layout_and_values(k, n, per_channel, stack):
    w = weight(*stack, k, n)
    kernel = PaddedKernel.from_dense(w, per_channel=per_channel)
    assert (kernel.qvalue.dtype, kernel.scale.dtype) == (FP8_DTYPE, jnp.float32)
    assert kernel.qvalue.shape == (*stack, padded_size(n), padded_size(k))
    assert kernel.scale.shape == ((*stack, padded_size(n)) if per_channel else stack)
    assert (sizes(kernel), kernel.stack, kernel.per_channel) == ((k, n), stack, per_channel)
    assert_padding_holds(kernel)
    check_kernel(kernel, "kernel")

    amax = np.abs(w).max(axis=-2 if per_channel else (-2, -1))
    scale = np.asarray(kernel.scale)[..., :n] if per_channel else np.asarray(kernel.scale)
    np.testing.assert_array_equal(scale, amax * INV_FP8_MAX)
    deq = kernel.dequantize()
    assert (deq.shape, deq.dtype) == (w.shape, jnp.float32)
    step = scale[..., None, :] if per_channel else scale[..., None, None]
    # Half a step: 1/17 of a normal e4m3 value, 2^-10 of the scale for a subnormal one.
    bound = np.maximum(np.abs(w) / 17, 2.0**-10 * step) * (1 + 2.0**-20)
    assert (np.abs(np.asarray(deq) - w) <= bound).all()


@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 80), n=st.integers(1, 80), seed=st.integers(0, 2**32), per=st.booleans())
def test_any_size_pads_quantizes_and_dequantizes(k, n, seed, per):
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=(k, n)) * 10.0 ** rng.uniform(-6, 6, size=n)).astype(np.float32)
    # Only numpy from here on: a device operation would compile once for each size.
    kernel = jax.device_get(_from_dense(w, per))
    assert kernel.qvalue.shape == (padded_size(n), padded_size(k))
    assert_padding_holds(kernel)
    scale = kernel.scale[:n] if per else kernel.scale
    deq = (kernel.qvalue[:n, :k].astype(np.float32) * np.asarray(scale)[..., None]).T
    bound = np.maximum(np.abs(w) / 17, 2.0**-10 * scale) * (1 + 2.0**-20)
    assert (np.abs(deq - w) <= bound).all()
    np.testing.assert_array_equal(deq, np.asarray(_dequantize(kernel)))


_from_dense = jax.jit(lambda w, per: PaddedKernel.from_dense(w, per_channel=per), static_argnums=1)
_dequantize = jax.jit(PaddedKernel.dequantize)


@pytest.mark.parametrize("per_channel", [True, False])
def test_requantizing_keeps_every_code(per_channel):
    # The largest value was exactly 448 scales, so the second scale is the first up to the rounding
    # of 448 * scale / 448; with an unaligned N, where vLLM's second pass took the padded width for
    # the logical one (#43261).
    once = PaddedKernel.from_dense(weight(100, 10), per_channel=per_channel)
    twice = PaddedKernel.from_dense(once.dequantize(), per_channel=per_channel)
    np.testing.assert_array_equal(np.asarray(once.qvalue), np.asarray(twice.qvalue))
    np.testing.assert_allclose(once.scale, twice.scale, rtol=2**-22)
    assert_padding_holds(twice)


def test_jit_and_eager_build_the_same_bits():
    w = weight(33, 50)
    assert_same_bits(PaddedKernel.from_dense(w), _from_dense(w, True))


def test_vmap_is_the_stack():
    w = weight(4, 33, 50)
    mapped = jax.vmap(PaddedKernel.from_dense)(w)
    assert mapped.stack == (4,)
    assert_same_bits(mapped, PaddedKernel.from_dense(w))
    np.testing.assert_array_equal(jax.vmap(PaddedKernel.dequantize)(mapped), mapped.dequantize())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_weights_equal_their_float32_selves(dtype):
    w = jnp.asarray(weight(20, 18)).astype(dtype)
    assert_same_bits(PaddedKernel.from_dense(w), PaddedKernel.from_dense(w.astype(jnp.float32)))


@pytest.mark.parametrize(
    "carry",
    [
        copy.copy,
        copy.deepcopy,
        lambda tree: pickle.loads(pickle.dumps(tree)),
        jax.device_put,
        jax.device_get,
        lambda tree: jax.device_put(tree, jax.devices()[0]),
        lambda tree: jax.tree.map(lambda leaf: leaf, tree),
        lambda tree: jax.jit(lambda t: t)(tree),
        lambda tree: jax.tree.unflatten(*reversed(jax.tree.flatten(tree))),
    ],
    ids=["copy", "deepcopy", "pickle", "put", "get", "put on", "map", "jit", "unflatten"],
)
def test_the_sizes_travel(carry):
    tree = {"layer": {"kernel": PaddedKernel.from_dense(weight(18, 20)), "bias": np.ones(20)}}
    out = carry(tree)["layer"]["kernel"]
    assert isinstance(out, PaddedKernel)
    assert_same_bits(out, tree["layer"]["kernel"])


@pytest.mark.parametrize(
    "held",
    [
        DenseWeight(weight(4, 6), "out_in"),
        FP8Weight(jnp.ones((4, 6), FP8_DTYPE), jnp.ones(()), "out_in"),
    ],
    ids=["DenseWeight", "FP8Weight"],
)
def test_layouts_travel(held):
    mapped = jax.tree.map(lambda a: a, held)
    for out in (
        copy.deepcopy(held),
        pickle.loads(pickle.dumps(held)),
        jax.device_put(held),
        mapped,
    ):
        assert type(out) is type(held) and out.layout == "out_in"
        np.testing.assert_array_equal(np.asarray(out.value), np.asarray(held.value))


def test_any_object_may_be_a_leaf():
    kernel = PaddedKernel.from_dense(weight(18, 20))
    shapes = jax.tree.map(lambda leaf: leaf.shape, kernel)
    assert (shapes.qvalue, shapes.scale) == ((32, 32), (32,))
    mask = jax.tree.map(lambda leaf: True, kernel)
    assert mask.qvalue is True and sizes(mask) == (18, 20)
    abstract = jax.eval_shape(PaddedKernel.from_dense, jax.ShapeDtypeStruct((18, 20), jnp.bfloat16))
    assert abstract.qvalue == jax.ShapeDtypeStruct((32, 32), FP8_DTYPE)
    assert sizes(abstract) == (18, 20) and abstract.per_channel
    check_kernel(abstract, "kernel")


def test_other_logical_sizes_are_another_tree():
    # 18 and 20 both pad to 32: only the structure tells these two apart.
    a, b = (PaddedKernel.from_dense(weight(*s)) for s in ((18, 20), (20, 18)))
    assert jax.tree.structure(a) != jax.tree.structure(b)
    with pytest.raises(ValueError, match="18, 20"):
        jax.tree.map(jnp.add, a, b)
    keys = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(a)]
    assert keys == [".qvalue_18x20", ".scale_18x20"]


@pytest.mark.parametrize("dtype", ["int32", "complex64", "float8_e4m3fn", "bool"])
def test_from_dense_refuses_other_dtypes(dtype):
    with pytest.raises(TypeError, match=f"`w` must be a real float.*{dtype}"):
        PaddedKernel.from_dense(jnp.ones((4, 4), dtype))


@pytest.mark.parametrize("shape", [(), (4,), (0, 4), (4, 0), (2, 0, 4)])
def test_from_dense_refuses_ranks_and_empty_features(shape):
    with pytest.raises(ValueError, match=r"`w` must have shape \[\*stack, in_features"):
        PaddedKernel.from_dense(jnp.ones(shape))


def test_a_cast_over_the_tree_is_found():
    kernel = PaddedKernel.from_dense(weight(18, 20))
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), {"kernel": kernel})["kernel"]
    with pytest.raises(TypeError, match="they are bfloat16 and bfloat16.*A cast over the whole"):
        cast.dequantize()
    with pytest.raises(TypeError, match="must be a PaddedKernel, but it is ndarray"):
        check_kernel(weight(18, 20), "kernel")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda k: PaddedKernel(k.qvalue, k.scale, 40, 20),
        lambda k: PaddedKernel(k.qvalue, k.scale, 18, 40),
        lambda k: PaddedKernel(k.qvalue[:20, :18], k.scale, 18, 20),
        lambda k: PaddedKernel(k.qvalue, k.scale[:20], 18, 20),
        lambda k: PaddedKernel(k.qvalue, k.scale[:, None], 18, 20),
        lambda k: PaddedKernel(k.qvalue[None], k.scale, 18, 20),
    ],
    ids=["K", "N", "logical qvalue", "logical scale", "column scale", "stack"],
)
def test_shapes_that_do_not_follow_from_the_sizes_are_refused(wrong):
    kernel = wrong(PaddedKernel.from_dense(weight(18, 20)))
    with pytest.raises(ValueError, match="`kernel` has in_features=.*Build kernels with"):
        check_kernel(kernel, "kernel")


def test_layout_names():
    check_layout("in_out", "w")
    check_layout("out_in", "w")
    with pytest.raises(ValueError, match="`layout` of `w` must be 'in_out'.*but it is 'io'"):
        check_layout("io", "w")
