"""The `quantization_config` of what is saved, in the dialect that others read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Layer:
    """How a dense layer is saved.

    Attributes:
        module: its name in the checkpoint.
        strategy: "tensor" or "channel" if it is quantized, None if it is float.
        static: whether its input has a stored scale.
    """

    module: str
    strategy: str | None
    static: bool = False


def quantization_config(layers: Sequence[Layer]) -> dict[str, Any] | None:
    """`fp8` if that can say it, else compressed-tensors; None if nothing is quantized.

    Under `fp8` vLLM gives a weight one scale (`Fp8LinearMethod.create_weights`).
    """
    quantized = [layer for layer in layers if layer.strategy is not None]
    dense = sorted({layer.module for layer in layers if layer.strategy is None})
    if not quantized:
        return None
    kinds = {(layer.strategy, layer.static) for layer in quantized}
    if kinds <= {("tensor", True)} or kinds <= {("tensor", False)}:
        return {
            "quant_method": "fp8",
            "activation_scheme": "static" if quantized[0].static else "dynamic",
            "ignored_layers": dense,
        }
    groups = {}
    for number, (strategy, static) in enumerate(sorted(kinds, key=str)):
        members = [a.module for a in quantized if (a.strategy, a.static) == (strategy, static)]
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else members,
            "weights": _float8(strategy, dynamic=False),
            "input_activations": _float8("tensor" if static else "token", dynamic=not static),
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
    }


def _float8(strategy: str | None, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
    }
