"""Tensors that belong together: a weight, its scale, and the scale of its layer's input.

A tensor's dtype says whether it is quantized; the config must agree with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jaxfp8.checkpoint._files import Tensor
from jaxfp8.checkpoint._quantization import Quantization
from jaxfp8.quantize import FP8_DTYPE


WEIGHT = "weight"
# All multiply: weight = value * scale. Transformers calls it an inverse, as DeepSeek's files do.
# The last of each are of Mistral's own layout (vLLM: `MistralForCausalLM.mistral_mapping`).
WEIGHT_SCALES = ("weight_scale", "weight_scale_inv", "qscale_weight")
INPUT_SCALES = ("input_scale", "activation_scale", "qscale_act")
SCALE_DTYPES = ("bfloat16", "float16", "float32")
# What x is to be multiplied by before the layer: ModelOpt's AWQ and SmoothQuant, Quark's rotations.
BEFORE_INPUT = ("pre_quant_scale", "input_rotation")


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor with what belongs to it.

    Attributes:
        tensor: it.
        scale: float32 `[]` or `[N]` if it is e4m3, else None.
        input_scale: float32 `[]`, the static scale of the layer's input, or None.
        ignored: whether the config leaves its module dense.
    """

    tensor: Tensor
    scale: np.ndarray | None = None
    input_scale: np.ndarray | None = None
    ignored: bool = False


def pair_scales(
    tensors: Mapping[str, Tensor], quantization: Quantization, left_out: Collection[str] = ()
) -> list[Weight]:
    """The tensors of a checkpoint, scales put to their weights.

    Args:
        tensors: by name.
        quantization: what the config says.
        left_out: names of tensors that the caller ignores. A layer whose input scale is among
            them is taken as one of dynamic scales.

    Raises:
        ValueError: if a scale is missing, alone, doubled or of a shape that contradicts the
            config, or an FP8 weight is stored in another form than the config says. All are listed.
    """
    weights: list[Weight] = []
    problems: list[str] = []
    for name, tensor in tensors.items():
        try:
            if name.rpartition(".")[2] in (*WEIGHT_SCALES, *INPUT_SCALES):
                _check_not_alone(tensor, tensors)
            else:
                weights.append(_weight(tensor, tensors, quantization, left_out))
        except ValueError as error:
            problems.append(f"  {error}")
    if problems:
        raise ValueError(
            f"The checkpoint cannot be read, and nothing has been changed ({quantization.where}):\n"
            + "\n".join(problems)
        )
    return weights


def beside(name: str, last: str) -> str:
    """The name of another tensor of the same module."""
    return "".join((*name.rpartition(".")[:2], last))


def _check_not_alone(tensor: Tensor, tensors: Mapping[str, Tensor]) -> None:
    weight = tensors.get(beside(tensor.name, WEIGHT))
    if weight is None:
        raise ValueError(
            f"{tensor} is a scale, but there is no {beside(tensor.name, WEIGHT)!r} for it. Get the "
            "whole checkpoint, or leave the scale out with `ignore`."
        )
    if weight.array.dtype != FP8_DTYPE:
        raise ValueError(
            f"{tensor} is a scale, but {weight} is {weight.array.dtype}, which takes none. It is "
            "not clear what the weight is: leave the scale out with `ignore` if it means nothing."
        )


