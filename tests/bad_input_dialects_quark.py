"""Bad input: configs of AMD Quark that are not read, or contradict the tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from bad_input import Case
from bad_input_checkpoint import loading
from bad_input_dialects import PER_CHANNEL, STATIC, K
from checkpoint_dialects import layer, quark, quark_per_channel, spec
from checkpoint_files import scalar


def quark_layer(name: str, config: Any, *says: str) -> Case:
    """Quark's with another `global_quant_config`."""
    says = ("config.json", "`global_quant_config`", *says)
    return loading(name, STATIC, *says, config=quark(config))


CASES = [
    quark_layer("Quark in groups", layer(spec("per_group"), spec()), "'per_group'", "per_channel"),
    quark_layer("Quark of integers", layer(spec(dtype="int8"), spec()), "'int8'", "fp8_e4m3"),
    quark_layer("Quark of e5m2", layer(spec(dtype="fp8_e5m2"), spec()), "'fp8_e5m2'"),
    quark_layer("Quark of two stages", layer([spec(), spec()], spec()), "weights as [{"),
    quark_layer("Quark of dynamic weights", layer(spec(dynamic=True), spec()), "static"),
    quark_layer("Quark, asymmetric", layer(spec(symmetric=False), spec()), "'symmetric': False"),
    quark_layer("Quark by input", layer(spec("per_channel", ch_axis=1), spec()), "'ch_axis': 1"),
    quark_layer("Quark of inputs alone", layer(None, spec()), "weights as None"),
    quark_layer(
        "Quark static by channel",
        layer(spec(), spec("per_channel")),
        "activations as",
        "'per_channel'",
        "dynamic activations",
    ),
    quark_layer("Quark of fp4 inputs", layer(spec(), spec(dtype="fp4")), "activations as", "'fp4'"),
    quark_layer("Quark of results", layer(spec(), spec(), output_tensors=spec()), "output_tensors"),
    quark_layer("Quark of biases", layer(spec(), spec(), bias=spec()), "quantizes bias"),
    quark_layer("Quark without an object", "fp8", "must be an object", "'fp8'"),
    loading(
        "Quark of results that are no cache",
        STATIC,
        "`layer_quant_config['*o_proj']`",
        "output_tensors",
        config=quark(layer_quant_config={"*o_proj": layer(spec(), spec(), output_tensors=spec())}),
    ),
    loading(
        "Quark with a layer of 4 bits",
        STATIC,
        "`layer_quant_config['*experts*']`",
        "'fp4'",
        config=quark(layer_quant_config={"*experts*": layer(spec(dtype="fp4"), None)}),
    ),
    loading(
        "Quark by class",
        STATIC,
        "`layer_type_quant_config`",
        config=quark(layer_type_quant_config={"Linear": layer(spec(), spec())}),
    ),
    *(
        loading(
            f"Quark with rotations ({key})",
            STATIC,
            "`algo_config`",
            "rotations",
            config=quark(algo_config=[{"name": "smooth"}, {"name": "rotation", key: value}]),
        )
        for key, value in {
            "r4": True,
            "online_r1_rotation": True,
            "online_config": {"online_rotation_layers": ["up"]},
        }.items()
    ),
    loading(
        "Quark's rotation as a tensor",
        {**PER_CHANNEL, "up.input_rotation": np.ones((K, K), "i8")},
        "'up.input_rotation'",
        "in the model",
        config=quark_per_channel(),
    ),
    loading(
        "Quark with nothing quantized, and a layer that is",
        STATIC,
        "'up.weight'",
        "quantizes only",
        config=quark(layer(None, None), layer_quant_config={"h": layer(spec(), spec())}),
    ),
    loading(
        "Quark with nothing quantized",
        STATIC,
        "'up.weight'",
        "quantizes no layer",
        config=quark(layer(None, None), layer_quant_config={}),
    ),
    loading(
        "Quark's layer that is not quantized",
        STATIC,
        "'up.weight'",
        "'up' is not quantized",
        config=quark(layer_quant_config={"u?": layer(None, None)}),
    ),
    loading(
        "Quark with a dynamic input and its scale",
        {**PER_CHANNEL, "up.input_scale": scalar(1)},
        "'up.input_scale'",
        "dynamic",
        config=quark_per_channel(),
    ),
    loading(
        "Quark excluding by a number", STATIC, "`exclude`", "a list", config=quark(exclude=[1])
    ),
]
