"""One `nn.Dense` of a model that was written without FP8, run on the padded kernel in its tree."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from jaxfp8._layer_checks import REFUSED, check_not_deleted, check_padded, is_wide_float
from jaxfp8._options import check_vector, is_promoted
from jaxfp8.matmul import fp8_dense
from jaxfp8.padded import PaddedKernel
from jaxfp8.quantize import check_float


# The function itself, inside of what Flax wraps around every method.
_DENSE_CALL = inspect.unwrap(nn.Dense.__call__)


def is_dense_call(context: nn.module.InterceptorContext) -> bool:
    """Whether the method about to run is `nn.Dense.__call__`, whoever calls it.

    A subclass that calls `super().__call__` reaches it too; one that computes something else from
    its kernel does not, and cannot be taken for a dense layer.
    """
    return getattr(context.orig_method, "func", None) is _DENSE_CALL


def stored(module: nn.Module, name: str) -> Any:
    """What the tree holds under `params` for this module, in its boxes; None if nothing."""
    scope = module.scope
    if scope is None or not scope.has_variable("params", name):
        return None
    return scope.get_variable("params", name)


def stored_kernel(module: nn.Module) -> PaddedKernel | None:
    """The PaddedKernel that the tree holds for this very module, if it does."""
    kernel = stored(module, "kernel")
    return kernel if isinstance(kernel, PaddedKernel) else None


def layer_name(path: Sequence[str]) -> str:
    """`("encoder", "Dense_0")` as `encoder/Dense_0`."""
    return "/".join(path) or "(the model itself)"


def check_options(layer: nn.Dense, name: str) -> None:
    """Refuse what a dense layer cannot do on a padded kernel.

    Raises:
        TypeError: for a `dot_general`, `dot_general_cls` or `promote_dtype` of its own, or a
            `dtype` that is no float of 16 bits or more.
        ValueError: for a `precision` that says nothing about FP8.
    """
    for option in ("promote_dtype", "dot_general", "dot_general_cls"):
        # The defaults of nn.Dense: Flax's own `promote_dtype`, and None.
        if getattr(layer, option) is not getattr(nn.Dense, option):
            raise TypeError(
                f"`{option}` of the nn.Dense at `{name}` is {getattr(layer, option)!r}, but a "
                f"layer on a padded kernel can have none of its own: {REFUSED[option]}. Leave this "
                "layer out of `select`, or leave the option out of the layer."
            )
    if layer.dtype is not None and not is_wide_float(layer.dtype):
        raise TypeError(
            f"`dtype` of the nn.Dense at `{name}` must be None or a float of 16 bits or more, but "
            f"it is {jnp.dtype(layer.dtype)}. Leave this layer out of `select`."
        )
    try:
        is_promoted(layer.precision)
    except ValueError as error:
        raise ValueError(
            f"The nn.Dense at `{name}` cannot run on a padded kernel: {error}"
        ) from None


def result_dtype(layer: nn.Dense, inputs: Any) -> Any:
    """The dtype to which nn.Dense casts its operands, and so that of its result.

    The kernel's own dtype is gone once it is FP8. It is taken to be the bias's, which follows a
    cast of the tree as the kernel does, or `param_dtype` where there is no bias.
    """
    if layer.dtype is not None:
        return jax.dtypes.canonicalize_dtype(layer.dtype)
    bias = stored(layer, "bias") if layer.use_bias else None
    dtype = jnp.result_type(inputs, layer.param_dtype if bias is None else bare(bias))
    if jnp.issubdtype(dtype, jnp.inexact):
        return dtype
    return jnp.promote_types(jnp.float32, dtype)


def fp8_call(
    layer: nn.Dense, kernel: PaddedKernel, inputs: Any, *, implementation: str | None
) -> jax.Array:
    """`nn.Dense.__call__` on a padded kernel.

    Equivalent JAX: `fp8_dense(inputs.astype(dtype), kernel, bias)`, with the dtype that nn.Dense
    would have given its result.

    Raises:
        TypeError, ValueError, RuntimeError: if an option, the kernel, the bias or the input does
            not fit; the message names the path.
    """
    name = layer_name(layer.path)
    path = "/".join((*layer.path, "kernel"))
    check_options(layer, name)
    unboxed = bare(kernel)
    check_not_deleted(unboxed, path)
    if getattr(getattr(inputs, "dtype", None), "kind", None) not in ("b", "i", "u"):
        check_float(inputs, f"inputs of {name}")  # nn.Dense makes floats of integers
    if jnp.ndim(inputs) < 1:
        raise ValueError(
            f"`inputs` of the nn.Dense at `{name}` must have shape [*lead, in_features], but it is "
            "a scalar."
        )
    sizes = (jnp.shape(inputs)[-1], layer.features)
    # A tree may be per channel or per tensor: nn.Dense has no opinion.
    check_padded(unboxed, path, sizes, per_channel=unboxed.per_channel)
    bias = None
    if layer.use_bias:
        check_not_deleted(bare(stored(layer, "bias")), "/".join((*layer.path, "bias")))
        bias = layer.param("bias", layer.bias_init, (layer.features,), layer.param_dtype)
    x_scale = meta.unbox(stored(layer, "x_scale"))
    if x_scale is not None:
        x_scale = check_vector(x_scale, f"x_scale of {name}", ((),), "one static scale")
    x = jnp.asarray(inputs).astype(result_dtype(layer, inputs))
    return fp8_dense(
        x,
        meta.unbox(kernel),
        bias,
        x_scale=x_scale,
        precision=layer.precision,
        implementation=implementation,
    )


def bare(tree: Any) -> Any:
    """A parameter without its boxes, and without the sharding constraint that `unbox` may add."""

    def content(box: Any) -> Any:
        return bare(box.value if isinstance(box, meta.Partitioned) else box.unbox())

    return meta.map_axis_meta(content, tree)
