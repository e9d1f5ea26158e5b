"""The Variable types of an NNX layer in FP8, and where the axis names of a weight go."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx
from flax.core import spmd
from jax.sharding import NamedSharding, PartitionSpec

from jaxfp8.padded import PaddedKernel


_pad = jax.jit(PaddedKernel.from_dense, static_argnames="per_channel")
_HOOKS = ("on_create_value", "on_get_value", "on_set_value", "on_add_axis", "on_remove_axis")


class FP8Param(nnx.Variable[PaddedKernel]):
    """A weight in FP8: a PaddedKernel, in no nnx.Param, so gradients and optimizers pass it by.

    Its metadata `out_sharding` names the axes of the padded qvalue, `(*stack, out, in)`; the scale
    has those of them that it has axes for. `nnx.get_partition_spec` gives each leaf its own.

    Args:
        value: a PaddedKernel, whose leaves may be abstract.
        hijax, ref: must be left out: neither can hold more than one array.
        eager_sharding: as for any nnx.Variable: whether `out_sharding` places the value.
        metadata: as for any nnx.Variable.

    Raises:
        TypeError: if `value` is no PaddedKernel, or for `hijax` and `ref`.
    """

    def __init__(
        self,
        value: PaddedKernel,
        *,
        hijax: bool | None = None,
        ref: bool | None = None,
        eager_sharding: bool | None = None,
        **metadata: Any,
    ):
        if not isinstance(value, PaddedKernel):
            raise TypeError(
                f"`value` of an FP8Param must be a PaddedKernel, but it is {type(value).__name__}. "
                "Make one with `PaddedKernel.from_dense(w)`, or load weights into the state with "
                "`update_params`."
            )
        defaults = nnx.var_defaults()
        _check_plain(
            hijax=defaults.hijax if hijax is None else hijax,
            ref=defaults.ref if ref is None else ref,
        )
        eager = nnx.using_eager_sharding() if eager_sharding is None else eager_sharding
        sharding = metadata.pop("out_sharding", None)
        if eager and sharding:
            rules, mesh = metadata.get("sharding_rules"), metadata.get("mesh")
            value = jax.tree.map(
                lambda leaf, spec: spmd.shard_value(leaf, spec, rules, mesh),
                value,
                leaf_shardings(value, sharding),
            )
        super().__init__(value, hijax=False, ref=False, eager_sharding=eager, **metadata)
        if sharding is not None:  # Later, because nnx.Variable would place all leaves by it.
            self.set_metadata(out_sharding=sharding)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the qvalue, `(*stack, N_pad, K_pad)`: that of the axes in `out_sharding`."""
        return tuple(self.get_raw_value().qvalue.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the qvalue."""
        return self.get_raw_value().qvalue.dtype

    # Flax takes a Variable for one array: `nnx.get_partition_spec` replaces it by one spec, and
    # `nnx.eval_shape` under a mesh sets one ShapeDtypeStruct. Both are spread over the leaves.
    def replace(self, *value: Any, **updates: Any) -> Any:
        """As of any Variable, and of a PartitionSpec for the qvalue."""
        if value and isinstance(value[0], PartitionSpec):
            value = (leaf_shardings(self.get_raw_value(), value[0]),)
        return super().replace(*value, **updates)

    def set_value(self, value: Any, **index: Any) -> None:
        """As of any Variable, and of a sharded ShapeDtypeStruct for the qvalue."""
        if isinstance(value, jax.ShapeDtypeStruct) and value.sharding is not None:
            kernel = self.get_raw_value()
            value = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=sharding
                ),
                kernel,
                leaf_shardings(kernel, value.sharding),
            )
        super().set_value(value, **index)

    def to_param(self) -> nnx.Variable[Any]:
        """The float weight `[*stack, K, N]` in an nnx.Param, as nnx.Linear has it."""
        metadata = self.get_metadata()
        if metadata.get("out_sharding"):
            metadata["out_sharding"] = swapped(metadata["out_sharding"], len(self.shape))
        return nnx.Param.from_metadata(self.get_raw_value().dequantize(), metadata)


class ActivationScale(nnx.Variable[jax.Array]):
    """A static activation scale, float32 `[]`: a calibration constant, which no trainer has."""


def _check_plain(*, hijax: bool, ref: bool) -> None:
    for name, wish in (("hijax", hijax), ("ref", ref)):
        if wish:
            raise TypeError(
                f"`{name}` must be False for an FP8Param, whose PaddedKernel is two arrays. "
                f"Leave it out, and make the layer outside `nnx.var_defaults({name}=True)`."
            )


def fp8_param(
    param: nnx.Variable[Any], *, per_channel: bool, eager_sharding: bool | None = None
) -> FP8Param:
    """The float `[*stack, K, N]` weight of a Variable in FP8, its axis names moved along.

    Raises:
        TypeError: if the weight is no float of 16 bits or more, or the Variable has hooks or is
            one of `hijax` or `ref`.
        ValueError: if it has fewer than two axes or no features.
    """
    _check_plain(hijax=param.hijax, ref=param.ref)
    metadata = param.get_metadata(exclude_required=True)
    if hooks := [name for name in _HOOKS if metadata.pop(name, ())]:
        raise TypeError(
            f"`{hooks[0]}` of the kernel's metadata is a hook on a float weight, and cannot be "
            "given a PaddedKernel. Leave it out, or use nnx.Linear for this layer."
        )
    weight = param.get_raw_value()
    if metadata.get("out_sharding"):
        metadata["out_sharding"] = swapped(metadata["out_sharding"], len(weight.shape))
    pad = functools.partial(_pad, per_channel=per_channel)
    abstract = isinstance(weight, jax.ShapeDtypeStruct)
    kernel = jax.eval_shape(pad, weight) if abstract else pad(weight)
    return FP8Param(kernel, eager_sharding=eager_sharding, **metadata)


def swapped(sharding: Any, ndim: int) -> Any:
    """The axis names `(*stack, in, out)` of a weight as `(*stack, out, in)`, and back.

    Args:
        sharding: a tuple of names, a PartitionSpec or a NamedSharding; axes left out are None.
        ndim: how many axes the weight has.

    Raises:
        TypeError: for anything else.
        ValueError: if it names more axes than there are.
    """
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, swapped(sharding.spec, ndim))
    if not isinstance(sharding, tuple | list | PartitionSpec):
        raise TypeError(
            "`out_sharding` must be a tuple of axis names, a PartitionSpec or a NamedSharding, "
            f"which can be moved onto the padded `[out, in]` leaves, but it is "
            f"{type(sharding).__name__}."
        )
    names = tuple(sharding)
    if len(names) > ndim:
        raise ValueError(
            f"`out_sharding` must name at most the {ndim} axes of the kernel, (in, out) and those "
            f"of the stack before, but it names {names}."
        )
    names += (None,) * (ndim - len(names))
    moved = (*names[:-2], names[-1], names[-2])
    return PartitionSpec(*moved) if isinstance(sharding, PartitionSpec) else moved


def leaf_shardings(kernel: PaddedKernel, sharding: Any) -> PaddedKernel:
    """A PaddedKernel of shardings: the qvalue's, and what the scale has axes for of it."""
    axes = len(kernel.scale.shape)
    if isinstance(sharding, NamedSharding):
        scale: Any = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:axes]))
    else:
        sharding = PartitionSpec(*sharding)
        scale = PartitionSpec(*sharding[:axes])
    return PaddedKernel(sharding, scale, kernel.in_features, kernel.out_features)
