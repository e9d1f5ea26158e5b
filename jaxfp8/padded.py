"""Alignment arithmetic, the padded kernel, and the weights that a checkpoint holds.

The logical size travels with the data, as static pytree metadata: nothing ever derives it from
a buffer that may already be padded.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import serialization

from jaxfp8._explicit import check_divides, first
from jaxfp8.quantize import FP8_DTYPE, check_float, quantize


if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float8e4m3fn, Float32


# TMA wants global strides in multiples of 16 bytes, and an e4m3 element is one byte
# (CUDA driver API, cuTensorMapEncodeTiled, globalStrides).
ALIGNMENT = 16
FORMAT_VERSION = 1

Layout = Literal["in_out", "out_in"]


def padded_size(size: int) -> int:
    """The next multiple of 16: 3420 → 3424, 16 → 16."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclasses.dataclass(frozen=True, eq=False)
class PaddedKernel:
    """A dense weight as the tensor core reads it: e4m3, K-major, padded to 16, and its scale.

    Invariant: outside `[:out_features, :in_features]` the qvalue is 0 and the scale is 1. The
    weight is `qvalue * scale`. Construct it with `from_dense`; the bare constructor checks
    nothing, because any object may be a leaf (specs, shapes, booleans).

    Attributes:
        qvalue: e4m3 `[*stack, N_pad, K_pad]`.
        scale: float32 `[*stack, N_pad]` (per channel) or `[*stack]` (per tensor).
        in_features: K, the logical input width. Static.
        out_features: N, the logical output width. Static.
    """

    qvalue: Any
    scale: Any
    in_features: int
    out_features: int

    @staticmethod
    def from_dense(w: Float[Array, "*stack K N"], *, per_channel: bool = True) -> PaddedKernel:
        """Quantize and pad a float weight in Flax's `[*stack, K, N]` orientation.

        Args:
            w: float array of 16 bits or more, K and N at least 1.
            per_channel: one scale for each output feature; else one for each stacked matrix.

        Raises:
            TypeError: if `w` is not a real float array of 16 bits or more.
            ValueError: if `w` has fewer than two axes or K or N is 0.
        """
        check_float(w, "w")
        w = jnp.asarray(w)
        if w.ndim < 2 or 0 in w.shape[-2:]:
            raise ValueError(
                "`w` must have shape [*stack, in_features, out_features] with both features at "
                f"least 1, but its shape is {w.shape}."
            )
        return quantize_and_pad(jnp.swapaxes(w, -1, -2), per_channel=per_channel)

    def dequantize(self) -> Float32[Array, "*stack K N"]:
        """The logical weight `qvalue * scale` in Flax's orientation, float32 `[*stack, K, N]`."""
        check_kernel(self, "self")
        logical = first(self.qvalue, self.out_features, -2, "qvalue")
        logical = first(logical, self.in_features, -1, "qvalue").astype(jnp.float32)
        if self.per_channel:
            scale = first(self.scale, self.out_features, -1, "scale")[..., None]
        else:
            scale = self.scale[..., None, None]
        return jnp.swapaxes(logical * scale, -1, -2)

    @property
    def per_channel(self) -> bool:
        """Whether there is a scale for each output feature, told by shape."""
        return len(self.scale.shape) == len(self.qvalue.shape) - 1

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes, from `nn.scan` or `nn.vmap`; `()` for one layer's kernel."""
        return tuple(self.qvalue.shape[:-2])


def quantize_and_pad(w: Float[Array, "*stack N K"], *, per_channel: bool = True) -> PaddedKernel:
    """`PaddedKernel.from_dense` for a weight already in `[*stack, N, K]`: no transpose."""
    out_features, in_features = w.shape[-2:]
    qvalue, scale = quantize(w, axis=-1 if per_channel else (-2, -1), keepdims=False)
    return pad_quantized(qvalue, scale, in_features=in_features, out_features=out_features)


def pad_quantized(
    qvalue: Float8e4m3fn[Array, "*stack N K"],
    scale: Float32[Array, "*s"],
    *,
    in_features: int,
    out_features: int,
) -> PaddedKernel:
    """Pad a quantized `[*stack, N, K]` weight (qvalue with 0) and its scale (with 1) to 16."""
    for axis, size in ((-2, out_features), (-1, in_features)):
        check_divides(qvalue, axis, padded_size(size), "w")
    widths = [(0, 0)] * (qvalue.ndim - 2) + [
        (0, padded_size(out_features) - out_features),
        (0, padded_size(in_features) - in_features),
    ]
    padded = jnp.pad(qvalue, widths)
    if scale.ndim == qvalue.ndim - 1:
        scale = jnp.pad(scale, widths[:-1], constant_values=1.0)
    return PaddedKernel(padded, scale, in_features, out_features)


