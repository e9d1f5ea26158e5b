"""What one loaded leaf must be to go into one parameter, and the conversion that takes it there.

Shapes and dtypes only; the values are checked by the conversion's `measure`. Every check raises a
sentence without the path: the caller collects them all and puts the path in front.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfp8._convert import Conversion, Copy, Pad, Quantize
from jaxfp8._lazy import LazyArray
from jaxfp8.padded import (
    DenseWeight,
    FP8Weight,
    Layout,
    PaddedKernel,
    check_kernel,
    check_layout,
    padded_size,
)
from jaxfp8.quantize import FP8_DTYPE


# The floats that XLA computes with and that need no scale beside them.
FLOATS = ("bfloat16", "float16", "float32", "float64")
_AXES: dict[Layout, str] = {
    "in_out": "in_features, out_features",
    "out_in": "out_features, in_features",
}
_OTHER: dict[Layout, Layout] = {"in_out": "out_in", "out_in": "in_out"}


def is_abstract(leaf: object) -> bool:
    """Whether a leaf has a shape but no values, as `jax.eval_shape` returns it."""
    return isinstance(leaf, jax.ShapeDtypeStruct)


def is_deleted(leaf: object) -> bool:
    """Whether a leaf's buffer is gone, because it was donated."""
    return (
        isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()
    )


def check_target(target: Any) -> None:
    """Check that a parameter is one that can be written.

    Raises:
        TypeError: if it is not an array or a kernel was cast.
        ValueError: if it is deleted or a kernel's shapes do not follow from its sizes.
    """
    is_kernel = isinstance(target, PaddedKernel)
    for leaf in (target.qvalue, target.scale) if is_kernel else (target,):
        if not (isinstance(leaf, jax.Array | np.ndarray) or is_abstract(leaf)):
            raise TypeError(
                f"the parameter in `params` is a {type(leaf).__name__}, not an array. Pass the "
                "tree that `init` or `jax.eval_shape` of `init` returned."
            )
        if is_deleted(leaf):
            raise ValueError(
                "the parameter in `params` is deleted: its buffer was donated, to an earlier "
                "`reload_params` or another jitted function. Use the tree which that call returned."
            )
    if is_kernel:
        check_kernel(target, "params")


def plan_leaf(target: Any, loaded: Any, *, is_scale: bool) -> tuple[Conversion, tuple[Any, ...]]:
    """Choose the conversion of `loaded` into `target`, and the arrays that it reads.

    Args:
        target: a parameter that passed `check_target`, unboxed.
        loaded: the leaf at the same path of the loaded tree, unboxed.
        is_scale: whether the parameter is a scale, so that its values must be positive.

    Raises:
        TypeError: if the dtype or the type cannot go there.
        ValueError: if the shape, the layout or the kind of scale does not fit.
    """
    if not isinstance(target, PaddedKernel):
        return _plan_plain(target, loaded, is_scale=is_scale)
    if isinstance(loaded, PaddedKernel):
        return _plan_padded(target, loaded)
    if isinstance(loaded, FP8Weight):
        return _plan_fp8(target, loaded)
    if isinstance(loaded, DenseWeight):
        return _plan_float(target, loaded.value, loaded.layout)
    return _plan_float(target, loaded, "in_out")


def _array(leaf: Any, what: str) -> Any:
    if isinstance(leaf, bool | int | float | complex):
        leaf = np.asarray(leaf, jnp.result_type(leaf))
    if is_abstract(leaf):
        raise TypeError(
            f"{what} is abstract (a ShapeDtypeStruct) and holds no values. Only `params` may be "
            "abstract; to find the shape of a result, use `jax.eval_shape` on `update_params`."
        )
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | LazyArray):
        raise TypeError(
            f"{what} is a {type(leaf).__name__}, not an array. Convert it to a numpy or a JAX "
            "array first."
        )
    if not getattr(leaf.dtype, "isnative", True):
        raise TypeError(
            f"{what} is {leaf.dtype}, of the other byte order, which JAX does not take. Pass "
            f"`w.astype({leaf.dtype.newbyteorder('=').name!r})`."
        )
    if is_deleted(leaf):
        raise ValueError(
            f"{what} is deleted: its buffer was donated to a jitted function. Pass the tree which "
            "that call returned."
        )
    return leaf


def _check_real_float(dtype: Any, what: str) -> None:
    if dtype.name.startswith("float8"):
        raise TypeError(
            f"{what} is {dtype} without a scale, and its values mean nothing alone. Pass "
            "FP8Weight(value, scale), or the float weight."
        )
    if dtype.name not in FLOATS:
        raise TypeError(
            f"{what} is {dtype}, but it must be a real float (bfloat16, float16, float32 or "
            "float64). Cast it first."
        )


def _check_weight_shape(kernel: PaddedKernel, shape: tuple[int, ...], layout: Layout) -> None:
    k, n = kernel.in_features, kernel.out_features
    matrix = {"in_out": (k, n), "out_in": (n, k)}
    expected = kernel.stack + matrix[layout]
    if shape == expected:
        return
    axes = ", ".join(filter(None, ["*stack" if kernel.stack else "", _AXES[layout]]))
    message = f"its shape is {shape}, but this kernel takes [{axes}] = {expected}. "
    padded = {(padded_size(k), padded_size(n)), (padded_size(n), padded_size(k))}
    if shape == kernel.stack + matrix[_OTHER[layout]]:
        message += (
            f'The transposed weight fits: if it is stored that way, say layout="{_OTHER[layout]}"'
            f', as in DenseWeight(value, layout="{_OTHER[layout]}") for a float weight.'
        )
    elif len(shape) != len(expected):
        message += (
            f"It must have {len(expected)} axes: {len(kernel.stack)} of the stack (from `nn.scan` "
            "or `nn.vmap`) and the two features."
        )
    elif shape[-2:] in padded and shape[:-2] == kernel.stack:
        message += "That is the padded size: pass the weight in its logical size."
    else:
        message += "Load the weights of a model of the same sizes."
    raise ValueError(message)


