"""PaddedFP8Dense under nn.scan, nn.vmap, nn.remat, jit and eval_shape, and with axis names."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfp8.linen import PaddedFP8Dense
from jaxfp8.padded import PaddedKernel


KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(4, 33)).astype(np.float32)
MODES = pytest.mark.parametrize("param_dtype", ["float8_e4m3fn", "float32"])
LECUN = nn.initializers.lecun_normal()


class Block(nn.Module):
    """A residual block of one layer, as `nn.scan` wants it: (carry, x) -> (carry, y)."""

    param_dtype: str = "float8_e4m3fn"
    remat: bool = False
    layer: dict | None = None

    @nn.compact
    def __call__(self, x, _=None):
        dense = nn.remat(PaddedFP8Dense) if self.remat else PaddedFP8Dense
        options = dict(self.layer or {})
        y = dense(33, activation="silu", param_dtype=self.param_dtype, name="dense", **options)(x)
        return x + y, None


def scanned(length: int = 3, **block) -> nn.Module:
    return nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(**block)


def layer_of(params, index: int):
    return jax.tree.map(lambda a: a[index], params)


def unrolled(params, x, param_dtype, length: int = 3):
    for i in range(length):
        x, _ = Block(param_dtype).apply(layer_of(params, i), x)
    return x


@MODES
def test_scan_is_the_loop(param_dtype):
    model = scanned(param_dtype=param_dtype)
    params = model.init(KEY, X)
    got, _ = jax.jit(model.apply)(params, X)
    np.testing.assert_allclose(got, unrolled(params, X, param_dtype), rtol=1e-5, atol=1e-5)
    if param_dtype == "float8_e4m3fn":
        kernel = params["params"]["dense"]["kernel"]
        assert (kernel.stack, kernel.in_features, kernel.out_features) == ((3,), 33, 33)
        assert kernel.qvalue.shape == (3, 48, 48) and kernel.scale.shape == (3, 48)
        # The layers differ, and each was quantized with scales of its own.
        assert len({np.asarray(q).tobytes() for q in kernel.scale}) == 3


def test_scanned_modes_initialise_the_same_weights():
    served = scanned().init(KEY, X)["params"]["dense"]["kernel"]
    trained = scanned(param_dtype="float32").init(KEY, X)["params"]["dense"]["kernel"]
    want = PaddedKernel.from_dense(trained)
    np.testing.assert_array_equal(np.asarray(served.qvalue), np.asarray(want.qvalue))
    np.testing.assert_array_equal(served.scale, want.scale)


def test_a_scanned_tree_of_other_logical_size_names_its_path():
    params = {"params": {"dense": {"kernel": PaddedKernel.from_dense(np.ones((3, 33, 40)))}}}
    with pytest.raises(ValueError, match="`dense/kernel` has in_features=33 and out_features=40"):
        scanned().apply(params, X)


@MODES
def test_gradients_through_scan_and_remat(param_dtype):
    # Both are the gradient of the same loop: with respect to x in either mode, and to the weights
    # in the float one.
    plain, remat = scanned(param_dtype=param_dtype), scanned(param_dtype=param_dtype, remat=True)
    params = plain.init(KEY, X)

    def loss(x, params, apply):
        return (apply(params, x) ** 2).sum()

    def run(model):
        return lambda params, x: model.apply(params, x)[0]

    argnums = (0, 1) if param_dtype == "float32" else 0
    grad = jax.grad(loss, argnums)
    want = grad(X, params, lambda params, x: unrolled(params, x, param_dtype))
    for model in (plain, remat):
        got = jax.jit(grad, static_argnums=2)(X, params, run(model))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@MODES
@pytest.mark.parametrize("in_axis", [0, None], ids=["own inputs", "shared inputs"])
def test_vmap_over_the_module(param_dtype, in_axis):
    ensemble = nn.vmap(
        PaddedFP8Dense,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axis,
        axis_size=5,
    )(10, param_dtype=param_dtype)
    x = X if in_axis is None else np.random.default_rng(1).normal(size=(5, 4, 33))
    params = ensemble.init(KEY, x)
    got = ensemble.apply(params, x)
    assert got.shape == (5, 4, 10)
    member = PaddedFP8Dense(10, param_dtype=param_dtype)
    for i in range(5):
        want = member.apply(layer_of(params, i), x if in_axis is None else x[i])
        np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-5)


def test_vmap_with_shared_weights_is_a_leading_axis():
    layer = PaddedFP8Dense(10)
    params = layer.init(KEY, X)
    x = np.random.default_rng(1).normal(size=(5, 4, 33)).astype(np.float32)
    mapped = jax.vmap(layer.apply, in_axes=(None, 0))(params, x)
    np.testing.assert_allclose(mapped, layer.apply(params, x), rtol=1e-6, atol=1e-6)


@MODES
def test_eval_shape_init_is_init_without_the_weights(param_dtype):
    layer = PaddedFP8Dense(10, param_dtype=param_dtype, static_x_scale=True)
    abstract = jax.eval_shape(layer.init, KEY, X)
    params = jax.jit(layer.init)(KEY, X)
    assert jax.tree.structure(abstract) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(params), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert jax.eval_shape(layer.apply, abstract, X) == jax.ShapeDtypeStruct((4, 10), jnp.float32)


def test_one_compile_serves_every_tree_of_the_model():
    layer = PaddedFP8Dense(10)
    traces = []

    @jax.jit
    def serve(params, x):
        traces.append(1)
        return layer.apply(params, x)

    for seed in range(3):
        serve(jax.jit(layer.init)(jax.random.key(seed), X), X)
    assert len(traces) == 1


# Axis names


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    ("with_names", "box"),
    [
        (nn.with_partitioning, nn.Partitioned),
        (nn.with_logical_partitioning, nn.LogicallyPartitioned),
    ],
)
def test_boxes_sit_on_the_leaves(with_names, box, per_channel):
    layer = PaddedFP8Dense(
        10,
        per_channel=per_channel,
        kernel_init=with_names(LECUN, ("in", "out")),
        bias_init=with_names(nn.initializers.zeros, ("out",)),
    )
    params = layer.init(KEY, X)
    kernel = params["params"]["kernel"]
    assert type(kernel.qvalue) is type(kernel.scale) is box
    spec = nn.get_partition_spec(params)["params"]
    assert spec["kernel"].qvalue == P("out", "in")
    assert spec["kernel"].scale == (P("out") if per_channel else P())
    assert spec["bias"] == P("out")
    # The weights, and what comes of them, are those of the layer without names.
    plain = PaddedFP8Dense(10, per_channel=per_channel, kernel_init=LECUN)
    np.testing.assert_array_equal(layer.apply(params, X), plain.apply(plain.init(KEY, X), X))
    np.testing.assert_array_equal(
        layer.apply(nn.meta.unbox(params), X), plain.apply(plain.init(KEY, X), X)
    )


@pytest.mark.parametrize("per_channel", [True, False])
def test_scan_adds_its_axis_to_the_names(per_channel):
    named = nn.with_partitioning(LECUN, ("in", "out"))
    model = scanned(layer={"kernel_init": named, "per_channel": per_channel})
    params = model.init(KEY, X)
    spec = nn.get_partition_spec(params)["params"]["dense"]["kernel"]
    assert spec.qvalue == P("layers", "out", "in")
    assert spec.scale == (P("layers", "out") if per_channel else P("layers"))
    got, _ = model.apply(params, X)
    plain, _ = scanned(layer={"per_channel": per_channel}).apply(nn.meta.unbox(params), X)
    np.testing.assert_array_equal(got, plain)


def test_a_box_around_a_kernel_of_other_size_is_found():
    named = nn.with_partitioning(LECUN, ("in", "out"))
    params = PaddedFP8Dense(10, kernel_init=named).init(KEY, X)
    with pytest.raises(ValueError, match="`kernel` has in_features=33 and out_features=10"):
        PaddedFP8Dense(12, kernel_init=named).apply(params, X)


def test_names_with_fewer_axes_than_the_weight():
    params = PaddedFP8Dense(10, kernel_init=nn.with_partitioning(LECUN, ("in",))).init(KEY, X)
    spec = nn.get_partition_spec(params)["params"]["kernel"]
    assert (spec.qvalue, spec.scale) == (P(None, "in"), P(None))


def test_initialised_and_applied_on_a_mesh():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("in", "out"))
    named = nn.with_partitioning(LECUN, ("in", "out"), mesh)
    layer = PaddedFP8Dense(10, kernel_init=named)
    abstract = jax.eval_shape(layer.init, KEY, X)
    shardings = nn.get_sharding(abstract, mesh)
    assert shardings["params"]["kernel"].qvalue == NamedSharding(mesh, P("out", "in"))
    params = jax.jit(layer.init, out_shardings=shardings)(KEY, X)
    assert params["params"]["kernel"].qvalue.value.sharding.spec == P("out", "in")
    plain = PaddedFP8Dense(10, kernel_init=LECUN)
    got = jax.jit(layer.apply)(params, X)
    np.testing.assert_allclose(got, plain.apply(plain.init(KEY, X), X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("param_dtype", [jnp.float8_e4m3fn, jnp.float32])
def test_a_static_scale_changes_no_initial_kernel_under_scan(param_dtype):
    def scanned(static_x_scale: bool):
        class Stack(nn.Module):
            @nn.compact
            def __call__(self, x):
                scan = nn.scan(
                    lambda layer, x, _: (layer(x), None),
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    length=3,
                )
                layer = PaddedFP8Dense(
                    20, static_x_scale=static_x_scale, param_dtype=param_dtype, name="layer"
                )
                return scan(layer, x, None)[0]

        return Stack().init(jax.random.key(0), jnp.ones((2, 20)))["params"]["layer"]

    with_scale, without = scanned(True), scanned(False)
    assert ("x_scale" in with_scale) == (param_dtype == jnp.float8_e4m3fn)
    for a, b in zip(
        jax.tree.leaves(with_scale["kernel"]), jax.tree.leaves(without["kernel"]), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
