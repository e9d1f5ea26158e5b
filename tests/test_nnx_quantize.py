"""quantize_linears: the layers of an existing NNX model, chosen by filter, in FP8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_cases import Net, inputs
from update_cases import assert_same_bits, weight

from jaxfp8 import PaddedKernel, update_params
from jaxfp8.nnx import (
    WEIGHTS,
    ActivationScale,
    FP8Param,
    PaddedFP8Linear,
    quantize_linears,
    quantized_paths,
    reload_model,
)


ALL = ("layers/0/down", "layers/0/up", "layers/1/down", "layers/1/up")
UP = ("layers/0/up", "layers/1/up")


@pytest.mark.parametrize(
    ("select", "paths"),
    [
        ("*", ALL),
        (..., ALL),
        (nnx.Linear, ALL),
        ("layers", ALL),
        ("layers/1", ALL[2:]),
        ("layers/*/up", UP),
        (["layers/0/up", "layers/1/u?"], UP),
        (lambda path, layer: path[-1] == "up", UP),
        (lambda path, layer: layer.out_features == 30, UP),
        (nnx.All(nnx.Linear, nnx.Not(nnx.PathContains("down"))), UP),
        (("layers/0/up", nnx.PathContains("down")), ALL[:3]),
    ],
)
def test_selects_by_pattern_and_filter(select, paths):
    assert quantized_paths(quantize_linears(Net(), select)) == paths


def test_converts_the_selected_and_leaves_the_rest():
    model, x = Net(), inputs(3, 20)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    result = model(x)
    new = quantize_linears(model, "layers/*/up")
    assert type(new) is Net and quantized_paths(model) == ()
    for old, block in zip(model.layers, new.layers, strict=True):
        want = PaddedKernel.from_dense(old.up.kernel[...])
        assert_same_bits(block.up.kernel.get_value(), want)
        assert_same_bits(block.up.bias[...], old.up.bias[...])
        assert type(block.down) is nnx.Linear
    old = dict(nnx.to_flat_state(nnx.state(model)))
    for path, variable in nnx.to_flat_state(nnx.state(new)):
        if "kernel" not in path or "down" in path:
            if "key" not in path:
                assert_same_bits(variable, old[path])
    # The model is as it was, and shares nothing that a donation could take from it.
    held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(model, WEIGHTS))}
    news = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(new, WEIGHTS))}
    assert not held & news
    reload_model(new, Net(seed=1))
    for leaf in jax.tree.leaves(nnx.state(new)):
        leaf.delete()
    assert_same_bits(model(x), result)
    assert_same_bits(nnx.state(model, WEIGHTS), nnx.filter_state(before, WEIGHTS))


def test_the_copy_gives_what_a_model_built_of_our_layers_gives():
    def linear(*sizes, rngs):
        return PaddedFP8Linear(*sizes, static_x_scale=True, per_channel=False, rngs=rngs)

    x = inputs(3, 20)
    copy = quantize_linears(Net(seed=4), ..., static_x_scale=True, per_channel=False)
    assert_same_bits(copy(x), Net(linear, seed=4)(x))
    assert len(nnx.to_flat_state(nnx.state(copy, ActivationScale))) == 4


def test_layers_that_train_in_fp8():
    model = quantize_linears(Net(), "*", param_dtype=jnp.bfloat16)
    layer = model.layers[0].up
    assert type(layer) is PaddedFP8Linear and type(layer.kernel) is nnx.Param
    assert layer.kernel.dtype == layer.bias.dtype == jnp.bfloat16
    assert quantized_paths(model) == ()
    grads = nnx.grad(lambda m, x: m(x).sum())(model, inputs(3, 20))
    assert "kernel" in grads["layers"][0]["up"]


def test_an_abstract_model_needs_no_float_weights():
    abstract = nnx.eval_shape(Net)
    copy = quantize_linears(abstract, "layers/*/down", static_x_scale=True)
    kernel = copy.layers[0].down.kernel.get_value()
    assert isinstance(kernel.qvalue, jax.ShapeDtypeStruct)
    trainer = Net(seed=2)
    loaded = nnx.to_pure_dict(nnx.state(trainer, WEIGHTS))
    loaded["layers"][0]["down"]["x_scale"] = loaded["layers"][1]["down"]["x_scale"] = weight() ** 2
    nnx.update(copy, update_params(nnx.state(copy, WEIGHTS), loaded))
    assert_same_bits(
        nnx.state(copy, FP8Param), nnx.state(quantize_linears(trainer, "layers/*/down"), FP8Param)
    )


def test_under_eval_shape_and_jit():
    def make():
        return quantize_linears(Net(), "*")

    abstract = nnx.eval_shape(make)
    concrete = nnx.jit(make)()
    assert quantized_paths(abstract) == quantized_paths(concrete) == ALL
    assert_same_bits(nnx.state(concrete, FP8Param), nnx.state(make(), FP8Param))


class Tied(nnx.Module):
    """One layer in two places, and two layers of one weight."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a = nnx.Linear(20, 20, rngs=rngs)
        self.b = nnx.List([self.a, nnx.Linear(20, 20, rngs=rngs)])
        self.c = nnx.Linear(20, 20, rngs=rngs)
        self.c.kernel = self.b[1].kernel


