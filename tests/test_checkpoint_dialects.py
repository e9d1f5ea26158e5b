"""FBGEMM's, ModelOpt's and Quark's checkpoints into a padded model: values exact, q, k, v fused."""

from __future__ import annotations

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_dialects import (
    DIALECTS,
    FUSE,
    LAYERS,
    NAMES,
    SHARDS,
    Dialect,
    K,
    fbgemm,
    hf_quant,
    layer,
    modelopt,
    quark,
    quark_per_channel,
    spec,
)
from checkpoint_files import E4M3, bits, codes, fp8, scalar, write, write_config
from update_cases import assert_padding_holds

from jaxfp8.checkpoint import load_safetensors
from jaxfp8.linen import PaddedFP8Dense
from jaxfp8.padded import DenseWeight, FP8Weight, PaddedKernel
from jaxfp8.quantize import quantize
from jaxfp8.update import reload_params, update_params


N = sum(SHARDS.values())
X = jnp.full((2, K), 1.5, jnp.bfloat16)


class Model(nn.Module):
    """q, k and v as one layer, another, and a dense head."""

    static: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        options = {"use_bias": False, "static_x_scale": self.static}
        qkv = PaddedFP8Dense(N, name="qkv", **options)(x)
        down = PaddedFP8Dense(LAYERS["mlp.down_proj"], name="down_proj", **options)(x)
        return qkv, down, nn.Dense(5, use_bias=False, name="lm_head")(x)


def logical(kernel: PaddedKernel) -> np.ndarray:
    """value * scale in float64, `[N, K]`: exact."""
    value = np.asarray(kernel.qvalue, np.float64)[: kernel.out_features, : kernel.in_features]
    return value * np.asarray(kernel.scale, np.float64)[: kernel.out_features, None]


def exact(tensors: dict[str, np.ndarray], module: str) -> np.ndarray:
    value = tensors[f"model.layers.0.{module}.weight"].astype(np.float64)
    return value * np.asarray(tensors[f"model.layers.0.{module}.weight_scale"], np.float64)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
@pytest.mark.parametrize("change", [update_params, reload_params])
def test_a_model_gets_the_values_of_the_checkpoint(dialect: Dialect, change, tmp_path):
    tensors = dialect.save(tmp_path)
    loaded = load_safetensors(tmp_path, names=NAMES, fuse=FUSE)
    model = Model(dialect.static)
    params = model.init(jax.random.key(0), X)["params"]
    got = change(params, loaded)
    fused = np.concatenate([exact(tensors, f"self_attn.{name}") for name in SHARDS])
    for module, wanted in {"qkv": fused, "down_proj": exact(tensors, "mlp.down_proj")}.items():
        np.testing.assert_array_equal(logical(got[module]["kernel"]), wanted)
        assert_padding_holds(got[module]["kernel"])
        assert ("x_scale" in loaded[module]) == dialect.static
    codes_of = [tensors[f"model.layers.0.self_attn.{name}.weight"] for name in SHARDS]
    assert bits(got["qkv"]["kernel"].qvalue[:N, :K]) == bits(np.concatenate(codes_of))
    if dialect.static:  # The largest of q's, k's and v's: 0.5, 1 and 1.5.
        assert float(got["qkv"]["x_scale"]) == 1.5 and float(got["down_proj"]["x_scale"]) == 2
    np.testing.assert_array_equal(
        got["lm_head"]["kernel"], tensors["lm_head.weight"].T.astype(np.float32)
    )
    qkv, down, _ = model.apply({"params": got}, X)  # And such a model runs.
    # 1.5 is exact in e4m3 by its own scale and by the static 1.5; bfloat16 rounds by 2^-9.
    wanted = np.asarray(X, np.float64) @ fused.T
    np.testing.assert_allclose(np.asarray(qkv, np.float64), wanted, rtol=2**-8, atol=1e-3)
    assert down.shape == (2, LAYERS["mlp.down_proj"])


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_what_the_config_excludes_is_dense_and_the_rest_is_not(dialect, tmp_path):
    tensors = dialect.save(tmp_path)
    loaded = load_safetensors(tmp_path, names=NAMES)
    kinds = {module: type(loaded[module]["kernel"]) for module in loaded}
    quantized = dict.fromkeys([*SHARDS, "down_proj"], FP8Weight)
    assert kinds == {**quantized, "lm_head": DenseWeight}
    for name in SHARDS:
        weight = loaded[name]["kernel"]
        assert weight.scale.shape == ((SHARDS[name],) if dialect.per_channel else ())
        assert weight.scale.dtype == np.float32
    del tensors["lm_head.weight"]
    config = json.loads((tmp_path / dialect.file).read_text())
    again = load_safetensors(
        write(tmp_path / "other" / "model.safetensors", tensors), config=config, names=NAMES
    )
    assert bits(again["q_proj"]["kernel"].scale) == bits(loaded["q_proj"]["kernel"].scale)
    assert ("x_scale" in again["q_proj"]) == dialect.static


