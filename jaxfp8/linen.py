"""`PaddedFP8Dense`, the Flax Linen layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from jaxfp8._layer_checks import (
    check_dense,
    check_float32,
    check_not_deleted,
    check_options,
    check_padded,
    check_quantized,
)
from jaxfp8.dense_float import fp8_dense_float
from jaxfp8.inputs import QuantizedInput, as_quantized_input
from jaxfp8.matmul import fp8_dense
from jaxfp8.padded import PaddedKernel
from jaxfp8.quantize import FP8_DTYPE, check_float, is_fp8


if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32


Initializer = Callable[..., Any]


class PaddedFP8Dense(nn.Module):
    """`nn.Dense` on FP8 tensor cores; its default `param_dtype` is for serving, not training.

    Equivalent JAX: `activation(x @ kernel + bias)`, with x (a scale for each row) and the kernel
    (a scale for each output feature) rounded to e4m3, and everything after the product in float32.

    With `param_dtype=jnp.float8_e4m3fn`, for serving, the parameters are
    `{"kernel": PaddedKernel, "bias": float32[N]}`, and `"x_scale": float32[]` where
    `static_x_scale` is set. With a float `param_dtype`, for training, they are nn.Dense's
    `{"kernel": [K, N], "bias": [N]}`, quantized at every call with straight-through gradients. So
    the trainer's tree is what `update_params` writes into the served one, and one key initialises
    both to the same weights.

    Attributes:
        features: N, the number of output features, at least 1.
        use_bias: whether to add a bias.
        dtype: dtype to which the input is cast, and of the result. None: the input's dtype, or
            bfloat16 for an input already quantized.
        param_dtype: `jnp.float8_e4m3fn`, or a float dtype of 16 bits or more.
        precision: as `fp8_dense` takes it; None follows `jax_default_matmul_precision`.
        kernel_init: initializer of the logical `[K, N]` weight. The boxes of
            `nn.with_partitioning(init, ("in", "out"))` are put on the leaves of the PaddedKernel.
        bias_init: initializer of the bias.
        activation: None, "relu", "gelu" (the tanh form) or "silu", applied before the one rounding.
        static_x_scale: quantize x by the parameter `x_scale` instead of by each row's absolute
            maximum. `init` gives 1, by which |x| past 448 saturates; a checkpoint of static
            activations or `calibrate` sets it, and a tree that lacks it leaves it as it is. Without
            effect with a float `param_dtype`.
        implementation: None, "cutlass" or "xla", as `fp8_dense` takes it.
        per_channel: one kernel scale for each output feature; else one for the kernel. Without
            effect with a float `param_dtype`, which always has one for each.
        promote_dtype: refused if given, like `dot_general` and `dot_general_cls`: nn.Dense's
            hooks between the steps that are one operation here.

    Raises:
        TypeError: for an argument refused, or parameters or inputs of another dtype.
        ValueError: for shapes that do not fit; the message names the path of the parameter.
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = FP8_DTYPE
    precision: Any = None
    kernel_init: Initializer = nn.linear.default_kernel_init
    bias_init: Initializer = nn.initializers.zeros_init()
    activation: str | None = None
    static_x_scale: bool = False
    implementation: str | None = None
    per_channel: bool = True
    promote_dtype: Any = None
    dot_general: Any = None
    dot_general_cls: Any = None

    def __post_init__(self) -> None:
        check_options(
            ("PaddedFP8Dense", "nn.Dense"),
            {
                "promote_dtype": self.promote_dtype,
                "dot_general": self.dot_general,
                "dot_general_cls": self.dot_general_cls,
            },
            features={"features": self.features},
            param_dtype=self.param_dtype,
            dtype=self.dtype,
        )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs: Any,
        *,
        out_scale: Float32[Array, ""] | None = None,
        residual: Float[Array, "*lead N"] | None = None,
    ) -> Any:
        """Apply the layer over the last axis of `inputs`.

        Args:
            inputs: float array `[*lead, K]` of 16 bits or more, of any rank from 1. With FP8
                parameters also one already quantized, as `fp8_dense` takes it: a QuantizedInput,
                or a pair `(qx, scale)`.
            out_scale: float32 `[]`, with FP8 parameters: the scale by which the result is
                quantized in the same kernel, for the next layer.
            residual: `[*lead, N]` of the result's dtype, added behind the activation, before the
                one rounding, as `fp8_dense` says: `x + layer(h)` as `layer(h, residual=x)`.

        Returns:
            `[*lead, N]` of `dtype`, or a QuantizedInput of N features if `out_scale` was given.

        Raises:
            TypeError: if `inputs` is no such array, `residual` not of the result's dtype, or
                something is to be quantized for a layer whose `param_dtype` is a float.
            ValueError: if a shape does not fit, `dtype` or `residual` is set beside `out_scale`, or
                `static_x_scale` for an input that has its own scale.
        """
        options: dict[str, Any] = {
            "activation": self.activation,
            "precision": self.precision,
            "implementation": self.implementation,
            "residual": residual,
        }
        dtype = None if self.dtype is None else jax.dtypes.canonicalize_dtype(self.dtype)
        quantized = isinstance(inputs, QuantizedInput | tuple)
        if quantized or out_scale is not None:
            check_quantized(self, quantized, out_scale, scale='params["x_scale"]')
        if quantized:
            x: Any = as_quantized_input(inputs, "inputs")
            kernel, bias, _ = self._padded_params(x.features)
            return fp8_dense(x, kernel, bias, out_dtype=dtype, out_scale=out_scale, **options)
        check_float(inputs, "inputs")
        x = jnp.asarray(inputs)
        if x.ndim < 1 or x.shape[-1] < 1:
            raise ValueError(
                "`inputs` must have shape [*lead, in_features] with at least one feature, but its "
                f"shape is {x.shape}."
            )
        x = x if dtype is None else x.astype(dtype)
        if not is_fp8(self.param_dtype):
            kernel, bias = self._float_params(x.shape[-1])
            return fp8_dense_float(x, kernel, bias, **options)
        kernel, bias, x_scale = self._padded_params(x.shape[-1])
        return fp8_dense(x, kernel, bias, x_scale=x_scale, out_scale=out_scale, **options)

    def _padded_params(self, in_features: int) -> tuple[PaddedKernel, Any, Any]:
        sizes = (in_features, self.features)
        check_kernel = functools.partial(check_padded, per_channel=self.per_channel)
        self._check_existing("kernel", check_kernel, sizes)
        self._check_existing("bias", check_float32, (self.features,))
        self._check_existing("x_scale", check_float32, ())
        # The order is nn.Dense's: Flax numbers the keys it draws for initializers.
        kernel = self.param("kernel", self._init_padded, sizes)
        bias = x_scale = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        if self.static_x_scale:
            # A variable, not a param: Flax numbers its keys by params, also under nn.scan, and the
            # kernels drawn must not depend on it.
            x_scale = self.variable("params", "x_scale", jnp.ones, (), jnp.float32).value
        return kernel, bias, x_scale

    def _float_params(self, in_features: int) -> tuple[Any, Any]:
        shape = (in_features, self.features)
        self._check_existing("kernel", check_dense, shape)
        self._check_existing("bias", check_dense, (self.features,))
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", self.bias_init, (self.features,), self.param_dtype)

    def _check_existing(self, name: str, check: Callable[..., None], expected: Any) -> None:
        """Run `check(value, path, expected)` before Flax's own check, which says less."""
        if self.has_variable("params", name):
            value = meta.map_axis_meta(_bare, self.get_variable("params", name))
            path = "/".join((*self.path, name))
            check_not_deleted(value, path)
            check(value, path, expected)

    def _init_padded(self, key: Any, shape: tuple[int, int]) -> PaddedKernel:
        w = self.kernel_init(key, shape, jnp.float32)
        boxes = []
        while isinstance(w, meta.AxisMetadata):
            boxes.append(w)
            w = _bare(w)
        kernel = PaddedKernel.from_dense(w, per_channel=self.per_channel)
        for box in reversed(boxes):
            kernel = _box(kernel, box)
        return kernel


def _box(kernel: PaddedKernel, box: meta.AxisMetadata[Any]) -> PaddedKernel:
    """Move the axis names of a `[K, N]` weight's box onto the leaves of its PaddedKernel."""
    if not isinstance(box, meta.Partitioned):
        raise TypeError(
            "`kernel_init` must return an array or an nn.Partitioned box, whose axis names can be "
            f"moved onto the padded `[out, in]` leaves, but it is {type(box).__name__}."
        )
    if len(box.names) > 2:
        raise ValueError(
            f"`kernel_init` must name at most two axes, (in, out), but it names {box.names}."
        )
    names_in, names_out = (*box.names, None, None)[:2]
    names_scale = (names_out,) if kernel.per_channel else ()
    return PaddedKernel(
        box.replace(value=kernel.qvalue, names=(names_out, names_in)),
        box.replace(value=kernel.scale, names=names_scale),
        kernel.in_features,
        kernel.out_features,
    )


def _bare(box: meta.AxisMetadata[Any]) -> Any:
    """The content of a box, without the sharding constraint that `unbox` may add."""
    return box.value if isinstance(box, meta.Partitioned) else box.unbox()