def test_shared_layers_and_weights_are_converted_once_and_stay_shared():
    new = quantize_linears(Tied(), "*")
    assert quantized_paths(new) == ("a", "b/1", "c")
    assert new.a is new.b[0] and type(new.a) is PaddedFP8Linear
    assert new.c.kernel is new.b[1].kernel and new.c.bias is not new.b[1].bias
    assert len(nnx.to_flat_state(nnx.state(new, FP8Param))) == 2


def test_a_weight_shared_with_a_layer_that_stays_is_refused():
    with pytest.raises(ValueError, match="b/1/kernel: it is also c/kernel, which would stay"):
        quantize_linears(Tied(), "b")


def test_a_stack_of_layers():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def make(rngs):
        metadata = {"out_sharding": ("in", "out"), "eager_sharding": False}
        return nnx.Linear(20, 30, kernel_metadata=metadata, rngs=rngs)

    model = nnx.Dict(stack=make(nnx.Rngs(0)))
    new = quantize_linears(model, "*", static_x_scale=True)
    kernel = new["stack"].kernel
    assert_same_bits(kernel.get_value(), PaddedKernel.from_dense(model["stack"].kernel[...]))
    assert kernel.get_metadata("out_sharding") == ("layers", "out", "in")
    assert new["stack"].x_scale.shape == (3,)
    got = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(new["stack"], inputs(2, 20))
    want = jax.vmap(lambda w: inputs(2, 20) @ w)(model["stack"].kernel[...])
    assert got.shape == want.shape
    # x is rounded by the scale 1 and w by its own, 2^-4 each.
    assert np.linalg.norm(got - want) <= 2**-4 * np.linalg.norm(want)


def test_keeps_dtype_precision_and_structure_of_containers():
    model = nnx.Dict(
        half=nnx.Linear(20, 30, dtype=jnp.bfloat16, precision="highest", rngs=nnx.Rngs(0)),
        bare=nnx.Linear(20, 30, use_bias=False, rngs=nnx.Rngs(0)),
        seq=nnx.Sequential(nnx.Linear(20, 30, rngs=nnx.Rngs(0)), nnx.relu),
    )
    new = quantize_linears(model, ...)
    assert quantized_paths(new) == ("bare", "half", "seq/layers/0")
    assert new["half"].precision == "highest"
    assert new["half"](inputs(2, 20)).dtype == jnp.bfloat16
    assert new["bare"].bias is None and new["seq"](inputs(2, 20)).min() >= 0
    root = quantize_linears(nnx.Linear(20, 30, rngs=nnx.Rngs(0)), ...)
    assert type(root) is PaddedFP8Linear and quantized_paths(root) == ("(the tree itself)",)
    lora = nnx.LoRA(20, 4, 30, base_module=nnx.Linear(20, 30, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    assert quantized_paths(quantize_linears(lora, ...)) == ("base_module",)


class Own(nnx.Linear):
    """A subclass that computes something else."""

    def __call__(self, x):
        return 2 * super().__call__(x)


def odd() -> nnx.Dict:
    model = nnx.Dict(
        fine=nnx.Linear(20, 30, rngs=nnx.Rngs(0)),
        hook=nnx.Linear(20, 30, dot_general=lambda *a, **k: None, rngs=nnx.Rngs(0)),
        lora=nnx.LoRALinear(20, 30, lora_rank=2, rngs=nnx.Rngs(0)),
        own=Own(20, 30, rngs=nnx.Rngs(0)),
        whole=nnx.Linear(20, 30, rngs=nnx.Rngs(0)),
    )
    model["whole"].kernel.set_value(jnp.ones((20, 30), jnp.int32))
    return model


def test_lists_all_that_cannot_be_converted():
    model = odd()
    with pytest.raises(ValueError, match="nothing has been changed") as caught:
        quantize_linears(model, ...)
    text = str(caught.value)
    assert "\n  hook: it has a `dot_general`" in text
    assert "\n  lora: it is a LoRALinear, a subclass of nnx.Linear with attributes (lora)" in text
    assert "\n  own: it is a Own, a subclass of nnx.Linear with a `__call__` of its own" in text
    assert "\n  whole: Parameter `whole/kernel` must be a float array" in text
    assert "(4)" in text and "fine" not in text
    assert quantized_paths(quantize_linears(model, "fine")) == ("fine",)


def test_refuses_weights_that_are_not_finite():
    model = Net()
    model.layers[1].up.kernel[...] = model.layers[1].up.kernel[...].at[3, 4].set(jnp.inf)
    with pytest.raises(ValueError, match=r"\(1\).*\n  layers/1/up: a weight is NaN or infinite"):
        quantize_linears(model, "*")


def test_refuses_what_selects_nothing_or_is_no_filter():
    for select in ("layers/*/gate", lambda path, layer: False, nnx.Conv, None, ()):
        with pytest.raises(
            ValueError, match="fits none of the nnx.Linear.*layers/0/down, layers/0"
        ):
            quantize_linears(Net(), select)
    with pytest.raises(TypeError, match="`select` must be a pattern of paths, an NNX filter"):
        quantize_linears(Net(), 3)
    with pytest.raises(TypeError, match="`model` must be an nnx.Module, but it is dict"):
        quantize_linears({}, "*")