def test_an_excluded_weight_in_e4m3_contradicts_the_config_of_every_dialect(tmp_path):
    for dialect in DIALECTS.values():
        tensors = dialect.save(tmp_path)
        tensors |= {"lm_head.weight": codes(5, K), "lm_head.weight_scale": scalar(1)}
        write(tmp_path / "model.safetensors", tensors)
        with pytest.raises(ValueError, match="'lm_head' is not quantized"):
            load_safetensors(tmp_path)
        (tmp_path / "config.json").unlink()


def test_config_json_goes_before_hf_quant_config_json(tmp_path):
    # As in vLLM. Checkpoints of ModelOpt have both.
    DIALECTS["modelopt by channel"].save(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(hf_quant("FP8")))
    load_safetensors(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"hf_quant_config\.json .* static"):
        load_safetensors(tmp_path)
    load_safetensors(tmp_path, config=modelopt("FP8_PER_CHANNEL_PER_TOKEN"))
    (tmp_path / "config.json").write_text('{"quantization": {"group_size": 64, "bits": 4}}')
    with pytest.raises(ValueError, match=r"hf_quant_config\.json"):  # MLX's key is another thing.
        load_safetensors(tmp_path)


def test_static_scales_left_out_make_layers_dynamic(tmp_path):
    for name in ("modelopt", "quark"):
        DIALECTS[name].save(tmp_path)
        loaded = load_safetensors(tmp_path, names=NAMES, fuse=FUSE, ignore="*.input_scale")
        params = Model(static=False).init(jax.random.key(0), X)["params"]
        update_params(params, loaded)


def test_layers_of_quark_have_their_own_configs(tmp_path):
    # A name goes before patterns, the first pattern before the second, and all before the global.
    per_channel = layer(spec("per_channel"), spec("per_channel", dynamic=True))
    config = quark_per_channel()
    config["global_quant_config"] = layer(spec(), spec(dynamic=True))
    config["layer_quant_config"] = {
        "h.*": layer(None, None),
        "*down_proj": per_channel,
        "h.0.down_proj": layer(spec(), spec()),
        "*.gate": per_channel,
    }
    tensors = {"h.1.gate.weight": codes(20, K).astype(np.float32)}  # "h.*" hits it first.
    for module, shape in {"up": (), "1.down_proj": (20,), "h.0.down_proj": ()}.items():
        tensors[f"{module}.weight"] = codes(20, K)
        tensors[f"{module}.weight_scale"] = np.full(shape, 0.5, np.float32)
    tensors["h.0.down_proj.input_scale"] = scalar(2)
    write(tmp_path / "model.safetensors", tensors)
    write_config(tmp_path, config)
    loaded = load_safetensors(tmp_path)
    assert float(loaded["h"]["0"]["down_proj"]["x_scale"]) == 2
    assert loaded["1"]["down_proj"]["kernel"].scale.shape == (20,)
    assert isinstance(loaded["h"]["1"]["gate"]["kernel"], DenseWeight)


