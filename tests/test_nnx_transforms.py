"""PaddedFP8Linear under the transforms of NNX, with optimizers, axis names and checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from nnx_cases import Net, inputs, served
from update_cases import (
    addresses,
    assert_padding_holds,
    assert_same_bits,
    host_bits,
    mesh_devices,
    weight,
)

from jaxfp8 import PaddedKernel, dequantize_params, update_params
from jaxfp8.nnx import WEIGHTS, ActivationScale, FP8Param, PaddedFP8Linear, reload_model


KINDS = (FP8Param, ActivationScale, nnx.Param, ...)


def test_split_merge_clone_state_and_update():
    model = served()
    x = inputs(3, 20)
    want = model(x)
    graphdef, fp8, scales, params, rest = nnx.split(model, *KINDS)
    assert len(nnx.to_flat_state(fp8)) == 4 and not scales
    assert_same_bits(nnx.merge(graphdef, fp8, scales, params, rest)(x), want)
    assert_same_bits(nnx.clone(model)(x), want)
    other = served(1)
    nnx.update(other, nnx.state(model))
    assert_same_bits(other(x), want)
    assert_same_bits(nnx.state(other, FP8Param), fp8)


def test_jit_updates_and_returns_a_model():
    model = served()
    x = inputs(3, 20)
    new = nnx.state(served(1), FP8Param)

    @nnx.jit
    def swap(model, new, x):
        nnx.update(model, new)
        return model(x)

    y = swap(model, new, x)
    assert_same_bits(nnx.state(model, FP8Param), new)
    assert_same_bits(y, nnx.jit(lambda m, x: m(x))(model, x))


def test_eval_shape_makes_a_template():
    abstract = nnx.eval_shape(served)
    kernel = abstract.layers[0].up.kernel.get_value()
    assert isinstance(kernel.qvalue, jax.ShapeDtypeStruct)
    assert (kernel.in_features, kernel.out_features) == (20, 30)
    trainer = Net(seed=3)
    nnx.update(abstract, update_params(nnx.state(abstract, WEIGHTS), nnx.state(trainer, WEIGHTS)))
    assert_same_bits(
        abstract.layers[0].up.kernel.get_value(),
        PaddedKernel.from_dense(trainer.layers[0].up.kernel[...]),
    )


def stack(count: int = 3, **options) -> PaddedFP8Linear:
    @nnx.split_rngs(splits=count)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def make(rngs):
        return PaddedFP8Linear(20, 20, rngs=rngs, **options)

    return make(nnx.Rngs(0))


@pytest.mark.parametrize("options", [{}, {"per_channel": False, "static_x_scale": True}], ids=str)
def test_vmap_and_scan_over_a_stack(options):
    layers = stack(**options)
    assert layers.kernel.shape == (3, 32, 32) and layers.kernel.get_value().stack == (3,)
    x = inputs(2, 20)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return layer(x)

    graphdef, state = nnx.split(layers)
    one_by_one = x
    each = []
    for index in range(3):
        layer = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=index: leaf[i], state))
        one_by_one = layer(one_by_one)
        each.append(layer(x))
    np.testing.assert_allclose(forward(x, layers), one_by_one, rtol=1e-5, atol=1e-6)
    got = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)
    np.testing.assert_allclose(got, jnp.stack(each), rtol=1e-5, atol=1e-6)
    loaded = {"kernel": weight(3, 20, 20), "bias": weight(3, 20)}
    new = update_params(state, loaded)
    want = PaddedKernel.from_dense(loaded["kernel"], per_channel=layers.per_channel)
    assert_same_bits(new["kernel"].get_value(), want)


def test_a_stack_must_be_scanned():
    with pytest.raises(ValueError, match=r"`kernel` must be one layer's.*stack of shape \(3,\)"):
        stack()(inputs(2, 20))


def loss(model, x):
    return jnp.mean((model(x) - 1) ** 2)


def test_only_float_params_get_gradients():
    model = served()
    grads = nnx.jit(nnx.grad(loss))(model, inputs(3, 20))
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(grads)}
    assert "layers/0/up/bias" in paths and "layers/0/norm/scale" in paths
    assert not any(path.endswith("kernel") for path in paths)
    # The straight-through gradient of the bias: that of the same model with the dequantized
    # weights, but for the rounding of activations (2^-4 each).
    stock = Net()
    nnx.update(stock, dequantize_params(nnx.state(model, WEIGHTS)))
    want = nnx.grad(loss)(stock, inputs(3, 20))["layers"][0]["up"]["bias"][...]
    got = grads["layers"][0]["up"]["bias"][...]
    assert np.linalg.norm(got - want) <= 2**-3 * np.linalg.norm(want)


def test_differentiating_fp8_weights_is_the_projects_error():
    with pytest.raises(TypeError, match="holds FP8 weights and cannot be differentiated.*float"):
        nnx.grad(loss, argnums=nnx.DiffState(0, FP8Param))(served(), inputs(3, 20))


def test_a_lora_adapter_around_an_fp8_layer_trains():
    base = PaddedFP8Linear(20, 30, rngs=nnx.Rngs(0))
    model = nnx.LoRA(20, 4, 30, base_module=base, rngs=nnx.Rngs(1))
    before = host_bits(base.kernel.get_value())
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, x):
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x)
        optimizer.update(model, grads)
        return value

    x = inputs(8, 20)
    losses = [float(step(model, optimizer, x)) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    for a, b in zip(before, host_bits(base.kernel.get_value()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_optimizer_of_params_passes_fp8_weights_by():
    model = served()
    fp8 = host_bits(nnx.state(model, FP8Param))
    bias = host_bits(model.layers[0].up.bias[...])
    optimizer = nnx.Optimizer(model, optax.adamw(1e-1, weight_decay=0.1), wrt=nnx.Param)
    assert not any("kernel" in path for path, _ in nnx.to_flat_state(nnx.state(optimizer)))
    optimizer.update(model, nnx.grad(loss)(model, inputs(3, 20)))
    for a, b in zip(fp8, host_bits(nnx.state(model, FP8Param)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(bias[0], host_bits(model.layers[0].up.bias[...])[0])


def test_a_float_layer_trains_with_straight_through_gradients():
    def linear(*sizes, rngs):
        return PaddedFP8Linear(*sizes, param_dtype=jnp.float32, rngs=rngs)

    model, x = Net(linear), inputs(8, 20)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        value, grads = nnx.value_and_grad(loss)(model, x)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer, x)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("per_channel", [True, False])
def test_axis_names_of_initializers_are_moved_onto_the_padded_leaves(axis_type, per_channel):
    mesh = jax.sharding.Mesh(
        np.array(mesh_devices(4)).reshape(2, 2), ("x", "y"), axis_types=(axis_type,) * 2
    )
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"))
    rules = {"sharding_rules": (("in", "x"), ("out", "y"))}
    with jax.set_mesh(mesh):
        layer = PaddedFP8Linear(
            # No side can be divided by two, but the padded ones can.
            *(19, 31),
            kernel_init=init,
            kernel_metadata=rules,
            per_channel=per_channel,
            rngs=nnx.Rngs(0),
        )
    kernel = layer.kernel.get_value()
    assert layer.kernel.get_metadata("out_sharding") == ("out", "in")
    assert kernel.qvalue.sharding.spec == jax.P("y", "x")
    assert kernel.scale.sharding.spec == (jax.P("y") if per_channel else jax.P())
    spec = nnx.get_partition_spec(nnx.state(layer))["kernel"].get_raw_value()
    assert spec.qvalue == jax.P("y", "x")
    assert spec.scale == (jax.P("y") if per_channel else jax.P())
    plain = PaddedFP8Linear(19, 31, per_channel=per_channel, rngs=nnx.Rngs(0))
    spec = nnx.get_partition_spec(nnx.state(plain))["kernel"].get_raw_value()
    assert (spec.qvalue, spec.scale) == (jax.P(), jax.P())
    assert_padding_holds(kernel)
    assert_same_bits(jax.device_get(kernel), jax.device_get(plain.kernel.get_value()))
    shardings = nnx.get_named_sharding(nnx.state(layer), mesh)
    placed = jax.device_put(jax.device_get(nnx.state(layer)), shardings)["kernel"].get_value()
    assert placed.qvalue.sharding.spec == jax.P("y", "x")
    assert_reloads_in_place(layer)


def assert_reloads_in_place(layer: PaddedFP8Linear) -> None:
    shardings = [leaf.sharding for leaf in jax.tree.leaves(nnx.state(layer))]
    loaded = {"kernel": weight(19, 31), "bias": weight(31)}
    reload_model(layer, loaded)
    before = addresses(nnx.state(layer))
    reload_model(layer, loaded)
    assert addresses(nnx.state(layer)) == before
    assert [leaf.sharding for leaf in jax.tree.leaves(nnx.state(layer))] == shardings
    want = PaddedKernel.from_dense(loaded["kernel"], per_channel=layer.per_channel)
    assert_same_bits(jax.device_get(layer.kernel.get_value()), jax.device_get(want))


def test_an_abstract_model_on_a_mesh_says_where_weights_belong():
    mesh = jax.sharding.Mesh(np.array(mesh_devices(4)).reshape(2, 2), ("x", "y"))
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("x", "y"))

    def make():
        return PaddedFP8Linear(19, 31, kernel_init=init, rngs=nnx.Rngs(0))

    with jax.set_mesh(mesh):
        kernel = nnx.eval_shape(make).kernel.get_value()
    assert (kernel.qvalue.sharding.spec, kernel.scale.sharding.spec) == (
        jax.P("y", "x"),
        jax.P("y"),
    )
    graphdef, template = nnx.get_abstract_model(make, mesh)
    loaded = {"kernel": weight(19, 31), "bias": weight(31)}
    layer = nnx.merge(graphdef, update_params(template, loaded))
    kernel = layer.kernel.get_value()
    assert kernel.qvalue.sharding == jax.NamedSharding(mesh, jax.P("y", "x"))
    assert kernel.scale.sharding == jax.NamedSharding(mesh, jax.P("y"))
    assert_same_bits(
        jax.device_get(kernel), jax.device_get(PaddedKernel.from_dense(loaded["kernel"]))
    )


def test_a_stacks_axis_is_named_before_the_others():
    options = {"kernel_metadata": {"out_sharding": (None, "model"), "eager_sharding": False}}
    layers = stack(**options)
    assert layers.kernel.get_metadata("out_sharding") == ("layers", "model", None)
    spec = nnx.get_partition_spec(nnx.state(layers))["kernel"].get_raw_value()
    assert (spec.qvalue, spec.scale) == (jax.P("layers", "model", None), jax.P("layers", "model"))
    weights = dequantize_params(nnx.state(layers))["kernel"]
    assert type(weights) is nnx.Param
    assert weights.get_metadata("out_sharding") == ("layers", None, "model")


def test_refuses_axis_names_that_cannot_be_moved():
    for sharding, error, says in (
        (("a", "b", "c"), ValueError, "at most the 2 axes.*it names"),
        ("model", TypeError, "`out_sharding` must be a tuple of axis names"),
    ):
        options = {"out_sharding": sharding, "eager_sharding": False}
        with pytest.raises(error, match=says):
            PaddedFP8Linear(20, 30, rngs=nnx.Rngs(0), kernel_metadata=options)