def check_kernel(kernel: PaddedKernel, name: str) -> None:
    """Check that shapes and dtypes of a kernel's leaves agree with its logical sizes.

    Raises:
        TypeError: if a leaf was cast, or `kernel` is not a PaddedKernel.
        ValueError: if a shape does not follow from the logical sizes.
    """
    if not isinstance(kernel, PaddedKernel):
        raise TypeError(
            f"`{name}` must be a PaddedKernel, but it is {type(kernel).__name__}. Make one with "
            "`PaddedKernel.from_dense(w)`, or load weights into a tree with `update_params`."
        )
    k, n = kernel.in_features, kernel.out_features
    if jnp.dtype(kernel.qvalue.dtype) != FP8_DTYPE or jnp.dtype(kernel.scale.dtype) != jnp.float32:
        raise TypeError(
            f"`{name}` must hold a float8_e4m3fn `qvalue` and a float32 `scale`, but they are "
            f"{kernel.qvalue.dtype} and {kernel.scale.dtype}. A cast over the whole tree "
            "(`tree.map(lambda a: a.astype(...), params)`) destroys FP8 weights: cast the logical "
            "weights before `update_params`, or choose `dtype` on the layer."
        )
    shape = tuple(kernel.qvalue.shape)
    if shape[-2:] != (padded_size(n), padded_size(k)) or tuple(kernel.scale.shape) not in (
        shape[:-2],
        shape[:-1],
    ):
        raise ValueError(
            f"`{name}` has in_features={k} and out_features={n}, so `qvalue` must be "
            f"[*stack, {padded_size(n)}, {padded_size(k)}] and `scale` [*stack, {padded_size(n)}] "
            f"or [*stack], but their shapes are {shape} and {tuple(kernel.scale.shape)}. Build "
            "kernels with `PaddedKernel.from_dense`, and reload them with `update_params`."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class DenseWeight:
    """A float weight with its orientation said: `"in_out"` is Flax's `[K, N]`, `"out_in"` torch's.

    Attributes:
        value: float array, `[*stack, K, N]` or `[*stack, N, K]`.
        layout: which of the two. Static.
    """

    value: Any
    layout: Layout = "in_out"


@dataclasses.dataclass(frozen=True, eq=False)
class FP8Weight:
    """An already quantized weight of logical size, as a checkpoint holds it.

    Attributes:
        value: e4m3, `[*stack, K, N]` ("in_out") or `[*stack, N, K]` ("out_in").
        scale: float32 multiplier, `[*stack]` (per tensor) or `[*stack, N]` (per channel).
        layout: the orientation of `value`. Static.
    """

    value: Any
    scale: Any
    layout: Layout = "in_out"


def check_layout(layout: object, name: str) -> None:
    """Refuse a layout that is not one of the two.

    Raises:
        ValueError: if `layout` is neither "in_out" nor "out_in".
    """
    if layout not in get_args(Layout):
        raise ValueError(
            f"`layout` of `{name}` must be 'in_out' (Flax's [K, N]) or 'out_in' (torch's [N, K]), "
            f"but it is {layout!r}."
        )


def _flatten_kernel_with_keys(kernel: PaddedKernel):
    # The key carries the logical sizes: Orbax stores keys but not static fields, so this is what
    # makes it refuse a tree of other logical sizes whose padded shapes agree (18 and 20).
    size = f"{kernel.in_features}x{kernel.out_features}"
    children = (
        (jax.tree_util.GetAttrKey(f"qvalue_{size}"), kernel.qvalue),
        (jax.tree_util.GetAttrKey(f"scale_{size}"), kernel.scale),
    )
    return children, (kernel.in_features, kernel.out_features)


def _flatten_kernel(kernel: PaddedKernel):
    return (kernel.qvalue, kernel.scale), (kernel.in_features, kernel.out_features)


def _unflatten_kernel(sizes, children) -> PaddedKernel:
    return PaddedKernel(*children, *sizes)


jax.tree_util.register_pytree_with_keys(
    PaddedKernel, _flatten_kernel_with_keys, _unflatten_kernel, _flatten_kernel
)
jax.tree_util.register_dataclass(DenseWeight, data_fields=["value"], meta_fields=["layout"])
jax.tree_util.register_dataclass(FP8Weight, data_fields=["value", "scale"], meta_fields=["layout"])
jax.export.register_pytree_node_serialization(
    PaddedKernel,
    serialized_name="jaxfp8.PaddedKernel.v1",
    serialize_auxdata=lambda sizes: ",".join(map(str, sizes)).encode(),
    deserialize_auxdata=lambda data: tuple(map(int, data.decode().split(","))),
)


def _to_state_dict(kernel: PaddedKernel) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "in_features": kernel.in_features,
        "out_features": kernel.out_features,
        "qvalue": serialization.to_state_dict(kernel.qvalue),
        "scale": serialization.to_state_dict(kernel.scale),
    }


def _from_state_dict(kernel: PaddedKernel, state: dict[str, Any]) -> PaddedKernel:
    if not isinstance(state, dict) or "format_version" not in state:
        raise ValueError(
            f"`state` must hold a PaddedKernel as `flax.serialization` wrote it, but it is "
            f"{type(state).__name__}. A dense checkpoint is loaded with "
            "`update_params(params, loaded)`, not restored into a padded tree."
        )
    if state["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"`state` holds a PaddedKernel of format version {state['format_version']}, but this "
            f"jaxfp8 reads version {FORMAT_VERSION}. Read it with the jaxfp8 that wrote it, and "
            "save its `dequantize_params`."
        )
    stored = (int(state["in_features"]), int(state["out_features"]))
    wanted = (kernel.in_features, kernel.out_features)
    if stored != wanted:
        raise ValueError(
            f"`state` holds a PaddedKernel of logical size in_features={stored[0]}, "
            f"out_features={stored[1]}, but the target has in_features={wanted[0]}, "
            f"out_features={wanted[1]}. Restore into a model of the stored sizes."
        )
    restored = PaddedKernel(
        serialization.from_state_dict(kernel.qvalue, state["qvalue"], name="qvalue"),
        serialization.from_state_dict(kernel.scale, state["scale"], name="scale"),
        *wanted,
    )
    # Flax itself checks no array shapes, and a scale of the other kind would change the layer.
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(kernel), jax.tree.leaves(restored), strict=True
    ):
        if np.shape(old) != np.shape(new):
            raise ValueError(
                f"`state` holds a PaddedKernel whose `{jax.tree_util.keystr(path)}` has shape "
                f"{np.shape(new)}, but the target's has {np.shape(old)}. Restore into a model of "
                "the same stack and the same `per_channel`."
            )
    return restored


serialization.register_serialization_state(PaddedKernel, _to_state_dict, _from_state_dict)
