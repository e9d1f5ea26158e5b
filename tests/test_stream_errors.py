"""A stream that goes wrong: what is refused, what it changes, and what is said of the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_reload_sharing import DeviceFailure, assert_untouched, failing_from, snapshot
from update_cases import assert_same_bits, served_tree, trainer_tree, weight

import jaxfp8._donate
from jaxfp8 import FP8Weight, PaddedKernel, ReloadError, reload_stream, update_params


def complete(stream, loaded):
    """Put all that the stream still lacks."""
    for path in stream.missing:
        module, name = path.split("/")
        stream.put(path, loaded[module][name])
    return stream.finish()


NAN = weight(64, 100)
NAN[63, 99] = np.nan


@pytest.mark.parametrize(
    ("put", "error", "pattern"),
    [
        (("Dense_0/kernel", NAN), ValueError, "Dense_0/kernel: a weight is NaN or infinite"),
        (("Dense_0/kernel", weight(100, 64)), ValueError, "Dense_0/kernel: its shape is"),
        (("Dense_0/kernel", np.zeros((64, 100), int)), TypeError, "Dense_0/kernel: .*int64"),
        (("Dense_0/kernel", {"a": weight(2)}), TypeError, "takes one leaf.*put_tree"),
        (("Dense_0/kernel", None), TypeError, "takes one leaf"),
        (("Dense_0/kernle", weight(64, 100)), ValueError, "Did you mean 'Dense_0/kernel'"),
        (("nothing/like/it", weight(64, 100)), ValueError, "no such leaf. Leave it out, or name"),
        (("Dense_0/bias", weight(100) * np.inf), ValueError, "Dense_0/bias: a weight is NaN"),
        (
            ("Dense_0/kernel", FP8Weight(jnp.ones((64, 100), jnp.float8_e4m3fn), jnp.zeros(100))),
            ValueError,
            "Dense_0/kernel: a scale is not positive",
        ),
        (("Dense_1/bias", weight(10)), ValueError, "Dense_1/bias: it was already written"),
    ],
)
def test_a_refused_leaf_is_unchanged_and_the_stream_usable(put, error, pattern):
    loaded = trainer_tree()
    params = served_tree()
    expected = update_params(params, loaded)
    with reload_stream(params) as stream:
        stream.put("Dense_1/bias", loaded["Dense_1"]["bias"])
        before = snapshot(stream.params)
        for _ in range(2):
            with pytest.raises(error, match=pattern) as caught:
                stream.put(*put)
        message = str(caught.value)
        assert "takes one leaf" in message or "nothing of this leaf has been changed" in message
        assert_untouched(stream.params, before)
        assert stream.updated == ("Dense_1/bias",)
        assert_same_bits(complete(stream, loaded), expected)


def test_all_faults_of_a_subtree_are_listed_and_none_of_it_is_written():
    loaded = trainer_tree()
    with reload_stream(served_tree()) as stream:
        before = snapshot(stream.params)
        bad = {"kernel": weight(3, 4), "bias": weight(100), "extra": weight(2)}
        with pytest.raises(ValueError, match=r"(?s)these 3 leaves.*extra.*kernel: its shape"):
            stream.put_tree("Dense_0", bad)
        with pytest.raises(ValueError, match="Dense_0/kernel: a weight is NaN"):
            stream.put_tree("Dense_0", {"kernel": NAN, "bias": weight(100)})
        assert_untouched(stream.params, before)
        assert_same_bits(complete(stream, loaded), update_params(served_tree(), loaded))


def test_finish_names_what_is_missing_and_leaves_the_stream_open():
    loaded = trainer_tree()
    with reload_stream(served_tree()) as stream:
        stream.put_tree("Dense_0", loaded["Dense_0"])
        stream.put_tree("Dense_1", loaded["Dense_1"])
        with pytest.raises(ValueError, match=r"LayerNorm_0/bias, LayerNorm_0/scale\..*partial="):
            stream.finish()
        assert_same_bits(complete(stream, loaded), update_params(served_tree(), loaded))


def test_after_finish_and_outside_of_the_block():
    stream = reload_stream(served_tree())
    with pytest.raises(RuntimeError, match="has not been entered: write `with reload_stream"):
        stream.put("Dense_0/bias", weight(100))
    with stream:
        stream.put_tree("", trainer_tree())
        stream.finish()
        for call in (
            stream.finish,
            lambda: stream.put("Dense_0/bias", weight(100)),
            lambda: stream.put_tree("Dense_0", {}),
        ):
            with pytest.raises(RuntimeError, match="is finished"):
                call()
    with pytest.raises(RuntimeError, match="cannot be entered"), stream:
        pass


def test_an_exception_after_finish_passes():
    with pytest.raises(KeyError), reload_stream(served_tree()) as stream:
        stream.put_tree("", trainer_tree())
        stream.finish()
        raise KeyError("mine")


def test_left_without_finish():
    params, loaded = served_tree(), trainer_tree()
    expected = update_params(params, loaded)
    with pytest.raises(ReloadError, match="was left before `finish`") as caught:
        with reload_stream(params) as stream:
            stream.put("Dense_1/kernel", loaded["Dense_1"]["kernel"])
            stream.put("LayerNorm_0/bias", loaded["LayerNorm_0"]["bias"])
    error = caught.value
    assert error.updated == ("Dense_1/kernel", "LayerNorm_0/bias") and error.failed == ()
    assert "Already new: Dense_1/kernel, LayerNorm_0/bias." in str(error)
    assert "Still old: Dense_0/bias, Dense_0/kernel, Dense_1/bias, LayerNorm_0/scale." in str(error)
    with pytest.raises(RuntimeError, match="was left"):
        stream.put("Dense_0/bias", loaded["Dense_0"]["bias"])
    # The tree is whole: new where it says so, old elsewhere; and can be completed.
    assert error.params["Dense_0"]["bias"] is params["Dense_0"]["bias"]
    assert_same_bits(error.params["Dense_1"]["kernel"], expected["Dense_1"]["kernel"])
    with reload_stream(error.params) as stream:
        stream.put_tree("", {"Dense_0": loaded["Dense_0"]})
        stream.put("Dense_1/bias", loaded["Dense_1"]["bias"])
        stream.put("LayerNorm_0/scale", loaded["LayerNorm_0"]["scale"])
        assert_same_bits(stream.finish(partial=True), expected)


def test_left_by_an_exception():
    """Of the caller's, of a check, of the iterator: the same error, and its cause."""
    loaded = trainer_tree()

    def pairs():
        yield "Dense_0/bias", loaded["Dense_0"]["bias"]
        raise OSError("disk")

    def check(stream):
        stream.put_all([("Dense_0/bias", weight(100)), ("Dense_0/bias", weight(100))])

    for act, cause in ((lambda s: s.put_all(pairs()), OSError), (check, ValueError)):
        with pytest.raises(ReloadError, match=f"by {cause.__name__}: ") as caught:
            with reload_stream(served_tree()) as stream:
                act(stream)
        assert caught.value.updated == ("Dense_0/bias",)
        assert isinstance(caught.value.__cause__, cause)


