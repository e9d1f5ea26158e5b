"""The compiled writes of reload_params: how many there are, and what memory they want."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from update_cases import served_tree, trainer_tree, weight

import jaxfp8._donate
from jaxfp8._accounting import account
from jaxfp8._bundles import bundles
from jaxfp8._donate import steps
from jaxfp8.padded import DenseWeight, PaddedKernel
from jaxfp8.update import reload_params


K, N = 1000, 3420


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_write_wants_no_memory_of_the_size_of_the_weight(layout, per_channel, dtype):
    """Read once, written once into the donated buffer: no float copy, no transposed copy."""
    kernel = PaddedKernel.from_dense(jnp.ones((K, N)), per_channel=per_channel)
    loaded = DenseWeight(jnp.ones((K, N) if layout == "in_out" else (N, K), dtype), layout)
    (write,) = account(kernel, loaded, partial=False, ignore=())
    (bundle,) = bundles([write])
    carry, _ = bundle.measure(iter(()))
    (step,) = steps(bundle, carry)
    memory = step.program.memory_analysis()
    assert memory.alias_size_in_bytes == kernel.qvalue.nbytes + kernel.scale.nbytes
    assert memory.temp_size_in_bytes <= 16 * N  # Reciprocals of the scales, and the like.
    text = step.program.as_text()
    entry = text[text.index("ENTRY") :]
    moved = [line for line in entry.splitlines() if " copy(" in line or " transpose(" in line]
    assert not [line for line in moved if "f32[] copy(" not in line]


def test_layers_of_one_shape_share_a_program():
    def layers(seed: int, make=lambda a: a) -> dict:
        return {f"layer_{i}": {"kernel": make(weight(23, 29, seed=seed + i))} for i in range(5)}

    params = layers(0, PaddedKernel.from_dense)
    jaxfp8._donate._compile.cache_clear()
    params = reload_params(params, layers(7))
    assert jaxfp8._donate._compile.cache_info().misses == 1
    reload_params(params, layers(9))
    assert jaxfp8._donate._compile.cache_info().misses == 1


def test_one_synchronisation_for_all_checks(monkeypatch):
    calls = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: calls.append(tree) or device_get(tree))
    reload_params(served_tree(), trainer_tree())
    assert len(calls) == 1 and len(calls[0]) == 6


def test_implicit_transfers_are_not_needed():
    """Under a transfer guard, weights from the host are sent explicitly."""
    params = served_tree()
    reloaded = reload_params(params, trainer_tree())
    with jax.transfer_guard("disallow"):
        reloaded = reload_params(reloaded, trainer_tree())
    np.testing.assert_array_equal(reloaded["Dense_0"]["bias"], trainer_tree()["Dense_0"]["bias"])
