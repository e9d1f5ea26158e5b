"""What an update refuses for one leaf: the sentence, and nothing has changed."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from update_cases import assert_same_bits, served_tree, trainer_tree, weight

from jaxfp8.padded import DenseWeight, FP8Weight, PaddedKernel
from jaxfp8.quantize import FP8_DTYPE, quantize
from jaxfp8.update import reload_params, update_params


K, N = 18, 20
E4M3 = jnp.ones((K, N), FP8_DTYPE)


def refuse(error, pattern, params, loaded, **options):
    """Both functions raise the error, and `params` lives and is as before."""
    copy = jax.tree.map(jnp.copy, params)
    for function in (update_params, reload_params):
        with pytest.raises(error, match=pattern) as caught:
            function(params, loaded, **options)
        assert "nothing has been changed" in str(caught.value)
        assert_same_bits(params, copy)


def kernel(stack=(), *, per_channel=True) -> dict:
    return {"d": {"kernel": PaddedKernel.from_dense(weight(*stack, K, N), per_channel=per_channel)}}


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((K, N + 1), "same sizes"),
        ((K - 1, N), "same sizes"),
        ((17, 19), "same sizes"),  # Pads to (32, 32), as (18, 20) does.
        ((N, N), "same sizes"),
        ((N, K), r'transposed weight fits.*layout="out_in"'),
        ((32, 32), "padded size: pass the weight in its logical size"),
        ((K,), "must have 2 axes"),
        ((1, K, N), "must have 2 axes"),
        ((), "must have 2 axes"),
        ((0, N), "same sizes"),
    ],
)
def test_wrong_shapes(shape, hint):
    expected = rf"d/kernel: its shape is {tuple(shape)!r}.*".replace("(", r"\(").replace(")", r"\)")
    params = kernel()
    for make in (np.zeros, lambda s: DenseWeight(jnp.zeros(s)), lambda s: DenseWeight(np.zeros(s))):
        refuse(ValueError, expected, params, {"d": {"kernel": make(shape)}})
        refuse(ValueError, hint, params, {"d": {"kernel": make(shape)}})


def test_the_expected_shape_is_named_in_the_declared_layout():
    refuse(
        ValueError,
        r"takes \[in_features, out_features\] = \(18, 20\)",
        kernel(),
        {"d": {"kernel": np.zeros((3, 4))}},
    )
    refuse(
        ValueError,
        r'takes \[out_features, in_features\] = \(20, 18\)\. .*fits.*layout="in_out"',
        kernel(),
        {"d": {"kernel": DenseWeight(np.zeros((K, N)), "out_in")}},
    )
    refuse(
        ValueError,
        r"takes \[\*stack, in_features, out_features\] = \(2, 3, 18, 20\)",
        kernel((2, 3)),
        {"d": {"kernel": np.zeros((3, 2, K, N))}},
    )
    refuse(
        ValueError,
        r"must have 4 axes: 2 of the stack",
        kernel((2, 3)),
        {"d": {"kernel": np.zeros((K, N))}},
    )
    refuse(
        ValueError,
        r"its shape is \(20, 18\)",
        kernel(),
        {"d": {"kernel": FP8Weight(E4M3.T, np.ones(N, np.float32))}},
    )


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (np.zeros((K, N), np.int32), "int32, but it must be a real float"),
        (np.zeros((K, N), np.int8), "int8, but it must be a real float"),
        (np.zeros((K, N), bool), "bool, but it must be a real float"),
        (np.zeros((K, N), np.complex64), "complex64, but it must be a real float"),
        (np.zeros((K, N), "U3"), "but it must be a real float"),
        (E4M3, r"float8_e4m3fn without a scale.*FP8Weight\(value, scale\)"),
        (np.zeros((K, N), ml_dtypes.float8_e5m2), "float8_e5m2 without a scale"),
        (DenseWeight(E4M3), "float8_e4m3fn without a scale"),
        ("weights.npz", "is a str, not an array"),
        (jax.ShapeDtypeStruct((K, N), jnp.float32), "abstract .* holds no values"),
        (FP8Weight(np.zeros((K, N), np.float32), 1.0), "`value` of the FP8Weight is float32"),
        (FP8Weight(np.zeros((K, N), ml_dtypes.float8_e5m2), 1.0), "FP8Weight is float8_e5m2"),
        (FP8Weight(np.zeros((K, N), ml_dtypes.float8_e4m3fnuz), 1.0), "is float8_e4m3fnuz"),
        (FP8Weight(E4M3, 1), "`scale` of the FP8Weight is int32"),
        (FP8Weight(E4M3, np.ones(N, FP8_DTYPE)), "`scale` of the FP8Weight is float8_e4m3fn"),
        (FP8Weight(E4M3, "1.0"), "`scale` of the FP8Weight is a str"),
        (PaddedKernel(np.zeros((32, 32)), np.ones(32), K, N), "tree.map"),
    ],
)
def test_wrong_types(value, pattern):
    refuse(TypeError, rf"(?s)d/kernel: .*{pattern}", kernel(), {"d": {"kernel": value}})


@pytest.mark.parametrize("layout", ["", "oi", None, "OUT_IN"])
def test_unknown_layouts(layout):
    for value in (DenseWeight(weight(K, N), layout), FP8Weight(E4M3, np.float32(1), layout)):
        refuse(ValueError, r"layout.*'in_out'.*'out_in'", kernel(), {"d": {"kernel": value}})
    params = {"plain": jnp.zeros((K, N))}
    refuse(ValueError, r"layout.*'in_out'", params, {"plain": DenseWeight(weight(K, N), layout)})


@pytest.mark.parametrize(
    ("stack", "shape", "hint"),
    [
        ((), (N, 1), r"scale\.reshape\(\(20,\)\)"),
        ((), (1, N), r"scale\.reshape\(\(20,\)\)"),
        ((), (1,), r"scale\.reshape\(\(\)\)"),
        ((), (1, 1), r"scale\.reshape\(\(\)\)"),
        ((), (K,), "Block-wise"),
        ((), (32,), "without padding"),
        ((), (2, 3), "Block-wise"),
        ((2,), (2, 1), r"scale\.reshape\(\(2,\)\)"),
        ((2,), (N,), "Block-wise"),
        ((2,), (2, N, 1), r"scale\.reshape\(\(2, 20\)\)"),
        ((2,), (3,), "Block-wise"),
    ],
)
def test_scales_of_the_wrong_shape(stack, shape, hint):
    value = FP8Weight(jnp.ones((*stack, K, N), FP8_DTYPE), np.ones(shape, np.float32))
    refuse(
        ValueError,
        rf"`scale` of the FP8Weight has shape.*{hint}",
        kernel(stack),
        {"d": {"kernel": value}},
    )


def test_per_channel_into_per_tensor_is_refused():
    params = kernel(per_channel=False)
    value, scale = quantize(weight(K, N), axis=0, keepdims=False)
    pattern = "its scale is per channel, but this kernel has one scale per tensor.*dequantized"
    refuse(ValueError, pattern, params, {"d": {"kernel": FP8Weight(value, scale)}})
    refuse(ValueError, pattern, params, kernel())


@pytest.mark.parametrize("size", [(18, 19), (17, 20), (20, 18), (32, 32)])
def test_a_padded_kernel_of_another_logical_size(size):
    """All of them have the same padded shapes."""
    loaded = {"d": {"kernel": PaddedKernel.from_dense(weight(*size))}}
    pattern = rf"in_features={size[0]}, out_features={size[1]}.*in_features=18, out_features=20"
    refuse(ValueError, pattern, kernel(), loaded)


def test_a_padded_kernel_of_another_stack():
    refuse(ValueError, r"stack \(2,\), but .* stack \(3,\)", kernel((3,)), kernel((2,)))


@pytest.mark.parametrize(
    ("target", "value", "error", "pattern"),
    [
        (jnp.zeros(3), np.zeros(4), ValueError, r"its shape is \(4,\).*has shape \(3,\)"),
        (jnp.zeros(3), np.zeros((1, 3)), ValueError, r"shape is \(1, 3\)"),
        (jnp.zeros(3), np.zeros(()), ValueError, r"shape is \(\)"),
        (jnp.zeros(3), DenseWeight(np.zeros(4), "out_in"), ValueError, r"shape is \(4,\)"),
        (jnp.zeros((3, 4)), DenseWeight(np.zeros((3, 4)), "out_in"), ValueError, "'out_in'"),
        (jnp.zeros(3), np.zeros(3, np.int32), TypeError, "int32, but it must be a real float"),
        (jnp.zeros(3), np.zeros(3, np.complex64), TypeError, "complex64"),
        (jnp.zeros(3), jnp.zeros(3, FP8_DTYPE), TypeError, "without a scale"),
        (jnp.zeros(3, FP8_DTYPE), np.zeros(3, np.float32), TypeError, "Only floats are cast"),
        (jnp.zeros(3, jnp.int32), np.zeros(3, np.int16), TypeError, "int16.*is int32"),
        (jnp.zeros(3, jnp.int32), np.zeros(3, np.float32), TypeError, "float32.*is int32"),
        (jnp.zeros(3, bool), np.zeros(3, np.int8), TypeError, "int8.*is bool"),
        (jnp.zeros(3), jax.random.key(0), TypeError, r"key.*key_data"),
        (jnp.zeros((K, N)), FP8Weight(E4M3, 1.0), TypeError, "it is a FP8Weight.*param_dtype"),
        (
            jnp.zeros((K, N)),
            PaddedKernel.from_dense(weight(K, N)),
            TypeError,
            "it is a PaddedKernel.*dequantize_params",
        ),
    ],
)
def test_leaves_that_are_not_ours(target, value, error, pattern):
    refuse(
        error,
        rf"(?s)norm/scale: .*{pattern}",
        {"norm": {"scale": target}},
        {"norm": {"scale": value}},
    )


def test_params_cast_by_tree_map():
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), served_tree())
    refuse(TypeError, r"Dense_0/kernel: .*bfloat16.*tree\.map", cast, trainer_tree())


def test_params_that_are_not_arrays():
    loaded = kernel()
    mask = jax.tree.map(lambda a: False, loaded)
    for function in (update_params, reload_params):
        with pytest.raises(TypeError, match="d/kernel: the parameter in `params` is a bool"):
            function(mask, loaded)


def test_reload_needs_arrays_that_it_can_overwrite():
    loaded = trainer_tree()
    with pytest.raises(TypeError, match="Dense_0/bias of `params` is a ShapeDtypeStruct"):
        reload_params(jax.eval_shape(served_tree), loaded)
    with pytest.raises(TypeError, match="Dense_0/bias of `params` is a ndarray.*device_put"):
        reload_params(jax.tree.map(np.asarray, served_tree()), loaded)
    with pytest.raises(TypeError, match="Dense_0/bias of `params` is traced.*`update_params`"):
        jax.jit(reload_params)(served_tree(), loaded)


def test_reload_with_traced_weights():
    params = served_tree()
    copy = jax.tree.map(jnp.copy, params)
    with pytest.raises(TypeError, match=r"`update_params`"):
        jax.jit(lambda loaded: reload_params(params, loaded))(trainer_tree())
    with pytest.raises(TypeError, match=r"`update_params`"):
        jax.jit(lambda: reload_params(params, trainer_tree()))()
    assert_same_bits(params, copy)
