"""reload_params over several devices: shardings and addresses stay, however the weights come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from update_cases import addresses, devices, host_bits, mesh_devices, owned, weight

from jaxfp8.padded import DenseWeight, FP8Weight, PaddedKernel
from jaxfp8.quantize import quantize
from jaxfp8.update import reload_params, update_params


K, N = 40, 52  # padded (64, 48): 2 x 2 devices divide the padded sizes and both logical ones
SPECS = {
    "columns": (PartitionSpec("y", None), PartitionSpec("y")),
    "both": (PartitionSpec("y", "x"), PartitionSpec("y")),
    "all on one": (PartitionSpec(("x", "y")), PartitionSpec(("x", "y"))),
}


def mesh(axis_type: AxisType = AxisType.Auto) -> Mesh:
    devices = np.array(mesh_devices(4)).reshape(2, 2)
    return Mesh(devices, ("x", "y"), axis_types=(axis_type,) * 2)


def logical(seed: int, k: int = K, n: int = N) -> dict:
    return {"kernel": weight(k, n, seed=seed), "norm": weight(8, seed=seed)}


def sharded(on: Mesh, specs, k: int = K, n: int = N, *, per_channel: bool = True) -> dict:
    with jax.default_device(on.devices.flat[0]):
        kernel = PaddedKernel.from_dense(weight(k, n), per_channel=per_channel)
        tree = {"kernel": kernel, "norm": jnp.zeros(8)}
    qspec, sspec = specs
    specs = {
        "kernel": PaddedKernel(qspec, sspec if per_channel else PartitionSpec(), k, n),
        "norm": PartitionSpec("x"),
    }
    return owned(
        jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(on, spec)), tree, specs)
    )


def put(tree: dict, on: Mesh, *spec) -> dict:
    replicated = NamedSharding(on, PartitionSpec())
    return {
        "kernel": jax.device_put(tree["kernel"], NamedSharding(on, PartitionSpec(*spec))),
        "norm": jax.device_put(tree["norm"], replicated),
    }


def other_mesh() -> Mesh:
    return Mesh(np.array(mesh_devices(2)), ("z",))


def fp8(tree: dict) -> dict:
    value, scale = quantize(tree["kernel"].T, axis=-1, keepdims=False)
    return tree | {"kernel": FP8Weight(value, scale, "out_in")}


# The same weights on the host, on one device, on meshes, turned, and quantized.
FORMS = {
    "numpy": lambda tree: tree,
    "uncommitted": lambda tree: jax.tree.map(jnp.asarray, tree),
    "one device": lambda tree: jax.device_put(tree, devices()[3]),
    "same mesh": lambda tree: put(tree, mesh(), "x", "y"),
    "same mesh, turned": lambda tree: put(tree, mesh(), "y", None),
    "other mesh": lambda tree: put(tree, other_mesh(), None, "z"),
    "out_in": lambda tree: tree | {"kernel": DenseWeight(tree["kernel"].T, "out_in")},
    "fp8": fp8,
    "padded": lambda tree: tree | {"kernel": PaddedKernel.from_dense(tree["kernel"])},
}


def shardings(tree) -> list:
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_shardings_addresses_and_bits(specs):
    params = sharded(mesh(), specs)
    what, where = shardings(params), addresses(params)
    served = jax.jit(
        lambda tree: sum(jnp.sum(a.astype(jnp.float32)) for a in jax.tree.leaves(tree))
    )
    served(params)
    for seed, (name, form) in enumerate(FORMS.items(), start=1):
        params = reload_params(params, form(logical(seed)))
        served(params)
        assert shardings(params) == what and addresses(params) == where, name
        fresh = {**logical(seed), "kernel": PaddedKernel.from_dense(logical(seed)["kernel"])}
        for now, then in zip(host_bits(params), host_bits(fresh), strict=True):
            np.testing.assert_array_equal(now, then, err_msg=name)
    assert served._cache_size() == 1


@pytest.mark.parametrize(("k", "n"), [(41, 52), (40, 51), (17, 19)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_logical_sizes_that_the_mesh_does_not_divide(k, n, per_channel):
    """The padded buffer is divided, the loaded weight cannot be."""
    params = sharded(mesh(), SPECS["both"], k, n, per_channel=per_channel)
    what, where = shardings(params), addresses(params)
    w = weight(k, n, seed=4)
    for kernel in (w, DenseWeight(jnp.asarray(w.T), "out_in")):
        params = reload_params(params, {"kernel": kernel, "norm": weight(8)})
        assert shardings(params) == what and addresses(params) == where
        fresh = PaddedKernel.from_dense(w, per_channel=per_channel)
        for now, then in zip(host_bits(params["kernel"]), host_bits(fresh), strict=True):
            np.testing.assert_array_equal(now, then)


def test_explicit_axis_types():
    """With sharding in types, and weights from the host."""
    params = sharded(mesh(AxisType.Explicit), SPECS["both"])
    what, where = shardings(params), addresses(params)
    params = reload_params(params, logical(3))
    assert shardings(params) == what and addresses(params) == where
    fresh = PaddedKernel.from_dense(logical(3)["kernel"])
    np.testing.assert_array_equal(np.array(params["kernel"].qvalue), np.array(fresh.qvalue))


def test_update_places_its_result_like_params():
    params = sharded(mesh(), SPECS["both"])
    for form in FORMS.values():
        updated = update_params(params, form(logical(2)))
        assert shardings(updated) == shardings(params)
        fresh = PaddedKernel.from_dense(logical(2)["kernel"])
        for now, then in zip(host_bits(updated["kernel"]), host_bits(fresh), strict=True):
            np.testing.assert_array_equal(now, then)


def test_tied_and_shared_shards_are_found():
    params = sharded(mesh(), SPECS["both"])
    tied = {"a": params["norm"], "b": params["norm"]}
    with pytest.raises(ValueError, match="a and b"):
        reload_params(tied, {"a": weight(8), "b": weight(8)})
    updated = reload_params({"a": params["norm"]}, {"a": params["norm"]})
    assert not params["norm"].is_deleted()
    assert not set(addresses(updated)) & set(addresses(params["norm"]))
    assert updated["a"].sharding == params["norm"].sharding


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("inside", [False, True])
def test_a_mesh_in_context_changes_nothing(axis_type, inside):
    """`jax.set_mesh` around a reload, of params made inside of it or outside."""
    on = mesh(axis_type)

    def init() -> dict:
        return {"kernel": PaddedKernel.from_dense(jnp.ones((K, N))), "norm": jnp.zeros(8)}

    with jax.set_mesh(on):
        params = jax.jit(init)() if inside else None
        shapes = jax.eval_shape(init)
    params = params or jax.jit(init)()
    what, where = shardings(params), addresses(params)
    committed = [leaf.committed for leaf in jax.tree.leaves(params)]
    fresh = PaddedKernel.from_dense(logical(2)["kernel"])
    for form in (FORMS["numpy"], FORMS["uncommitted"], FORMS["one device"]):
        with jax.set_mesh(on):
            params = reload_params(params, form(logical(2)))
            updated = update_params(params, form(logical(3)))
            from_shapes = update_params(shapes, form(logical(2)))
            traced = jax.jit(update_params)(params, logical(2))
            assert jax.sharding.get_abstract_mesh() == on.abstract_mesh
        assert shardings(params) == what and addresses(params) == where
        assert [leaf.committed for leaf in jax.tree.leaves(params)] == committed
        if inside:
            assert shardings(updated) == what
        for tree in (params, from_shapes, traced):
            for now, then in zip(host_bits(tree["kernel"]), host_bits(fresh), strict=True):
                np.testing.assert_array_equal(now, then)
