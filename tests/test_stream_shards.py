"""Fused parameters by shard: in a stream, in place; and whole, as KernelShards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_reload import identity_of
from test_update_rows import FORMS
from update_cases import (
    addresses,
    assert_same_bits,
    mesh_devices,
    owned,
    weight,
)

import jaxfp8._donate
from jaxfp8 import (
    DenseWeight,
    KernelShards,
    PaddedKernel,
    ReloadError,
    reload_stream,
    update_params,
)


K = 24
SIZES = {"q": 21, "k": 7, "v": 7}
N = sum(SIZES.values())
SHARDS = {"*/qkv": SIZES}


def served(stack=(), *, layers: int = 1) -> dict:
    return {
        f"layer_{i}": {
            "qkv": {
                "kernel": PaddedKernel.from_dense(weight(*stack, K, N, seed=90 + i)),
                "bias": jnp.array(weight(*stack, N, seed=90 + i)),
            }
        }
        for i in range(layers)
    }


def pieces(stack=(), seed: int = 1) -> dict:
    return {
        name: (weight(*stack, K, n, seed=seed + i), weight(*stack, n, seed=seed + i))
        for i, (name, n) in enumerate(SIZES.items())
    }


def whole(parts: dict) -> dict:
    kernel = np.concatenate([parts[name][0] for name in SIZES], axis=-1)
    bias = np.concatenate([parts[name][1] for name in SIZES], axis=-1)
    return {"layer_0": {"qkv": {"kernel": PaddedKernel.from_dense(kernel), "bias": bias}}}


@pytest.mark.parametrize(
    ("form", "stack", "order"),
    [*((form, (), "vkq") for form in FORMS), ("out_in", (3,), "qvk"), ("numpy", (3,), "kqv")],
)
def test_shards_in_any_order(form, stack, order):
    params, parts = served(stack), pieces(stack)
    where, what = addresses(params), identity_of(params)
    with reload_stream(params, shards=SHARDS) as stream:
        for name in order:
            stream.put("layer_0/qkv/kernel", FORMS[form](parts[name][0]), shard=name)
            stream.put("layer_0/qkv/bias", parts[name][1], shard=name)
        updated = stream.finish()
    assert_same_bits(updated, whole(parts))
    assert addresses(updated) == where and identity_of(updated) == what


def test_one_shard_leaves_the_others_as_they_were():
    params, (w, b) = served(), pieces()["k"]
    expected = weight(K, N, seed=90), weight(N, seed=90)
    expected[0][:, 21:28], expected[1][21:28] = w, b
    where = addresses(params)
    with reload_stream(params, shards=SHARDS) as stream:
        stream.put("layer_0/qkv/kernel", w, shard="k")
        stream.put_all([("layer_0/qkv/bias", b, "k")])
        assert stream.updated == ("layer_0/qkv/kernel[k]", "layer_0/qkv/bias[k]")
        assert stream.missing == tuple(
            f"layer_0/qkv/{n}[{s}]" for n in ("bias", "kernel") for s in "qv"
        )
        updated = stream.finish(partial=True)["layer_0"]["qkv"]
    assert_same_bits(updated["kernel"], PaddedKernel.from_dense(expected[0]))
    np.testing.assert_array_equal(jnp.copy(updated["bias"]), expected[1])
    assert addresses({"layer_0": {"qkv": updated}}) == where


def test_a_stream_left_between_shards_says_which_rows_are_new():
    with pytest.raises(ReloadError) as caught:
        with reload_stream(served(), shards=SHARDS) as stream:
            stream.put("layer_0/qkv/kernel", pieces()["k"][0], shard="k")
    assert caught.value.updated == ("layer_0/qkv/kernel[k]",)
    assert "Already new: layer_0/qkv/kernel[k]." in str(caught.value)
    assert "Still old: layer_0/qkv/bias, layer_0/qkv/kernel[q], layer_0/qkv/kernel[v]." in str(
        caught.value
    )


def test_shards_of_one_size_share_a_program():
    jaxfp8._donate._compile.cache_clear()
    params = served(layers=3)
    with reload_stream(params, shards=SHARDS) as stream:
        for i in range(3):
            for name, (w, _) in pieces(seed=i).items():
                stream.put(f"layer_{i}/qkv/kernel", w, shard=name)
        stream.finish(partial=True)
    assert jaxfp8._donate._compile.cache_info().misses == 2  # 21 rows, and 7.


def test_a_write_of_rows_wants_no_memory_of_the_size_of_the_kernel():
    """In place: all of the kernel is aliased, and what is computed is at most the rows'."""
    k, sizes = 1000, {"q": 3000, "k": 420}
    params = {"qkv": {"kernel": PaddedKernel.from_dense(jnp.ones((k, 3420)))}}
    jaxfp8._donate._compile.cache_clear()
    compiled, original = [], jaxfp8._donate._compile

    def keep(*key):
        compiled.append(original(*key))
        return compiled[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxfp8._donate, "_compile", keep)
        with reload_stream(params, shards={"qkv": sizes}) as stream:
            stream.put("qkv/kernel", DenseWeight(jnp.ones((420, k)), "out_in"), shard="k")
            stream.finish(partial=True)
    (program,) = compiled
    memory = program.memory_analysis()
    kernel = params["qkv"]["kernel"]
    assert memory.alias_size_in_bytes == 3424 * 1008 + 3424 * 4
    assert memory.temp_size_in_bytes <= 420 * 1008 + 16 * 3424
    assert kernel.qvalue.is_deleted()


