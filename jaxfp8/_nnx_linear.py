"""`PaddedFP8Linear`, the Flax NNX layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import linear

from jaxfp8._layer_checks import (
    REFUSED,
    check_dense,
    check_float32,
    check_not_deleted,
    check_options,
    check_padded,
    check_quantized,
)
from jaxfp8._nnx_variables import ActivationScale, fp8_param
from jaxfp8.dense_float import fp8_dense_float
from jaxfp8.inputs import QuantizedInput, as_quantized_input
from jaxfp8.matmul import fp8_dense
from jaxfp8.quantize import FP8_DTYPE, check_float, is_fp8


if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32


Initializer = Callable[..., Any]

_REMEDY = "Put the state that came back from there into the module: `nnx.update(model, state)`."
_STOCK = inspect.signature(nnx.Linear.__init__).parameters


class PaddedFP8Linear(nnx.Module):
    """`nnx.Linear` on FP8 tensor cores; its default `param_dtype` is for serving, not training.

    Equivalent JAX: `activation(x @ kernel + bias)`, with x (a scale for each row) and the kernel
    (a scale for each output feature) rounded to e4m3, and everything after the product in float32.

    With `param_dtype=jnp.float8_e4m3fn`, for serving, `kernel` is an FP8Param that holds a
    PaddedKernel, `bias` an nnx.Param (float32 `[N]`), and `x_scale` an ActivationScale (float32
    `[]`) where `static_x_scale` is set. With a float `param_dtype`, for training, kernel `[K, N]`
    and bias `[N]` are nnx.Linear's nnx.Params, quantized at every call with straight-through
    gradients. So the trainer's `nnx.state` is what `update_params` writes into the served one's,
    and one seed initialises both, and nnx.Linear, to the same weights.

    Args:
        in_features: K, the number of input features, at least 1.
        out_features: N, the number of output features, at least 1.
        use_bias: whether to add a bias.
        dtype: dtype to which the input is cast, and of the result. None: the input's dtype, or
            bfloat16 for an input already quantized.
        param_dtype: `jnp.float8_e4m3fn`, or a float dtype of 16 bits or more.
        precision: as `fp8_dense` takes it; None follows `jax_default_matmul_precision`.
        kernel_init: initializer of the logical `[K, N]` weight. The names of
            `nnx.with_partitioning(init, ("in", "out"))` are moved onto the leaves of the kernel.
        bias_init: initializer of the bias.
        activation: None, "relu", "gelu" (the tanh form) or "silu", applied before the one rounding.
        static_x_scale: quantize x by the Variable `x_scale` instead of by each row's absolute
            maximum. It begins at 1, by which |x| past 448 saturates; a checkpoint of static
            activations or `calibrate` sets it, and a tree that lacks it leaves it as it is. Without
            effect with a float `param_dtype`.
        implementation: None, "cutlass" or "xla", as `fp8_dense` takes it.
        per_channel: one kernel scale for each output feature; else one for the kernel. Without
            effect with a float `param_dtype`, which always has one for each.
        dot_general: refused if it is not nnx.Linear's default, like `promote_dtype` and
            `preferred_element_type`: hooks between steps that are one operation here.
        rngs: the keys of the initializers.
        kernel_metadata: metadata of the kernel's Variable, `out_sharding` as (in, out).
        bias_metadata: metadata of the bias.

    Raises:
        TypeError: for an argument refused, or parameters or inputs of another dtype.
        ValueError: for sizes and shapes that do not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = FP8_DTYPE,
        precision: Any = None,
        kernel_init: Initializer = linear.default_kernel_init,
        bias_init: Initializer = linear.default_bias_init,
        activation: str | None = None,
        static_x_scale: bool = False,
        implementation: str | None = None,
        per_channel: bool = True,
        dot_general: Any = None,
        promote_dtype: Any = None,
        preferred_element_type: Any = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        given = {
            "dot_general": dot_general,
            "promote_dtype": promote_dtype,
            "preferred_element_type": preferred_element_type,
        }
        check_options(
            ("PaddedFP8Linear", "nnx.Linear"),
            changed_hooks(given),
            features={"in_features": in_features, "out_features": out_features},
            param_dtype=param_dtype,
            dtype=dtype,
        )
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = tuple(precision) if isinstance(precision, list) else precision
        self.activation = activation
        self.static_x_scale = static_x_scale
        self.implementation = implementation
        self.per_channel = per_channel

        serves = is_fp8(param_dtype)
        float_dtype = jnp.float32 if serves else param_dtype
        weight = kernel_init(rngs.params(), (in_features, out_features), float_dtype)
        if serves:
            # Through an nnx.Param, so that the metadata mean what they mean there. It must not be
            # placed: only the padded sizes can be divided by any mesh.
            eager = kernel_metadata.get("eager_sharding")
            param = nnx.Param(weight, **{**kernel_metadata, "eager_sharding": False})
            self.kernel: Any = fp8_param(param, per_channel=per_channel, eager_sharding=eager)
        else:
            self.kernel = nnx.Param(weight, **kernel_metadata)
        if use_bias:
            bias = bias_init(rngs.params(), (out_features,), float_dtype)
            self.bias: Any = nnx.Param(bias, **bias_metadata)
        else:
            self.bias = nnx.data(None)
        # None is static here: `nnx.jit(f, graph=False)` of flax 0.12.6 fails on data of None.
        scaled = serves and static_x_scale
        self.x_scale = ActivationScale(jnp.ones((), jnp.float32)) if scaled else None

    def __call__(
        self,
        inputs: Any,
        out_sharding: Any = None,
        *,
        out_scale: Float32[Array, ""] | None = None,
        residual: Float[Array, "*lead N"] | None = None,
    ) -> Any:
        """Apply the layer over the last axis of `inputs`.

        Args:
            inputs: float array `[*lead, K]` of 16 bits or more, of any rank from 1. With FP8
                parameters also one already quantized, as `fp8_dense` takes it: a QuantizedInput,
                or a pair `(qx, scale)`.
            out_sharding: refused if given; nnx.Linear hands it to its `dot_general`.
            out_scale: float32 `[]`, with FP8 parameters: the scale by which the result is
                quantized in the same kernel, for the next layer.
            residual: `[*lead, N]` of the result's dtype, added behind the activation, before the
                one rounding, as `fp8_dense` says: `x + layer(h)` as `layer(h, residual=x)`.

        Returns:
            `[*lead, N]` of `dtype`, or a QuantizedInput of N features if `out_scale` was given.

        Raises:
            TypeError: if `inputs` is no such array, `residual` not of the result's dtype,
                `out_sharding` is given, or something is to be quantized for a layer whose
                `param_dtype` is a float.
            ValueError: if a shape does not fit, `dtype` or `residual` is set beside `out_scale`, or
                `static_x_scale` for an input that has its own scale.
            RuntimeError: if a parameter was donated.
        """
        if out_sharding is not None:
            raise TypeError(
                "`out_sharding` of nnx.Linear cannot be given to PaddedFP8Linear: "
                f"{REFUSED['out_sharding']}."
            )
        options: dict[str, Any] = {
            "activation": self.activation,
            "precision": self.precision,
            "implementation": self.implementation,
            "residual": residual,
        }
        dtype = None if self.dtype is None else jax.dtypes.canonicalize_dtype(self.dtype)
        quantized = isinstance(inputs, QuantizedInput | tuple)
        if quantized or out_scale is not None:
            check_quantized(self, quantized, out_scale, scale="layer.x_scale[...]")
        if quantized:
            x: Any = as_quantized_input(inputs, "inputs")
        else:
            check_float(inputs, "inputs")
            x = jnp.asarray(inputs)
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"`inputs` must have shape [*lead, {self.in_features}], the layer's `in_features` "
                f"last, but its shape is {x.shape}."
            )
        kernel, bias, x_scale = self._parameters()
        if quantized:
            return fp8_dense(x, kernel, bias, out_dtype=dtype, out_scale=out_scale, **options)
        x = x if dtype is None else x.astype(dtype)
        if not is_fp8(self.param_dtype):
            return fp8_dense_float(x, kernel, bias, **options)
        return fp8_dense(x, kernel, bias, x_scale=x_scale, out_scale=out_scale, **options)

    def _parameters(self) -> tuple[Any, Any, Any]:
        """Kernel, bias and static scale, checked."""
        values = [
            None if variable is None else variable.get_value()
            for variable in (self.kernel, self.bias, self.x_scale)
        ]
        for name, value in zip(("kernel", "bias", "x_scale"), values, strict=True):
            check_not_deleted(value, name, _REMEDY)
        kernel, bias, x_scale = values
        sizes = (self.in_features, self.out_features)
        check: Callable[..., None] = check_dense
        if is_fp8(self.param_dtype):
            check = check_float32
            check_padded(kernel, "kernel", sizes, per_channel=self.per_channel)
        else:
            check_dense(kernel, "kernel", sizes)
        if bias is not None:
            check(bias, "bias", (self.out_features,))
        if x_scale is not None:
            check_float32(x_scale, "x_scale", ())
        return kernel, bias, x_scale


def changed_hooks(given: Mapping[str, Any]) -> dict[str, Any]:
    """The hooks of nnx.Linear that are not left at its own defaults."""
    return {name: hook for name, hook in given.items() if hook is not _STOCK[name].default}
