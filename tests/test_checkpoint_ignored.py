"""Which modules an entry of an ignore list names, by the rules of each dialect."""

from __future__ import annotations

from typing import Any

import pytest
from checkpoint_dialects import fbgemm, hf_quant, modelopt, quark
from checkpoint_files import compressed, fp8

from jaxfp8.checkpoint._config import read_quantization
from jaxfp8.checkpoint._quantization import Quantization


def read(config: dict[str, Any]) -> Quantization:
    return read_quantization(config, files=None)  # type: ignore[arg-type]


MODULES = (
    "lm_head",
    "model.lm_head",
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.gate_proj",
    "model.layers.10.mlp.gate",
    "model.vision_model.fc1",
    "model.vision_model_2.fc1",
    "adapter_lm_head",
)
LIST = {
    "fp8": lambda entry: fp8(ignored_layers=[entry]),
    "compressed-tensors": lambda entry: compressed(ignore=[entry]),
    "fbgemm_fp8": lambda entry: fbgemm(modules_to_not_convert=[entry]),
    "modelopt": lambda entry: modelopt(ignore=[entry]),
    "exclude_modules": lambda entry: modelopt(exclude_modules=[entry]),
    "hf_quant_config": lambda entry: hf_quant(exclude_modules=[entry]),
    "quark": lambda entry: quark(exclude=[entry]),
}
WHOLE, PATTERN = ("fp8", "compressed-tensors"), ("fp8", "compressed-tensors", "quark")
MODELOPT = ("modelopt", "exclude_modules", "hf_quant_config")
HEADS = ("lm_head", "model.lm_head", "adapter_lm_head")
LAYER_1 = ("model.layers.1.mlp.gate", "model.layers.1.mlp.gate_proj")
# (dialects, entry, modules that it names)
RULES = [
    # A whole name is one everywhere; its end names others only where the reader takes ends.
    ((*WHOLE, "quark"), "lm_head", ("lm_head",)),
    (("fbgemm_fp8", *MODELOPT), "lm_head", ("lm_head", "model.lm_head")),
    ((*LIST,), "model.layers.1.mlp.gate", ("model.layers.1.mlp.gate",)),
    # The beginning, in whole components: layer 1 is not layer 10.
    ((*WHOLE, "quark"), "model.layers.1", ()),
    (("fbgemm_fp8", *MODELOPT), "model.layers.1", LAYER_1),
    # The middle.
    ((*WHOLE, "quark", "fbgemm_fp8"), "vision_model", ()),
    (MODELOPT, "vision_model", ("model.vision_model.fc1",)),
    # The end, in whole components: gate is not gate_proj.
    (
        ("fbgemm_fp8", *MODELOPT),
        "mlp.gate",
        ("model.layers.1.mlp.gate", "model.layers.10.mlp.gate"),
    ),
    # Wildcards.
    (WHOLE, "*lm_head", ()),
    ((*MODELOPT, "quark"), "*lm_head", HEADS),
    ((*MODELOPT, "quark"), "model.layers.1.*", LAYER_1),
    ((*MODELOPT, "quark"), "*.mlp.gate", (MODULES[2], MODULES[4])),
    ((*MODELOPT, "quark"), "model.layers.[2-9].*", ()),
    # Regular expressions: for the beginning after `re:`, and FBGEMM's for whole components.
    (PATTERN, r"re:.*\.mlp\.gate$", (MODULES[2], MODULES[4])),
    (PATTERN, r"re:.*lm_head", HEADS),
    (PATTERN, "re:lm_head", ("lm_head",)),
    (("fbgemm_fp8",), r"model\.layers\.\d+", (*LAYER_1, "model.layers.10.mlp.gate")),
    (("fbgemm_fp8",), "model.vision.*", MODULES[5:7]),
    # Case counts.
    ((*LIST,), "LM_head", ()),
]


@pytest.mark.parametrize(
    ("dialect", "entry", "named"),
    [
        pytest.param(dialect, entry, named, id=f"{dialect}: {entry}")
        for dialects, entry, named in RULES
        for dialect in dialects
    ],
)
def test_an_entry_names(dialect, entry, named):
    quantization = read(LIST[dialect](entry))
    assert tuple(module for module in MODULES if quantization.ignores(module)) == named
    assert quantization.layer(MODULES[2]) is not None


@pytest.mark.parametrize("dialect", LIST)
def test_every_dialect_has_a_rule_for_each_kind(dialect):
    assert sum(dialect in dialects for dialects, _, _ in RULES) >= 6


def test_an_empty_list_names_nothing():
    for config in (
        fbgemm(modules_to_not_convert=None),
        modelopt(ignore=None),
        hf_quant(exclude_modules=[]),
        quark(exclude=[]),
    ):
        assert not any(map(read(config).ignores, MODULES))


def test_a_layer_of_quark_that_is_not_quantized_is_dense():
    nothing = {"weight": None, "input_tensors": None, "output_tensors": None, "bias": None}
    quantization = read(quark(exclude=[], layer_quant_config={"*.mlp.gate": nothing}))
    assert [m for m in MODULES if quantization.ignores(m)] == [MODULES[2], MODULES[4]]
    # The first entry counts, and a name goes before patterns.
    by_name = {"*.mlp.*": nothing, MODULES[2]: quark()["global_quant_config"]}
    quantization = read(quark(layer_quant_config=by_name))
    assert [m for m in MODULES if quantization.ignores(m)] == [MODULES[i] for i in (0, 3, 4)]
    assert quantization.layer(MODULES[2]) is not None
    # Without a global config nothing else is quantized.
    assert read(quark(nothing, layer_quant_config={})).layer("up") is None
    assert (
        read(quark(nothing, layer_quant_config={"linear": quark()["global_quant_config"]})).layer(
            "up"
        )
        is None
    )