def test_bytes_of_shards_add_up():
    seen = []
    params, parts = served(), pieces()
    total = sum(a.nbytes for a in jax.tree.leaves(params))
    with reload_stream(params, shards=SHARDS, progress=lambda *a: seen.append(a)) as stream:
        for name, (w, b) in parts.items():
            stream.put("layer_0/qkv/kernel", w, shard=name)
            stream.put("layer_0/qkv/bias", b, shard=name)
        stream.finish()
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)


def test_shards_over_a_mesh():
    mesh = Mesh(np.array(mesh_devices(4)).reshape(2, 2), ("x", "y"))
    specs = {"kernel": PaddedKernel(PartitionSpec("x", "y"), PartitionSpec("x"), K, N)}
    specs["bias"] = PartitionSpec()
    params = jax.tree.map(
        lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), served()["layer_0"]["qkv"], specs
    )
    params = owned({"layer_0": {"qkv": params}})
    where, what, parts = addresses(params), identity_of(params), pieces()
    with reload_stream(params, shards=SHARDS) as stream:
        for name, (w, b) in parts.items():
            stream.put("layer_0/qkv/kernel", w, shard=name)
            stream.put("layer_0/qkv/bias", jnp.asarray(b), shard=name)
        updated = stream.finish()
    assert addresses(updated) == where and identity_of(updated) == what
    assert_same_bits(updated, whole(parts))


def test_float_kernels_have_shards_too():
    """A layer that stays dense: rows are its last axis, Flax's out_features."""
    params = {"qkv": {"kernel": jnp.zeros((K, N), jnp.bfloat16)}}
    parts = {name: w.astype(jnp.bfloat16) for name, (w, _) in pieces().items()}
    with reload_stream(params, shards={"qkv": SIZES}) as stream:
        stream.put("qkv/kernel", DenseWeight(parts["v"].T, "out_in"), shard="v")
        stream.put("qkv/kernel", parts["q"], shard="q")
        stream.put("qkv/kernel", parts["k"], shard="k")
        updated = stream.finish()
    expected = np.concatenate([parts[name] for name in SIZES], axis=-1)
    np.testing.assert_array_equal(jnp.copy(updated["qkv"]["kernel"]), expected)


@pytest.mark.parametrize(
    ("shards", "error", "pattern"),
    [
        ({"*/qkw": SIZES}, ValueError, "'\\*/qkw', but no layer.*there is layer_0/qkv"),
        ({"*/qkv": {"q": 21, "k": 7}}, ValueError, "layer_0/qkv/.*together 28, but it has 35"),
        ({"*/qkv": {"q": 35, "k": 0}}, ValueError, "sizes of its shards are .*'k': 0"),
        ({"*/qkv": {"q": 35.0}}, TypeError, "mapping of names to ints"),
        ({"*/qkv": [21, 7, 7]}, TypeError, "mapping of names to ints"),
        ({"*/qkv": SIZES, "layer_0/*": {"a": 35}}, ValueError, "two patterns match it"),
        ({"*/qkv/kernel": SIZES}, ValueError, "path of the layer, without `/kernel`"),
    ],
)
def test_declarations_that_do_not_fit(shards, error, pattern):
    with pytest.raises(error, match=pattern):
        reload_stream(served(), shards=shards)


def test_per_tensor_kernels_are_refused_with_the_reason():
    kernel = PaddedKernel.from_dense(weight(K, N), per_channel=False)
    with pytest.raises(ValueError, match="qkv/kernel: .*one scale per tensor.*per_channel=True"):
        reload_stream({"qkv": {"kernel": kernel}}, shards={"qkv": SIZES})
    with pytest.raises(ValueError, match="one scale per tensor"):
        update_params(
            {"qkv": kernel}, {"qkv": KernelShards({n: w for n, (w, _) in pieces().items()}, SIZES)}
        )


def test_shards_that_do_not_fit():
    (q, _), (k, _) = pieces()["q"], pieces()["k"]
    path = "layer_0/qkv/kernel"
    with reload_stream(served(), shards={"*/qkv": SIZES}) as stream:
        stream.put(path, q, shard="q")
        for put, pattern in (
            ((path, q, "q"), r"kernel\[q\]: it was already written"),
            ((path, weight(K, N)), "its shards q were already written"),
            ((path, q, "w"), "no shard 'w'; those declared are q, k, v"),
            ((path, q, "k"), r"kernel\[k\]: its shape is \(24, 21\).*\(24, 7\)"),
            ((path, k * np.nan, "k"), r"kernel\[k\]: a weight is NaN"),
        ):
            with pytest.raises(ValueError, match=pattern):
                stream.put(*put[:2], shard=put[2] if len(put) == 3 else None)
        stream.finish(partial=True)
    with (
        pytest.raises(ValueError, match="no shards are declared"),
        reload_stream(served()) as stream,
    ):
        stream.put(path, q, shard="q")


def test_weak_types_stay():
    """A served function compiles again if one changes."""
    params = {"qkv": {"bias": jnp.broadcast_to(jnp.asarray(0.25), (N,)) * 2}}
    assert jax.typeof(params["qkv"]["bias"]).weak_type
    what, where = identity_of(params), addresses(params)
    with reload_stream(params, shards={"qkv": SIZES}) as stream:
        stream.put("qkv/bias", weight(7), shard="k")
        updated = stream.finish(partial=True)
    assert identity_of(updated) == what and addresses(updated) == where
    bias = np.full(N, 0.5, np.float32)
    bias[21:28] = weight(7)
    np.testing.assert_array_equal(jnp.copy(updated["qkv"]["bias"]), bias)
