"""A stack that lies on the host is measured, sent and written element by element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_reload import identity_of
from test_update_rows import FORMS
from update_cases import addresses, assert_same_bits, weight

import jaxfp8._donate
from jaxfp8 import DenseWeight, FP8Weight, PaddedKernel, _in_flight, reload_params, update_params
from jaxfp8._accounting import account
from jaxfp8._bundles import Bundle, ByKernel
from jaxfp8._elements import Element
from jaxfp8._in_flight import LIMIT, InFlight
from jaxfp8._lazy import LazyArray


K, N, LAYERS = 24, 35, 4


@pytest.mark.parametrize("form", FORMS)
def test_a_stack_of_the_host_is_sent_element_by_element(form, monkeypatch):
    """A reload of a stack: the same bits, one element at a time."""
    kernels = weight(LAYERS, K, N, seed=6)
    sent = []
    run = jaxfp8._donate.Step.run

    def counted(self, leaves, shared, arrived):
        sent.append(self.bundle.nbytes)
        run(self, leaves, shared, arrived)

    monkeypatch.setattr(jaxfp8._donate.Step, "run", counted)
    value = FORMS[form](kernels)
    params = {"w": PaddedKernel.from_dense(jnp.zeros((LAYERS, K, N)))}
    where, what = addresses(params), identity_of(params)
    updated = reload_params(params, {"w": value})
    assert_same_bits(updated, update_params(updated, {"w": value}))
    assert addresses(updated) == where and identity_of(updated) == what
    on_host = not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
    assert len(sent) == (LAYERS if on_host else 1)


@pytest.mark.parametrize("limit", [1, LIMIT])
def test_elements_on_their_way_are_waited_for_in_the_stack_as_it_is_then(limit, monkeypatch):
    """On a GPU several are on their way, and each write takes the buffers of the one before."""
    monkeypatch.setattr(_in_flight, "_is_on_cpu", lambda array: False)
    monkeypatch.setattr(InFlight.__init__, "__defaults__", (limit,))
    kernels = weight(LAYERS, K, N, seed=6)
    params = {"w": PaddedKernel.from_dense(jnp.zeros((LAYERS, K, N)))}
    updated = reload_params(params, {"w": kernels})
    assert_same_bits(updated["w"], PaddedKernel.from_dense(kernels))


@pytest.mark.parametrize("scale", ["per channel", "per tensor", "one", "padded"])
def test_each_element_of_the_host_has_its_own_scale(scale):
    kernels = (
        weight(LAYERS, K, N, seed=6) * np.logspace(0, 3, LAYERS, dtype=np.float32)[:, None, None]
    )
    whole = jax.tree.map(np.array, PaddedKernel.from_dense(kernels))
    value = whole
    if scale != "padded":
        own = {
            "per channel": whole.scale[:, :N],
            "per tensor": whole.scale[:, 0],
            "one": np.float32(0.5),
        }[scale]
        value = FP8Weight(whole.qvalue[:, :N, :K], own, "out_in")
    params = {"w": PaddedKernel.from_dense(jnp.zeros((LAYERS, K, N)))}
    expected = update_params(params, {"w": jax.tree.map(jnp.array, value)})
    assert_same_bits(reload_params(params, {"w": value}), expected)


def test_a_lazy_stack_is_read_element_by_element():
    kernels = weight(2, 3, N, K, seed=6)
    pieces = tuple((kernels[i, j, :20], kernels[i, j, 20:]) for i, j in np.ndindex(2, 3))
    lazy = LazyArray(pieces, (2, 3))
    params = {"w": PaddedKernel.from_dense(jnp.zeros((2, 3, K, N)))}
    loaded = {"w": DenseWeight(lazy, "out_in")}
    updated = reload_params(params, loaded)
    assert_same_bits(updated["w"], PaddedKernel.from_dense(kernels.swapaxes(-1, -2)))


def test_a_lazy_array_whose_pieces_are_no_elements_is_written_whole():
    """A tensor of a file may be a stack by itself."""
    kernels = weight(2, 3, N, K, seed=6)
    for stack, pieces, shape in (
        ((), ((kernels[0, :1], kernels[0, 1:]),), (3,)),
        ((2,), tuple((kernels[i],) for i in range(2)), (2, 3)),
    ):
        params = {"w": PaddedKernel.from_dense(jnp.zeros((*shape, K, N)))}
        whole = kernels[: len(pieces)].reshape(*shape, N, K)
        want = PaddedKernel.from_dense(whole.swapaxes(-1, -2))
        loaded = {"w": DenseWeight(LazyArray(pieces, stack), "out_in")}
        assert_same_bits(update_params(params, loaded)["w"], want)
        assert_same_bits(reload_params(params, loaded)["w"], want)


def test_a_fault_in_a_stack_of_the_host_names_the_element():
    kernels = weight(LAYERS, K, N)
    kernels[2, 3, 4] = np.nan
    params = {"w": PaddedKernel.from_dense(jnp.zeros((LAYERS, K, N)))}
    with pytest.raises(ValueError, match=r"  w\[2\]: a weight is NaN") as caught:
        reload_params(params, {"w": kernels})
    assert "w[1]" not in str(caught.value)
    updated = reload_params(params, {"w": kernels}, allow_nonfinite=True)
    assert_same_bits(updated["w"], PaddedKernel.from_dense(kernels))


def test_shared_buffers_are_still_refused():
    kernel = PaddedKernel.from_dense(jnp.zeros((LAYERS, K, N)))
    with pytest.raises(ValueError, match="share a buffer.*a and b"):
        reload_params(
            {"a": kernel, "b": kernel}, {"a": weight(LAYERS, K, N), "b": weight(LAYERS, K, N)}
        )


@pytest.mark.parametrize("unchecked", [False, True])
def test_an_element_that_is_not_checked_is_not_sent_to_be_checked(unchecked):
    """As the whole is not, with the plugin's kernels and `allow_nonfinite`."""
    served = jax.vmap(PaddedKernel.from_dense)(jnp.zeros((LAYERS, K, N)))
    loaded = np.full((LAYERS, K, N), np.nan, np.float32)
    (write,) = account(served, loaded, partial=False, ignore=())
    bundle = Bundle((write,), Element(ByKernel("in_out", unchecked), 1))
    assert len(bundle.coming) == 1 and len(bundle.read) == (0 if unchecked else 1)
    if unchecked:
        carry, flags = bundle.measure(iter(()))
        assert carry == () and flags.shape == (1, 2) and bool(flags.all())
