"""Tensors that belong together: a weight, its scale, and the scale of its layer's input.

A tensor's dtype says whether it is quantized; the config must agree with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np

from jaxfp8.checkpoint._config import Quantization
from jaxfp8.checkpoint._files import Tensor
from jaxfp8.quantize import FP8_DTYPE


WEIGHT = "weight"
# Both multiply: weight = value * scale. (DeepSeek's files call it an inverse.)
WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
INPUT_SCALE = "input_scale"
SCALE_DTYPES = ("bfloat16", "float16", "float32")


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
            if name.rpartition(".")[2] in (*WEIGHT_SCALES, INPUT_SCALE):
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
            f"{tensor} is {dtype}, but {quantization.where} quantizes only {targets}. Correct the "
            "config, or give another one as `config`."
        )
    names = [beside(tensor.name, scale) for scale in WEIGHT_SCALES if last == WEIGHT]
    found = [tensors[name] for name in names if name in tensors]
    if len(found) != 1:
        raise ValueError(
            f"{tensor} is {dtype} and needs one scale, "
            f"{' or '.join(map(repr, names)) or 'beside a name that ends in `weight`'}, but there "
            f"{'are both' if found else 'is none'}. Get the whole checkpoint."
        )
    if tensor.array.ndim != 2:
        raise ValueError(
            f"{tensor} is {dtype} of shape {tensor.array.shape}, but a quantized weight must be "
            "[out_features, in_features]."
        )
    input_name = beside(tensor.name, INPUT_SCALE)
    inputs = tensors.get(input_name)
    activation = None if input_name in left_out else layer.activation
    if activation is not None and (inputs is None) != (activation == "dynamic"):
        raise ValueError(
            f"{quantization.where} says that the input of {module!r} is quantized with "
            f"{activation} scales, but {'no' if inputs is None else 'a'} "
            f"{input_name!r} is there. "
            + (
                "Get the whole checkpoint, or give a `config` that says 'dynamic'."
                if inputs is None
                else "Leave it out with `ignore`, or give a `config` that says 'static'."
            )
        )
    return Weight(
        tensor,
        _weight_scale(found[0], tensor, layer.strategy),
        None if inputs is None else _one(inputs),
        ignored,
    )


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
