"""From files to a served tree: every format, held to a kernel made without a checkpoint."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import BF16, bits, codes, compressed, fp8, scalar, write, write_config
from update_cases import assert_padding_holds, assert_same_bits, weight

from jaxfp8.checkpoint import load_safetensors
from jaxfp8.padded import DenseWeight, FP8Weight, PaddedKernel, pad_quantized
from jaxfp8.update import reload_params, update_params


N, K = 20, 18


def kernel(*, k: int = K, n: int = N, per_channel: bool = True) -> PaddedKernel:
    return PaddedKernel.from_dense(jnp.zeros((k, n)), per_channel=per_channel)


def padded(value: np.ndarray, scale: np.ndarray) -> PaddedKernel:
    n, k = value.shape
    return pad_quantized(jnp.asarray(value), jnp.asarray(scale), in_features=k, out_features=n)


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32, np.float64], ids=str)
@pytest.mark.parametrize("change", [update_params, reload_params])
def test_float_weights_are_quantized_as_from_dense_does(dtype, change, tmp_path):
    w, bias = weight(N, K).astype(dtype), weight(N).astype(dtype)
    file = write(tmp_path / "model.safetensors", {"up.weight": w, "up.bias": bias})
    loaded = load_safetensors(file)
    assert isinstance(loaded["up"]["kernel"], DenseWeight)
    assert loaded["up"]["kernel"].layout == "out_in"
    params = change({"up": {"kernel": kernel(), "bias": jnp.zeros(N)}}, loaded)
    assert_same_bits(params["up"]["kernel"], PaddedKernel.from_dense(jnp.asarray(w.T)))
    np.testing.assert_array_equal(params["up"]["bias"], bias.astype(np.float32))
    assert_padding_holds(params["up"]["kernel"])


def test_a_float_tree_takes_the_same_file(tmp_path):
    w = weight(N, K)
    loaded = load_safetensors(write(tmp_path / "model.safetensors", {"up.weight": w}))
    params = update_params({"up": {"kernel": jnp.zeros((K, N))}}, loaded)
    np.testing.assert_array_equal(params["up"]["kernel"], w.T)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16], ids=str)
def test_hugging_face_fp8_with_dynamic_activations(name, shape, dtype, tmp_path):
    scale = np.full(shape, 0.0371, dtype)
    tensors = {"up.weight": codes(N, K), f"up.{name}": scale}
    write(tmp_path / "model.safetensors", tensors)
    write_config(tmp_path, fp8())
    loaded = load_safetensors(tmp_path)
    assert loaded.keys() == {"up"} and loaded["up"].keys() == {"kernel"}
    assert loaded["up"]["kernel"].scale.shape == ()
    for per_channel in (True, False):
        params = {"up": {"kernel": kernel(per_channel=per_channel)}}
        got = update_params(params, loaded)["up"]["kernel"]
        wanted = np.full(N if per_channel else (), scale.reshape(()), np.float32)
        assert_same_bits(got, padded(codes(N, K), wanted))


def test_static_activations_become_x_scale(tmp_path):
    # Under a served model that quantizes each row by itself the constant is left out by name.
    tensors = {
        "up.weight": codes(N, K),
        "up.weight_scale": scalar(0.02),
        "up.input_scale": np.array([0.5], np.float32),
    }
    write(tmp_path / "model.safetensors", tensors)
    write_config(tmp_path, fp8(activation_scheme="static"))
    loaded = load_safetensors(tmp_path)
    params = {"up": {"kernel": kernel(), "x_scale": jnp.ones(())}}
    updated = update_params(params, loaded)
    assert updated["up"]["x_scale"].shape == () and float(updated["up"]["x_scale"]) == 0.5
    dynamic = {"up": {"kernel": kernel()}}
    with pytest.raises(ValueError, match="up/x_scale"):
        update_params(dynamic, loaded)
    without = update_params(dynamic, loaded, ignore="*/x_scale")
    assert_same_bits(without["up"]["kernel"], updated["up"]["kernel"])


def test_input_scales_left_out_make_a_layer_dynamic(tmp_path):
    tensors = {
        "up.weight": codes(N, K),
        "up.weight_scale": scalar(0.02),
        "up.input_scale": scalar(0.5),
        "norm.weight": np.arange(K, dtype=np.float32),  # one axis: by default a scale
    }
    write(tmp_path / "model.safetensors", tensors)
    write_config(tmp_path, fp8(activation_scheme="static"))
    loaded = load_safetensors(tmp_path, ignore="*.input_scale")
    assert loaded.keys() == {"up", "norm"} and loaded["up"].keys() == {"kernel"}
    assert loaded["norm"].keys() == {"scale"}
    updated = update_params({"up": {"kernel": kernel()}}, loaded, ignore="norm")
    wanted = np.full(N, 0.02, np.float32)
    assert_same_bits(updated["up"]["kernel"], padded(codes(N, K), wanted))


@pytest.mark.parametrize("shape", [(N,), (N, 1)], ids=str)
def test_compressed_tensors_by_channel(shape, tmp_path):
    scale = np.linspace(0.01, 3, N, dtype=np.float32)
    tensors = {"up.weight": codes(N, K), "up.weight_scale": scale.reshape(shape).astype(BF16)}
    write(tmp_path / "model.safetensors", tensors)
    write_config(tmp_path, compressed())
    got = update_params({"up": {"kernel": kernel()}}, load_safetensors(tmp_path))["up"]["kernel"]
    assert_same_bits(got, padded(codes(N, K), scale.astype(BF16).astype(np.float32)))


def test_compressed_tensors_by_tensor_with_static_activations(tmp_path):
    tensors = {
        "up.weight": codes(N, K),
        "up.weight_scale": np.array([0.25], BF16),
        "up.input_scale": np.array([2], BF16),
    }
    write(tmp_path / "model.safetensors", tensors)
    write_config(tmp_path, compressed("tensor", static=True))
    loaded = load_safetensors(tmp_path)["up"]
    assert loaded["x_scale"].dtype == np.float32 and loaded["x_scale"].shape == ()
    assert bits(loaded["kernel"].scale) == bits(scalar(0.25))


def test_groups_have_their_own_strategies(tmp_path):
    # A target that names the layer goes before "Linear".
    config = compressed("tensor")
    channel = compressed("channel")["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = {**channel, "targets": [r"re:.*\.down$"]}
    scales = {"up": scalar(0.5), "mlp.down": np.full((N, 1), 0.25, np.float32)}
    tensors = {f"{m}.weight": codes(N, K) for m in scales}
    write(
        tmp_path / "model.safetensors",
        tensors | {f"{m}.weight_scale": s for m, s in scales.items()},
    )
    write_config(tmp_path, config)
    loaded = load_safetensors(tmp_path)
    assert loaded["up"]["kernel"].scale.shape == ()
    assert loaded["mlp"]["down"]["kernel"].scale.shape == (N,)


@pytest.mark.parametrize("n", [1, 2])
def test_one_output_feature(n, tmp_path):
    # With one, the scales of a tensor and of its channels have the same shape.
    for strategy, shape in [("tensor", (1,)), ("channel", (n, 1)), (None, (n,))]:
        scale = np.full(shape, 0.5, np.float32)
        write(tmp_path / "model.safetensors", {"up.weight": codes(n, K), "up.weight_scale": scale})
        config = {} if strategy is None else {"quantization_config": compressed(strategy)}
        loaded = load_safetensors(tmp_path, config=config)
        got = update_params({"up": {"kernel": kernel(n=n)}}, loaded)["up"]["kernel"]
        assert_same_bits(got, padded(codes(n, K), np.full(n, 0.5, np.float32)))


IGNORE = {
    "ignored_layers": fp8(ignored_layers=["lm_head", "layers.0.up"]),
    "modules_to_not_convert": fp8(modules_to_not_convert=["lm_head", "layers.0.up"]),
    "both, the first counts": fp8(
        ignored_layers=["layers.0.up"], modules_to_not_convert=["layers.1.up"]
    ),
    "ignore": compressed("tensor", ignore=["lm_head", "layers.0.up"]),
    "ignore with re:": compressed("tensor", ignore=["lm_head", r"re:.*\.0\."]),
}


@pytest.mark.parametrize("config", IGNORE.values(), ids=IGNORE)
def test_ignored_layers_stay_dense(config, tmp_path):
    w = weight(N, K).astype(BF16)
    tensors = {
        "layers.0.up.weight": w,
        "layers.1.up.weight": codes(N, K),
        "layers.1.up.weight_scale": scalar(0.5),
        "lm_head.weight": w,
    }
    write(tmp_path / "model.safetensors", tensors)
    write_config(tmp_path, config)
    loaded = load_safetensors(tmp_path)
    assert isinstance(loaded["layers"]["0"]["up"]["kernel"], DenseWeight)
    assert isinstance(loaded["layers"]["1"]["up"]["kernel"], FP8Weight)


def test_an_ignored_name_is_the_whole_name_and_a_pattern_its_beginning(tmp_path):
    # vLLM: `prefix in ignored_layers`, and `re.match`.
    config = fp8(ignored_layers=["up", "layers.1", "re:0.up"])
    tensors = {"layers.0.up.weight": codes(N, K), "layers.0.up.weight_scale": scalar(1)}
    write(tmp_path / "model.safetensors", tensors)
    loaded = load_safetensors(tmp_path, config={"quantization_config": config})
    assert isinstance(loaded["layers"]["0"]["up"]["kernel"], FP8Weight)


def test_where_the_config_comes_from(tmp_path):
    # An argument, the file's own metadata, and config.json beside it, in this order.
    tensors = {"up.weight": codes(N, K), "up.weight_scale": np.full((N, 1), 0.5, np.float32)}
    tensor, channel = (compressed(strategy) for strategy in ("tensor", "channel"))
    write(tmp_path / "model.safetensors", tensors)
    write_config(tmp_path, tensor)
    with pytest.raises(ValueError, match="strategy tensor"):
        load_safetensors(tmp_path)
    load_safetensors(tmp_path, config={"quantization_config": channel})
    load_safetensors(tmp_path, config=channel)
    (tmp_path / "other.json").write_text(
        json.dumps({"text_config": {"compression_config": channel}})
    )
    load_safetensors(tmp_path, config=tmp_path / "other.json")
    metadata = {"quantization_config": json.dumps(channel)}
    write(tmp_path / "model.safetensors", tensors, metadata=metadata)
    load_safetensors(tmp_path)


def test_weights_alone_are_quantized(tmp_path):
    # vLLM computes these in 16 bits (W8A16); the weights mean the same.
    config = compressed()
    config["config_groups"]["group_0"]["input_activations"] = None
    tensors = {"up.weight": codes(N, K), "up.weight_scale": np.full((N, 1), 0.5, np.float32)}
    write(tmp_path / "model.safetensors", tensors)
    assert load_safetensors(tmp_path, config=config)["up"].keys() == {"kernel"}


def test_it_reads_under_jit_as_well(tmp_path):
    tensors = {f"layers.{i}.up.weight": weight(N, K, seed=i) for i in range(2)}
    file = write(tmp_path / "model.safetensors", tensors)
    names = [(r"layers\.(\d)\.up\.weight", r"up/kernel[\1]")]
    params = {"up": {"kernel": PaddedKernel.from_dense(jnp.zeros((2, K, N)))}}
    loaded = load_safetensors(file, names=names)
    jitted = jax.jit(lambda params: update_params(params, loaded))
    assert_same_bits(jitted(params), update_params(params, loaded))