def test_before_anything_is_written_an_exception_passes_and_nothing_has_changed():
    params = served_tree()
    before = snapshot(params)
    with pytest.raises(ValueError, match="no such leaf"):
        with reload_stream(params) as stream:
            stream.put("Dense_9/bias", weight(100))
    with pytest.raises(OSError, match="disk"), reload_stream(params):
        raise OSError("disk")
    with pytest.raises(ReloadError, match="Already new: nothing"), reload_stream(params):
        pass
    assert_untouched(params, before)


def test_an_interrupt_stays_an_interrupt_and_carries_the_state():
    with pytest.raises(KeyboardInterrupt) as caught:
        with reload_stream(served_tree()) as stream:
            stream.put("Dense_0/bias", weight(100))
            raise KeyboardInterrupt
    assert "Already new: Dense_0/bias." in "".join(caught.value.__notes__)
    np.testing.assert_array_equal(jnp.copy(stream.params["Dense_0"]["bias"]), weight(100))


def test_readers_of_the_old_tree_get_an_error_never_a_mixture():
    params = served_tree()
    read = jax.jit(lambda tree: jax.tree.map(jnp.sum, tree))
    with reload_stream(params) as stream:
        read(params)
        stream.put("Dense_0/bias", weight(100))
        with pytest.raises((RuntimeError, ValueError), match="deleted"):
            read(params)
        stream.finish(partial=True)


def test_a_device_error_closes_the_stream(monkeypatch):
    params, loaded = served_tree(), trainer_tree()
    expected = update_params(params, loaded)
    monkeypatch.setattr(jaxfp8._donate, "_compile", failing_from(2))
    with pytest.raises(ReloadError, match="RESOURCE_EXHAUSTED") as caught:
        with reload_stream(params) as stream:
            stream.put("LayerNorm_0/bias", loaded["LayerNorm_0"]["bias"])
            stream.put_tree("Dense_0", loaded["Dense_0"])
    error = caught.value
    assert error.updated == ("LayerNorm_0/bias", "Dense_0/bias")
    assert error.failed == ("Dense_0/kernel",) and isinstance(error.__cause__, DeviceFailure)
    assert "Still old: Dense_1/bias, Dense_1/kernel, LayerNorm_0/scale." in str(error)
    with pytest.raises(RuntimeError, match="failed on the device"):
        stream.finish()
    monkeypatch.undo()
    with reload_stream(error.params) as stream:
        stream.put_tree("", loaded)
        assert_same_bits(stream.finish(), expected)


def test_trees_that_cannot_be_overwritten_are_refused_at_once():
    table = jnp.zeros((30, 8))
    with pytest.raises(ValueError, match="share a buffer.*embed and head"):
        reload_stream({"embed": table, "head": table})
    with pytest.raises(TypeError, match="Dense_0/bias of `params` is a ShapeDtypeStruct"):
        reload_stream(jax.eval_shape(served_tree))
    with pytest.raises(TypeError, match="Dense_0/kernel: .*bfloat16"):
        reload_stream(jax.tree.map(lambda a: a.astype(jnp.bfloat16), served_tree()))
    params = served_tree()
    with reload_stream(params) as stream:
        stream.put("Dense_0/bias", weight(100))
        stream.finish(partial=True)
    with pytest.raises(ValueError, match="Dense_0/bias: .*is deleted"):
        reload_stream(params)


def test_under_a_trace():
    params = {"a": jnp.zeros(3), "d": {"kernel": PaddedKernel.from_dense(weight(4, 5))}}
    before = snapshot(params)

    def put(w):
        with reload_stream(params) as stream:
            stream.put("d/kernel", w)

    with pytest.raises(TypeError, match="`update_params`"):
        jax.jit(put)(weight(4, 5))
    with pytest.raises(TypeError, match="traced.*`update_params`"):
        jax.jit(lambda tree: reload_stream(tree))(params)
    assert_untouched(params, before)


@pytest.mark.parametrize("item", [["Dense_0/bias", weight(100)], ("Dense_0/bias",), "ab", (1, 2)])
def test_items_that_are_no_pairs(item):
    with pytest.raises(TypeError, match=r"\(path, value\)"), reload_stream(served_tree()) as stream:
        stream.put_all([item])
