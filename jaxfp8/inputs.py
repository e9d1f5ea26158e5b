"""An input quantized once: for several layers that read it, or by the layer before."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.export
import jax.numpy as jnp

from jaxfp8 import _derivatives, _explicit_operations, _options
from jaxfp8._explicit import first, split_of, whole_features
from jaxfp8.padded import padded_size
from jaxfp8.quantize import FP8_DTYPE, check_float


if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedInput:
    """An activation as the tensor core reads it: e4m3, zero-padded to 16 features, and its scale.

    The activation is `qvalue * scale`. It comes from `quantize_input`, or from a `fp8_dense` with
    an `out_scale`, and `fp8_dense` takes it in place of x. The logical width travels with it.
    Where `jax.vmap` returns one with a static scale, which has no batch axis, it must be told:
    `out_axes=QuantizedInput(0, None, features)`, and `in_axes` alike.

    Attributes:
        qvalue: e4m3 `[*lead, K_pad]`, 0 from `features` on (in a row of NaN: anything).
        scale: float32 `[*lead, 1]` (a scale for each row) or `[]` (one static scale).
        features: K, the logical width. Static.
    """

    qvalue: Any
    scale: Any
    features: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape `(*lead, features)`."""
        return (*self.qvalue.shape[:-1], self.features)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.qvalue.shape)

    def dequantize(self) -> Float32[Array, "*lead K"]:
        """`qvalue * scale` at its logical width, float32."""
        return first(self.qvalue, self.features, -1, "qvalue").astype(jnp.float32) * self.scale


jax.tree_util.register_dataclass(
    QuantizedInput, data_fields=["qvalue", "scale"], meta_fields=["features"]
)
jax.export.register_pytree_node_serialization(
    QuantizedInput,
    serialized_name="jaxfp8.QuantizedInput.v1",
    serialize_auxdata=lambda static: str(static[0]).encode(),
    deserialize_auxdata=lambda data: (int(data),),
    from_children=lambda static, children: QuantizedInput(*children, *static),
)


def quantize_input(
    x: Float[Array, "*lead K"],
    *,
    x_scale: Float32[Array, ""] | None = None,
    implementation: str | None = None,
) -> QuantizedInput:
    """Quantize x as `fp8_dense` does, once for several layers that read it (q, k and v, say).

    `fp8_dense(quantize_input(x), kernel, out_dtype=x.dtype)` is `fp8_dense(x, kernel)`, bit for
    bit. On a Hopper GPU it is one custom call. For inference: it has no derivative.

    Args:
        x: float array of 16 bits or more, `[*lead, K]`, any number of leading axes.
        x_scale: float32 `[]`, a static scale (values past ±448·x_scale saturate). None: one scale
            for each row, from its absolute maximum.
        implementation: see `fp8_dense`.

    Raises:
        TypeError: if x is not a float of 16 bits or more, or the result is differentiated.
        ValueError: if x has no features, x_scale is no scalar, or the implementation is unknown.
        RuntimeError: when run, if "cutlass" was named and cannot run here.
    """
    _options.check_implementation(implementation)
    check_float(x, "x")
    x = jnp.asarray(x)
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(
            f"`x` must have shape [*lead, K] with K at least 1, but its shape is {x.shape}."
        )
    if x_scale is not None:
        x_scale = _options.check_vector(x_scale, "x_scale", ((),), "one static scale")
    if x.dtype == jnp.float64:
        x = x.astype(jnp.float32)
    lead, k = x.shape[:-1], x.shape[-1]
    width = padded_size(k)
    if split := split_of(x):
        qx, *scales = _explicit_operations.quantize(
            *(x, x_scale),
            operation=quantize_input,
            split=split,
            options=(("implementation", implementation),),
        )
        return QuantizedInput(qx, scales[0] if scales else x_scale, k)
    if 0 in lead:
        qx = jnp.zeros((*lead, width), FP8_DTYPE)
        scales = [jnp.zeros((*lead, 1), jnp.float32)] if x_scale is None else []
    else:
        operation = _derivatives.quantize_operation(width, implementation)
        qx, *scales = operation(x.reshape(_options.rows(lead), k), x_scale)
    scale = x_scale if not scales else scales[0].reshape(*lead, 1)
    return QuantizedInput(qx.reshape(*lead, width), scale, k)


def as_quantized_input(x: QuantizedInput | tuple, name: str) -> QuantizedInput:
    """`x` checked; a pair `(qx, scale)` of logical width, as `quantize` returns it, padded.

    Raises:
        TypeError: if x is no pair, or qx not e4m3, or the scale not float.
        ValueError: for shapes that do not fit.
    """
    if isinstance(x, QuantizedInput):
        qvalue, scale, names = x.qvalue, x.scale, (f"{name}.qvalue", f"{name}.scale")
    elif len(x) == 2 and all(hasattr(a, "shape") or isinstance(a, float) for a in x):
        (qvalue, scale), names = x, (f"{name}[0]", f"{name}[1]")
    else:
        raise TypeError(
            f"`{name}` must be a float array, a QuantizedInput, or a pair `(qx, scale)` of arrays, "
            f"but it is a tuple of {len(x)}: {', '.join(type(a).__name__ for a in x)}."
        )
    dtype = getattr(qvalue, "dtype", type(qvalue).__name__)
    if dtype != FP8_DTYPE:
        raise TypeError(
            f"`{names[0]}` must be float8_e4m3fn, the quantized values, but it is {dtype}. Make "
            "them with `quantize_input`."
        )
    *lead, given = qvalue.shape or (0,)
    features = x.features if isinstance(x, QuantizedInput) else given
    if features == 0:
        raise ValueError(
            f"`{names[0]}` must have shape [*lead, K] with K at least 1, but its shape is "
            f"{qvalue.shape}."
        )
    width = padded_size(features)
    if not isinstance(x, QuantizedInput):
        qvalue = whole_features(qvalue)
        qvalue = jnp.pad(qvalue, [(0, 0)] * len(lead) + [(0, width - features)])
    elif given != width:
        raise ValueError(
            f"`{name}` says that it has {features} features, which pad to {width}, but the shape "
            f"of `{names[0]}` is {qvalue.shape}. Make it with `quantize_input`."
        )
    scale = _options.check_vector(scale, names[1], ((), (*lead, 1)), "static, or one for each row")
    return QuantizedInput(qvalue, scale, features)
