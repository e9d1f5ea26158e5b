"""`PaddedFP8Dense`, the Flax Linen layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from jaxfp8.matmul import fp8_dense, fp8_dense_float
from jaxfp8.padded import PaddedKernel, check_kernel
from jaxfp8.quantize import FP8_DTYPE, check_float, is_fp8


if TYPE_CHECKING:
    from jaxtyping import Array, Float


Initializer = Callable[..., Any]

REFUSED = {
    "promote_dtype": "the product is always e4m3 by e4m3 with float32 accumulation; `dtype` sets "
    "the dtype of the result",
    "dot_general": "quantization, product, scales, bias and activation are one operation here, "
    "which a `dot_general` would take apart",
    "dot_general_cls": "quantization, product, scales, bias and activation are one operation "
    "here, which a `dot_general` would take apart",
}


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
        dtype: dtype to which the input is cast, and of the result. None: the input's dtype.
        param_dtype: `jnp.float8_e4m3fn`, or a float dtype of 16 bits or more.
        precision: as `fp8_dense` takes it; None follows `jax_default_matmul_precision`.
        kernel_init: initializer of the logical `[K, N]` weight. The boxes of
            `nn.with_partitioning(init, ("in", "out"))` are put on the leaves of the PaddedKernel.
        bias_init: initializer of the bias.
        activation: None, "relu", "gelu" (the tanh form) or "silu", applied before the one rounding.
        static_x_scale: quantize x by the parameter `x_scale` (from 1) instead of by each row's
            absolute maximum. Without effect with a float `param_dtype`.
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
        for name, reason in REFUSED.items():
            if getattr(self, name) is not None:
                raise TypeError(
                    f"`{name}` of nn.Dense cannot be given to PaddedFP8Dense: {reason}. Leave it "
                    "out, or use nn.Dense for this layer."
                )
        if self.features < 1:
            raise ValueError(f"`features` must be at least 1, but it is {self.features}.")
        if not is_fp8(self.param_dtype) and not _is_wide_float(self.param_dtype):
            raise TypeError(
                "`param_dtype` must be float8_e4m3fn (to serve) or a float of 16 bits or more (to "
                f"train), but it is {_dtype_name(self.param_dtype)}. Other 8-bit formats are not "
                "supported for weights."
            )
        if self.dtype is not None and not _is_wide_float(self.dtype):
            raise TypeError(
                "`dtype` must be None (the input's) or a float of 16 bits or more, but it is "
                f"{_dtype_name(self.dtype)}. It is the dtype of the result; the product is in "
                "FP8 anyway."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Float[Array, "*lead K"]) -> Float[Array, "*lead N"]:
        """Apply the layer over the last axis of `inputs`, a float array of any rank from 1."""
        check_float(inputs, "inputs")
        x = jnp.asarray(inputs)
        if x.ndim < 1 or x.shape[-1] < 1:
            raise ValueError(
                "`inputs` must have shape [*lead, in_features] with at least one feature, but its "
                f"shape is {x.shape}."
            )
        if self.dtype is not None:
            x = x.astype(jax.dtypes.canonicalize_dtype(self.dtype))
        options = {
            "activation": self.activation,
            "precision": self.precision,
            "implementation": self.implementation,
        }
        if not is_fp8(self.param_dtype):
            kernel, bias = self._float_params(x.shape[-1])
            return fp8_dense_float(x, kernel, bias, **options)
        kernel, bias, x_scale = self._padded_params(x.shape[-1])
        return fp8_dense(x, kernel, bias, x_scale=x_scale, **options)

    def _padded_params(self, in_features: int) -> tuple[PaddedKernel, Any, Any]:
        self._check_existing("kernel", self._check_padded, in_features)
        self._check_existing("bias", _check_float32, (self.features,))
        self._check_existing("x_scale", _check_float32, ())
        # The order is nn.Dense's: Flax numbers the keys it draws for initializers.
        kernel = self.param("kernel", self._init_padded, (in_features, self.features))
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
        self._check_existing("kernel", _check_dense, shape)
        self._check_existing("bias", _check_dense, (self.features,))
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", self.bias_init, (self.features,), self.param_dtype)

    def _check_existing(self, name: str, check: Callable[..., None], expected: Any) -> None:
        """Run `check(value, path, expected)` before Flax's own check, which says less."""
        if self.has_variable("params", name):
            value = meta.map_axis_meta(_bare, self.get_variable("params", name))
            path = "/".join((*self.path, name))
            if any(map(_is_deleted, jax.tree.leaves(value))):
                raise RuntimeError(
                    f"Parameter `{path}` has been deleted: the tree was donated, to "
                    "`reload_params` perhaps. Use the tree that came back from there."
                )
            check(value, path, expected)

    def _check_padded(self, kernel: Any, path: str, in_features: int) -> None:
        if not isinstance(kernel, PaddedKernel):
            raise TypeError(
                f"Parameter `{path}` must be a PaddedKernel, because `param_dtype` is "
                f"float8_e4m3fn, but it is {_describe(kernel)}. Load weights into the tree with "
                "`update_params(params, loaded)`, or give the layer a float `param_dtype`."
            )
        check_kernel(kernel, path)
        if kernel.stack:
            raise ValueError(
                f"Parameter `{path}` must be one layer's PaddedKernel, but it is a stack of shape "
                f"{kernel.stack}. Apply a stack with `nn.scan` or `nn.vmap` over the layer."
            )
        if (kernel.in_features, kernel.out_features) != (in_features, self.features):
            raise ValueError(
                f"Parameter `{path}` has in_features={kernel.in_features} and "
                f"out_features={kernel.out_features}, but the layer needs "
                f"in_features={in_features} (the last axis of `inputs`) and "
                f"out_features={self.features} (`features`). Apply the model to the inputs and "
                "the tree that it was initialised for."
            )
        if kernel.per_channel != self.per_channel:
            raise ValueError(
                f"Parameter `{path}` has a scale of shape {tuple(kernel.scale.shape)}, but "
                f"`per_channel` is {self.per_channel}. Initialise the tree with the same "
                "`per_channel`, and load the weights with `update_params`."
            )

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


def _check_float32(value: Any, path: str, shape: tuple[int, ...]) -> None:
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


def _check_dense(value: Any, path: str, shape: tuple[int, ...]) -> None:
    if isinstance(value, PaddedKernel):
        raise TypeError(
            f"Parameter `{path}` must be a float array, because `param_dtype` is a float, but it "
            "is a PaddedKernel. Turn the served tree into a float one with "
            "`dequantize_params(params)`, or give the layer `param_dtype=jnp.float8_e4m3fn`."
        )
    if not hasattr(value, "dtype") or not _is_wide_float(value.dtype):
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


def _is_deleted(leaf: Any) -> bool:
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return concrete and leaf.is_deleted()


def _is_wide_float(dtype: Any) -> bool:
    if dtype is None:  # jnp.dtype(None) would be float64
        return False
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize >= 2


def _dtype_name(dtype: Any) -> str:
    return "None" if dtype is None else str(jnp.dtype(dtype))


def _describe(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an array of dtype {value.dtype} and shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
