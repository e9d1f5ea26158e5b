"""Bad input: configs of FBGEMM and ModelOpt that are not read, or contradict the tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bad_input import Case
from bad_input_checkpoint import loading
from bad_input_checkpoint_saved import kernel, saving
from checkpoint_dialects import fbgemm, hf_quant, modelopt
from checkpoint_files import codes, into, scalar, write
from update_cases import weight


N, K = 20, 18
UP = {"up.weight": codes(N, K), "up.weight_scale": scalar(0.5)}
STATIC = {**UP, "up.input_scale": scalar(1)}
PER_CHANNEL = {**UP, "up.weight_scale": np.ones((N, 1), "f4")}


def beside(name: str, content: Any, *says: str) -> Case:
    """A checkpoint with hf_quant_config.json beside it."""

    def prepare(folder: Path) -> tuple[Any, Callable[[], object]]:
        write(folder / "model.safetensors", STATIC)
        (folder / "hf_quant_config.json").write_text(
            content if isinstance(content, str) else json.dumps(content)
        )
        return into(folder)

    return Case(name, prepare, ValueError, ("hf_quant_config.json", *says))


FBGEMM = [
    loading(
        "FBGEMM by tensor",
        UP,
        "config.json",
        "'up.weight_scale'",
        "strategy channel",
        config=fbgemm(),
    ),
    loading(
        "FBGEMM with a static scale",
        {**PER_CHANNEL, "up.input_scale": scalar(1)},
        "'fbgemm_fp8'",
        "dynamic scales",
        "'up.input_scale'",
        "`ignore`",
        config=fbgemm(),
    ),
    *(
        loading(
            f"FBGEMM with a bound of {bound!r}",
            PER_CHANNEL,
            "config.json",
            f"activation_scale_ub {bound!r}",
            "a positive number",
            config=fbgemm(activation_scale_ub=bound),
        )
        for bound in (-1200.0, 0, True, "1200")
    ),
    loading(
        "FBGEMM with a module that is no pattern",
        PER_CHANNEL,
        "`modules_to_not_convert`",
        "'*lm_head'",
        "no pattern",
        config=fbgemm(modules_to_not_convert=["*lm_head"]),
    ),
    loading(
        "FBGEMM's experts",
        {"experts.gate_up_proj": codes(40, 18).reshape(2, 20, 18)},
        "'experts.gate_up_proj'",
        "a name that ends in `weight`",
        config=fbgemm(),
    ),
]

MODELOPT = [
    *(
        loading(
            f"ModelOpt's {algorithm}",
            STATIC,
            "config.json",
            f"quant_algo {algorithm!r}",
            "only 'FP8' and 'FP8_PER_CHANNEL_PER_TOKEN'",
            config=modelopt(algorithm),
        )
        for algorithm in ("NVFP4", "W4A8_AWQ", "MIXED_PRECISION", "W4A16_NVFP4", "fp9")
    ),
    *(
        loading(
            f"ModelOpt's {algorithm}, of blocks",
            STATIC,
            f"quant_algo {algorithm!r} (block-quantized)",
            config=modelopt(algorithm),
        )
        for algorithm in ("FP8_PB_WO", "fp8_pb_wo", "MXFP8")
    ),
    loading(
        "ModelOpt's other method",
        STATIC,
        "'modelopt_fp4'",
        "quant_algo 'NVFP4'",
        config=modelopt("NVFP4", quant_method="modelopt_fp4"),
    ),
    loading("ModelOpt without an algorithm", STATIC, "quant_algo None", config=modelopt(None)),
    loading(
        "ModelOpt's details that are no object",
        STATIC,
        "quant_algo None",
        config={"quant_method": "modelopt", "quantization": "FP8"},
    ),
    beside("another algorithm in hf_quant_config.json", hf_quant("NVFP4"), "quant_algo 'NVFP4'"),
    beside("hf_quant_config.json that is no JSON", "{'a'}", "is not JSON", "again"),
    beside("hf_quant_config.json that is a list", "[]", "a JSON object"),
    beside(
        "modules excluded by a string",
        hf_quant(exclude_modules="lm_head"),
        "`exclude_modules`",
        "'lm_head'",
        "a list of strings",
    ),
    beside(
        "an excluded layer that is quantized",
        hf_quant(exclude_modules=["u*"]),
        "'up.weight'",
        "'up' is not quantized",
    ),
    loading(
        "ModelOpt without its static scale",
        UP,
        "config.json",
        "'up.input_scale'",
        "{'quant_method': 'fp8'}",
        config=modelopt(),
    ),
    loading(
        "ModelOpt by channel with a scale of the tensor",
        UP,
        "'up.weight_scale'",
        "strategy channel",
        config=modelopt("FP8_PER_CHANNEL_PER_TOKEN"),
    ),
    loading(
        "ModelOpt by tensor with scales of channels",
        {**PER_CHANNEL, "up.input_scale": scalar(1)},
        "'up.weight_scale'",
        "strategy tensor",
        config=modelopt(),
    ),
    loading(
        "ModelOpt's scale of blocks",
        {**STATIC, "up.weight_scale": np.ones((1, 1, 2, 1), "f4")},
        "'up.weight_scale'",
        "(1, 1, 2, 1)",
        config=modelopt(),
    ),
    loading(
        "an input to be scaled before",
        {**STATIC, "up.pre_quant_scale": np.ones(K, "f4")},
        "'up.weight'",
        "'up.pre_quant_scale'",
        "in the model",
        "`ignore`",
        config=modelopt(),
    ),
]

OTHERS = [
    loading(
        "a method of 4 bits",
        {"up.weight": weight(N, K)},
        "config.json",
        "quant_method 'gptq'",
        "'fp8', 'compressed-tensors', 'fbgemm_fp8', 'modelopt' and 'quark'",
        config={"quant_method": "gptq", "bits": 4},
    ),
    loading(
        "a method that is no name",
        STATIC,
        "quant_method ['fp8']",
        config={"quant_method": ["fp8"]},
    ),
    saving(
        "beside what ModelOpt says of other files",
        lambda: {"up": {"kernel": kernel()}},
        ValueError,
        "`path`",
        "hf_quant_config.json",
        "Remove it",
        there="hf_quant_config.json",
    ),
]

CASES = [*FBGEMM, *MODELOPT, *OTHERS]
