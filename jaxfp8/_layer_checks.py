"""What a layer is given: its arguments, and what it finds in its parameters, by path."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfp8.padded import PaddedKernel, check_kernel
from jaxfp8.quantize import is_fp8


_ONE_OPERATION = (
    "quantization, product, scales, bias and activation are one operation here, which a "
    "`dot_general` would take apart"
)
_RESULT = "the product is always e4m3 by e4m3 with float32 accumulation; `dtype` sets the dtype of "
REFUSED = {
    "promote_dtype": _RESULT + "the result",
    "preferred_element_type": _RESULT + "the result",
    "dot_general": _ONE_OPERATION,
    "dot_general_cls": _ONE_OPERATION,
    "out_sharding": "it shards the result of a `dot_general`, and the operation here has none. Put "
    "`jax.lax.with_sharding_constraint` around the result",
}


def check_options(
    layers: tuple[str, str],
    given: dict[str, Any],
    *,
    features: dict[str, int],
    param_dtype: Any,
    dtype: Any,
) -> None:
    """Refuse arguments that a layer cannot honour.

    Args:
        layers: the name of the layer, and of Flax's whose arguments it takes.
        given: those of Flax's that are refused (keys of `REFUSED`) where they are not None.
        features: the sizes by their names.
        param_dtype: float8_e4m3fn or a float of 16 bits or more.
        dtype: None or a float of 16 bits or more.

    Raises:
        TypeError: for an argument refused, for dtypes, and for a size that is no integer.
        ValueError: for a size below 1.
    """
    ours, stock = layers
    for name, value in given.items():
        if value is not None:
            raise TypeError(
                f"`{name}` of {stock} cannot be given to {ours}: {REFUSED[name]}. Leave it "
                f"out, or use {stock} for this layer."
            )
    for name, size in features.items():
        if not isinstance(size, int | np.integer):
            raise TypeError(f"`{name}` must be an integer, but it is {size!r}.")
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, but it is {size}.")
    if not is_fp8(param_dtype) and not is_wide_float(param_dtype):
        raise TypeError(
            "`param_dtype` must be float8_e4m3fn (to serve) or a float of 16 bits or more (to "
            f"train), but it is {_dtype_name(param_dtype)}. Other 8-bit formats are not "
            "supported for weights."
        )
    if dtype is not None and not is_wide_float(dtype):
        raise TypeError(
            "`dtype` must be None (the input's) or a float of 16 bits or more, but it is "
            f"{_dtype_name(dtype)}. It is the dtype of the result; the product is in FP8 anyway."
        )


def check_quantized(layer: Any, quantized: bool, out_scale: Any, *, scale: str) -> None:
    """Refuse a quantized input or result that does not go with the layer's own options.

    Args:
        layer: a PaddedFP8Dense or a PaddedFP8Linear.
        quantized: whether its input is.
        out_scale: the scale by which the result is to be quantized, or None.
        scale: how the layer's static scale is got at, for a message.

    Raises:
        TypeError: if the layer's `param_dtype` is a float.
        ValueError: if `static_x_scale` or `dtype` does not go with it.
    """
    if not is_fp8(layer.param_dtype):
        what = "a quantized `inputs`" if quantized else "`out_scale`"
        raise TypeError(
            f"{type(layer).__name__} takes {what} only to serve, but its `param_dtype` is "
            f"{jnp.dtype(layer.param_dtype)}: to train, float values go from layer to layer, "
            "and each quantizes its own input. Leave it out, or give the layer "
            "`param_dtype=jnp.float8_e4m3fn`."
        )
    if quantized and layer.static_x_scale:
        raise ValueError(
            "`static_x_scale` must be False for an `inputs` that is quantized, which has its "
            "own scale. Give the layer the float, or quantize it by the layer's scale, "
            f"`quantize_input(x, x_scale={scale})`, and leave `static_x_scale` out."
        )
    if out_scale is not None and layer.dtype is not None:
        raise ValueError(
            f"`dtype` must be None with an `out_scale`, because the result is float8_e4m3fn, "
            f"but it is {jnp.dtype(layer.dtype)}."
        )


def check_padded(kernel: Any, path: str, sizes: tuple[int, int], *, per_channel: bool) -> None:
    """Refuse what is not the PaddedKernel of one layer of `sizes` (in_features, out_features).

    Raises:
        TypeError: if it is no PaddedKernel, or its leaves were cast.
        ValueError: if it is a stack, of another size, or its scale of the other kind.
    """
    if not isinstance(kernel, PaddedKernel):
        raise TypeError(
            f"Parameter `{path}` must be a PaddedKernel, because `param_dtype` is float8_e4m3fn, "
            f"but it is {_describe(kernel)}. Load weights into the tree with "
            "`update_params(params, loaded)`, or give the layer a float `param_dtype`."
        )
    check_kernel(kernel, path)
    if kernel.stack:
        raise ValueError(
            f"Parameter `{path}` must be one layer's PaddedKernel, but it is a stack of shape "
            f"{kernel.stack}. Apply a stack with `nn.scan` or `nn.vmap` over the layer."
        )
    if (kernel.in_features, kernel.out_features) != sizes:
        raise ValueError(
            f"Parameter `{path}` has in_features={kernel.in_features} and "
            f"out_features={kernel.out_features}, but the layer needs in_features={sizes[0]} (the "
            f"last axis of `inputs`) and out_features={sizes[1]} (`features`). Apply the model to "
            "the inputs and the tree that it was initialised for."
        )
    if kernel.per_channel != per_channel:
        raise ValueError(
            f"Parameter `{path}` has a scale of shape {tuple(kernel.scale.shape)}, but "
            f"`per_channel` is {per_channel}. Initialise the tree with the same `per_channel`, and "
            "load the weights with `update_params`."
        )


def check_float32(value: Any, path: str, shape: tuple[int, ...]) -> None:
    """Refuse what is no float32 array of `shape`: the bias and x_scale of a served layer.

    Raises:
        TypeError: if it is of another dtype.
        ValueError: if it is of another shape.
    """
    remedy = (
        "Load weights into the tree with `update_params(params, loaded)`, and choose the dtype of "
        "the result with `dtype` on the layer."
    )
    if getattr(value, "dtype", None) != jnp.float32:
        raise TypeError(
            f"Parameter `{path}` must be a float32 array, because `param_dtype` is float8_e4m3fn, "
            f"but it is {_describe(value)}. {remedy}"
        )
    if jnp.shape(value) != shape:
        raise ValueError(
            f"Parameter `{path}` must have the logical shape {shape}, but its shape is "
            f"{jnp.shape(value)}. {remedy}"
        )


def check_dense(value: Any, path: str, shape: tuple[int, ...]) -> None:
    """Refuse what is no float array of `shape`: kernel and bias of a layer in training.

    Raises:
        TypeError: if it is a PaddedKernel, or no float of 16 bits or more.
        ValueError: if it is of another shape.
    """
    if isinstance(value, PaddedKernel):
        raise TypeError(
            f"Parameter `{path}` must be a float array, because `param_dtype` is a float, but it "
            "is a PaddedKernel. Turn the served tree into a float one with "
            "`dequantize_params(params)`, or give the layer `param_dtype=jnp.float8_e4m3fn`."
        )
    if not hasattr(value, "dtype") or not is_wide_float(value.dtype):
        raise TypeError(
            f"Parameter `{path}` must be a float array of 16 bits or more, because `param_dtype` "
            f"is a float, but it is {_describe(value)}. To apply FP8 weights, give the layer "
            "`param_dtype=jnp.float8_e4m3fn` and load them with `update_params(params, loaded)`."
        )
    if jnp.shape(value) != shape:
        swapped = len(shape) == 2 and jnp.shape(value) == shape[::-1]
        raise ValueError(
            f"Parameter `{path}` must have shape {shape} (in_features from the last axis of "
            f"`inputs`, out_features from `features`), but its shape is {jnp.shape(value)}."
            + (" It looks transposed: nn.Dense holds [in, out]." if swapped else "")
        )


def check_not_deleted(
    value: Any, path: str, remedy: str = "Use the tree that came back from there."
) -> None:
    """Refuse a parameter whose buffers were donated.

    Raises:
        RuntimeError: if one of them was.
    """
    if any(map(_is_deleted, jax.tree.leaves(value))):
        raise RuntimeError(
            f"Parameter `{path}` has been deleted: the tree was donated, to `reload_params` "
            f"perhaps. {remedy}"
        )


def _is_deleted(leaf: Any) -> bool:
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return concrete and leaf.is_deleted()


def is_wide_float(dtype: Any) -> bool:
    """Whether `dtype` is a float of 16 bits or more."""
    if dtype is None:  # jnp.dtype(None) would be float64
        return False
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize >= 2


def _describe(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an array of dtype {value.dtype} and shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _dtype_name(dtype: Any) -> str:
    return "None" if dtype is None else str(jnp.dtype(dtype))