def test_rotations_within_the_weights_are_none_to_compute(tmp_path):
    rotation = {"name": "rotation", "r1": True, "r2": True, "r3": False, "r4": False}
    dialect = Dialect(quark(algo_config=[rotation]), per_channel=False, static=True)
    dialect.save(tmp_path)
    load_safetensors(tmp_path)


@pytest.mark.parametrize("bound", [1200.0, 1, None])
def test_a_bound_on_the_scale_is_accepted_and_is_a_clip_of_x(bound, tmp_path):
    dialect = Dialect(fbgemm(activation_scale_ub=bound), per_channel=True, static=False)
    dialect.save(tmp_path)
    load_safetensors(tmp_path)
    if bound is None:
        return
    # FBGEMM's `quantize_fp8_per_row`: the scale of a row is of the smaller of maximum and bound.
    x = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32) * bound
    largest = np.minimum(np.abs(x).max(axis=1, keepdims=True), np.float32(bound))
    scale = largest * np.float32(1 / 448)
    wanted = np.clip(x / scale, -448, 448).astype(E4M3)
    got, got_scale = quantize(jnp.clip(jnp.asarray(x), -bound, bound), axis=-1)
    np.testing.assert_array_equal(got_scale, scale)
    assert bits(got) == bits(wanted)
    assert bits(quantize(jnp.asarray(x), axis=-1)[0]) != bits(wanted)


def test_a_bound_stored_as_a_tensor_is_accounted_for(tmp_path):
    tensors = DIALECTS["fbgemm_fp8"].save(tmp_path)
    tensors["model.layers.0.mlp.down_proj.input_scale_ub"] = np.array([1200], np.float32)
    write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"ignore=\('\*\.input_scale_ub',\)"):
        load_safetensors(tmp_path, names=NAMES)
    load_safetensors(tmp_path, names=NAMES, ignore="*.input_scale_ub")


@pytest.mark.parametrize("scales", [("k_scale", "v_scale"), ("output_scale", "output_scale")])
def test_scales_of_the_kv_cache_are_accounted_for(scales, tmp_path):
    # ModelOpt's k_proj.k_scale and v_proj.v_scale; Quark's k_proj.output_scale.
    tensors = DIALECTS["modelopt"].save(tmp_path)
    for name, scale in zip(("k_proj", "v_proj"), scales, strict=True):
        tensors[f"model.layers.0.self_attn.{name}.{scale}"] = scalar(1)
    write(tmp_path / "model.safetensors", tensors)
    patterns = sorted({f"*.{scale}" for scale in scales})
    hint = f"ignore=({', '.join(map(repr, patterns))},)"
    for options in ({"names": NAMES}, {"fuse": FUSE}, {"names": NAMES, "fuse": FUSE}):
        with pytest.raises(ValueError) as caught:
            load_safetensors(tmp_path, **options)
        assert hint in str(caught.value) and "k_proj" in str(caught.value)
        loaded = load_safetensors(tmp_path, ignore=patterns, **options)
        assert scales[0] not in str(jax.tree.structure(loaded))
    # By their default names they are parameters, which a model may have; ours lists them.
    loaded = load_safetensors(tmp_path)["model"]["layers"]["0"]["self_attn"]
    params = {"k_proj": {"kernel": PaddedKernel.from_dense(jnp.zeros((K, 10)))}}
    params["k_proj"]["x_scale"] = jnp.ones(())
    with pytest.raises(ValueError, match=rf"Unexpected in `loaded` \(1\): k_proj/{scales[0]}"):
        update_params(params, {"k_proj": loaded["k_proj"]})
    update_params(params, {"k_proj": loaded["k_proj"]}, ignore=f"*/{scales[0]}")


def test_a_string_is_no_list_of_modules(tmp_path):
    # It would be one of letters.
    dialect = Dialect(fp8(ignored_layers="lm_head"), per_channel=False, static=False)
    dialect.save(tmp_path)
    with pytest.raises(ValueError, match="`ignored_layers` .* must be a list of strings"):
        load_safetensors(tmp_path)
