"""What a layer finds in its parameter tree, refused by path where it is not the layer's own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxfp8.padded import PaddedKernel, check_kernel


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


def check_not_deleted(value: Any, path: str) -> None:
    """Refuse a parameter whose buffers were donated.

    Raises:
        RuntimeError: if one of them was.
    """
    if any(map(_is_deleted, jax.tree.leaves(value))):
        raise RuntimeError(
            f"Parameter `{path}` has been deleted: the tree was donated, to `reload_params` "
            "perhaps. Use the tree that came back from there."
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