def _weight(
    tensor: Tensor,
    tensors: Mapping[str, Tensor],
    quantization: Quantization,
    left_out: Collection[str],
) -> Weight:
    dtype = tensor.array.dtype
    module, _, last = tensor.name.rpartition(".")
    ignored = quantization.ignores(module)
    if dtype in (jnp.float8_e5m2, jnp.float8_e8m0fnu):
        raise ValueError(
            f"{tensor} is {dtype}, but of the 8-bit floats only float8_e4m3fn is a weight here. "
            "Convert it to e4m3 or a wider float."
        )
    if dtype != FP8_DTYPE:
        return Weight(tensor, ignored=ignored)
    if ignored:
        raise ValueError(
            f"{tensor} is {dtype}, but {quantization.where} says that {module!r} is not quantized. "
            "Correct the config, or give another one as `config`."
        )
    layer = quantization.layer(module)
    if layer is None:
        targets = ", ".join(repr(target) for target, _ in quantization.groups)
        raise ValueError(
            f"{tensor} is {dtype}, but {quantization.where} quantizes "
            f"{f'only {targets}' if targets else 'no layer'}. Correct the config, or give another "
            "one as `config`."
        )
    if last != WEIGHT:
        raise ValueError(
            f"{tensor} is {dtype}, but such a tensor is read beside a name that ends in `weight` "
            "alone, as that of a dense layer does (stacked experts have others). Leave it out with "
            "`ignore`, or convert it to a wider float."
        )
    scale = _beside(tensor, WEIGHT_SCALES, tensors)
    if scale is None:
        raise ValueError(
            f"{tensor} is {dtype} and needs one scale, {_either(tensor, WEIGHT_SCALES)}, but there "
            "is none. Get the whole checkpoint."
        )
    if tensor.array.ndim != 2:
        raise ValueError(
            f"{tensor} is {dtype} of shape {tensor.array.shape}, but a quantized weight must be "
            "[out_features, in_features]."
        )
    for name in (beside(tensor.name, before) for before in BEFORE_INPUT):
        if name in tensors:
            raise ValueError(
                f"{tensor} goes with {name!r}, by which the layer's input would have to be "
                "multiplied, which is not done here. Do it in the model and leave the tensor out "
                "with `ignore`, or get a checkpoint without it."
            )
    inputs = _beside(tensor, INPUT_SCALES, tensors)
    dropped = any(beside(tensor.name, name) in left_out for name in INPUT_SCALES)
    activation = None if dropped else layer.activation
    if activation is not None and (inputs is None) != (activation == "dynamic"):
        raise ValueError(
            f"{quantization.where} says that the input of {module!r} is quantized with "
            f"{activation} scales, but "
            + (
                f"no {_either(tensor, INPUT_SCALES)} is there. Get the whole checkpoint, or give a "
                "`config` that says 'dynamic', as {'quant_method': 'fp8'}."
                if inputs is None
                else f"a {inputs.name!r} is there. Leave it out with `ignore`, or give a `config` "
                "that says 'static'."
            )
        )
    return Weight(
        tensor,
        _weight_scale(scale, tensor, layer.strategy),
        None if inputs is None else _one(inputs),
        ignored,
    )


def _beside(weight: Tensor, lasts: Sequence[str], tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor beside a weight that has one of these names; None if there is none."""
    found = [tensors[name] for last in lasts if (name := beside(weight.name, last)) in tensors]
    if len(found) > 1:
        raise ValueError(
            f"{weight} needs one scale, but {' and '.join(repr(t.name) for t in found)} are both "
            "there. Leave out with `ignore` what is not meant."
        )
    return found[0] if found else None


def _either(weight: Tensor, lasts: Sequence[str]) -> str:
    return " or ".join(repr(beside(weight.name, last)) for last in lasts)


def _weight_scale(scale: Tensor, weight: Tensor, strategy: str | None) -> np.ndarray:
    values = _float32(scale)
    shape, n = values.shape, weight.array.shape[0]
    kinds = {"tensor": ((), (1,), (1, 1)), "channel": ((n,), (n, 1))}
    wanted = [kind for kind in kinds if strategy in (None, kind)]
    for kind in wanted:
        if shape in kinds[kind]:
            return values.reshape(() if kind == "tensor" else (n,))
    blocks = "Block-wise scales are not supported. " if values.ndim == 2 else ""
    raise ValueError(
        f"{scale} has shape {shape}, but for {weight.name!r} of shape {weight.array.shape} it must "
        f"be {' or '.join(str(s) for kind in wanted for s in kinds[kind])} (strategy "
        f"{strategy or 'not stated'}). {blocks}Give the float checkpoint, or correct the config."
    )


def _one(scale: Tensor) -> np.ndarray:
    values = _float32(scale)
    if values.size != 1:
        raise ValueError(
            f"{scale} has shape {values.shape}, but the static scale of a layer's input must be "
            "one number. Quantize the checkpoint with dynamic activations."
        )
    return values.reshape(())


def _float32(scale: Tensor) -> np.ndarray:
    if scale.array.dtype.name not in SCALE_DTYPES:
        raise ValueError(
            f"{scale} is {scale.array.dtype}, but a scale must be {', '.join(SCALE_DTYPES)}. "
            "Convert it."
        )
    return np.array(scale.array, np.float32)