def _plan_float(
    kernel: PaddedKernel, value: Any, layout: Layout
) -> tuple[Conversion, tuple[Any, ...]]:
    value = _array(value, "the weight")
    check_layout(layout, "loaded")
    _check_real_float(value.dtype, "the weight")
    _check_weight_shape(kernel, tuple(value.shape), layout)
    return Quantize(layout, kernel.per_channel), (value,)


def _plan_fp8(kernel: PaddedKernel, loaded: FP8Weight) -> tuple[Conversion, tuple[Any, ...]]:
    value = _array(loaded.value, "`value` of the FP8Weight")
    scale = _array(loaded.scale, "`scale` of the FP8Weight")
    check_layout(loaded.layout, "loaded")
    if value.dtype != FP8_DTYPE:
        raise TypeError(
            f"`value` of the FP8Weight is {value.dtype}, but it must be float8_e4m3fn. Pass a "
            "float weight as it is or as DenseWeight(value, layout); dequantize another format "
            "with its scale first."
        )
    if scale.dtype.name not in FLOATS:
        raise TypeError(
            f"`scale` of the FP8Weight is {scale.dtype}, but it must be a float, best float32: "
            "the multiplier in weight = value * scale."
        )
    _check_weight_shape(kernel, tuple(value.shape), loaded.layout)
    shape, stack, n = tuple(scale.shape), kernel.stack, kernel.out_features
    if shape not in ((), stack, (*stack, n)):
        message = (
            f"`scale` of the FP8Weight has shape {shape}, but it must be {stack} (per tensor) or "
            f"{(*stack, n)} (per channel). "
        )
        size = int(np.prod(shape, dtype=np.int64))
        for fits in (stack, (*stack, n)):
            if size == int(np.prod(fits, dtype=np.int64)):
                message += f"If it has the right order, pass scale.reshape({fits})."
                break
        else:
            message += (
                "It has the logical size, without padding. Block-wise scales are not supported: "
                "pass the dequantized float weight."
            )
        raise ValueError(message)
    return _pad(kernel, loaded.layout, len(shape) > len(stack)), (value, scale)


def _plan_padded(kernel: PaddedKernel, loaded: PaddedKernel) -> tuple[Conversion, tuple[Any, ...]]:
    leaves = (
        _array(loaded.qvalue, "`qvalue` of the PaddedKernel"),
        _array(loaded.scale, "`scale` of the PaddedKernel"),
    )
    check_kernel(loaded, "loaded")
    wanted = (kernel.in_features, kernel.out_features)
    came = (loaded.in_features, loaded.out_features)
    if came != wanted or loaded.stack != kernel.stack:
        raise ValueError(
            f"the PaddedKernel has in_features={came[0]}, out_features={came[1]} and stack "
            f"{loaded.stack}, but this kernel has in_features={wanted[0]}, "
            f"out_features={wanted[1]} and stack {kernel.stack}. Load the weights of a model of "
            "the same sizes."
        )
    return _pad(kernel, "out_in", loaded.per_channel), leaves


def _pad(kernel: PaddedKernel, layout: Layout, scale_per_channel: bool) -> Pad:
    if scale_per_channel and not kernel.per_channel:
        raise ValueError(
            "its scale is per channel, but this kernel has one scale per tensor, and rounding to "
            "it would lose precision unasked. Pass the dequantized float weight (value * scale), "
            "or use a per-channel kernel."
        )
    return Pad(layout, kernel.in_features, kernel.out_features, kernel.per_channel)


def _plan_plain(target: Any, loaded: Any, *, is_scale: bool) -> tuple[Conversion, tuple[Any, ...]]:
    if isinstance(loaded, PaddedKernel | FP8Weight):
        raise TypeError(
            f"it is a {type(loaded).__name__}, but the parameter in `params` is a plain "
            f"{target.dtype} array. Pass the float weight (`dequantize_params` makes a float tree "
            "of a padded one), or build `params` with param_dtype=float8_e4m3fn."
        )
    layout: Layout = "in_out"
    if isinstance(loaded, DenseWeight):
        loaded, layout = loaded.value, loaded.layout
        check_layout(layout, "loaded")
    loaded = _array(loaded, "the value")
    _check_plain_dtype(target.dtype, loaded.dtype)
    shape, transpose = tuple(loaded.shape), layout == "out_in" and loaded.ndim >= 2
    if ((*shape[:-2], shape[-1], shape[-2]) if transpose else shape) != tuple(target.shape):
        raise ValueError(
            f"its shape is {shape} with layout {layout!r}, but the parameter in `params` has shape "
            f"{tuple(target.shape)}. Load the weights of a model of the same sizes."
        )
    dtype = jax.dtypes.canonicalize_dtype(target.dtype)
    return Copy(dtype, transpose, is_scale), (loaded,)


def _check_plain_dtype(target: Any, loaded: Any) -> None:
    for dtype in (target, loaded):
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            raise TypeError(
                f"typed keys ({dtype}) are not weights. Keep them out of both trees, or pass "
                "`jax.random.key_data(key)`."
            )
    if target.name in FLOATS:
        _check_real_float(loaded, "the value")
    elif target != loaded:
        raise TypeError(
            f"its dtype is {loaded}, but the parameter in `params` is {target}. Only floats are "
            "cast to each other; cast it yourself if that is what you mean."
        )
