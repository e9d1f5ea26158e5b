"""Which kernels of a tree `nn.Dense` reads, found by running the model on abstract values.

A tree does not say what a kernel belongs to: those of Conv, DenseGeneral and of a scanned Dense can
have the same shape. So each kernel is put into a box that carries its path, of the kind that Flax
itself opens for a module that reads a parameter (`nn.meta.AxisMetadata`), and the model is traced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from jaxfp8._ptq_layer import bare, check_options, is_dense_call, layer_name, result_dtype, stored


Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class KernelBox(meta.AxisMetadata[Any]):
    """A kernel on its way to the module that reads it.

    Attributes:
        value: it, in its own boxes if it had any.
        path: the layer that it belongs to, in the tree. Static.
        trace: this trace's own object, so that no `jit` inside the model answers from its cache,
            where nothing would be found. Static.
        removed: the axes by which lifted transforms have sliced it so far. Static.
    """

    value: Any
    path: Path
    trace: object
    removed: tuple[int, ...] = ()

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> KernelBox:
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> KernelBox:
        value = meta.add_axis(self.value, index, params)
        return dataclasses.replace(self, value=value, removed=self.removed[:-1])

    def remove_axis(self, index: int, params: dict[Any, Any]) -> KernelBox:
        value = meta.remove_axis(self.value, index, params)
        return dataclasses.replace(self, value=value, removed=(*self.removed, index))


jax.tree_util.register_dataclass(
    KernelBox, data_fields=["value"], meta_fields=["path", "trace", "removed"]
)


@dataclasses.dataclass
class Layer:
    """What reads one kernel of the tree.

    Attributes:
        readers: names of the classes of the modules that do.
        is_dense: whether `nn.Dense.__call__` does.
        error: why the layer cannot run on a padded kernel, if it cannot.
    """

    readers: set[str] = dataclasses.field(default_factory=set)
    is_dense: bool = False
    error: Exception | None = None


def find_layers(
    apply: Callable[[Any], Any],
    rebuild: Callable[[Mapping[Path, Any]], Any],
    kernels: dict[Path, Any],
) -> dict[Path, Layer]:
    """Trace `apply` on the tree, and say for each kernel what reads it.

    Args:
        apply: a call of the model on the tree.
        rebuild: the tree with other nodes at the given layers' kernels.
        kernels: the kernels asked about by layer, boxed or not.

    Raises:
        TypeError: if one is read by code that is not a module's `self.param`.
    """
    layers: dict[Path, Layer] = {}

    def interceptor(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        box = stored(context.module, "kernel")
        if isinstance(box, KernelBox):
            layer = layers.setdefault(box.path, Layer())
            layer.readers.add(type(context.module).__name__)
            if is_dense_call(context):
                layer.is_dense = True
                x = args[0] if args else kwargs["inputs"]
                layer.error = layer.error or _problem(context.module, box, x, y)
        return y

    trace = object()
    boxes = {path: KernelBox(kernel, path, trace) for path, kernel in kernels.items()}
    try:
        with nn.intercept_methods(interceptor):
            jax.eval_shape(apply, rebuild(boxes))
    except Exception as error:
        jax.eval_shape(apply, rebuild(kernels))  # raises what the model itself has to say
        raise _other_reader(kernels, error) from error
    return layers


def check_no_other_reader(
    apply: Callable[[Any], Any],
    rebuild: Callable[[Mapping[Path, Any]], Any],
    kernels: dict[Path, Any],
) -> None:
    """Trace `apply` with arrays in place of `kernels` that cannot be computed with.

    nn.Dense's call is taken over, as it will be later, so the trace fails where something else
    reads one of them. Their last two sizes are no others' in the model, so it shows too if other
    axes than the leading ones are sliced away before the layer, or axes change places.

    Raises:
        TypeError: if there is such code.
    """
    trace = object()
    boxes = {p: KernelBox(_opaque(bare(kernel).shape), p, trace) for p, kernel in kernels.items()}

    def interceptor(next_fun, args, kwargs, context):
        layer = context.module
        box = stored(layer, "kernel")
        if not (isinstance(box, KernelBox) and is_dense_call(context)):
            return next_fun(*args, **kwargs)
        if (got := box.value.shape) != (want := boxes[box.path].value.shape[-2:]):
            raise ValueError(
                f"an array of shape {want} in its last axes came to nn.Dense at "
                f"`{layer_name(box.path)}` with shape {got}"
            )
        x = args[0] if args else kwargs["inputs"]
        return jnp.zeros((*jnp.shape(x)[:-1], layer.features), result_dtype(layer, x))

    try:
        with nn.intercept_methods(interceptor):
            jax.eval_shape(apply, rebuild(boxes))
    except Exception as error:
        raise _other_reader(kernels, error) from error


def _other_reader(kernels: Mapping[Path, Any], error: Exception) -> TypeError:
    return TypeError(
        "`select` hits a kernel that is read by other code than the module that it belongs to "
        "(tied weights, nn.WeightNorm, nn.SpectralNorm, nn.map_variables, a penalty on weights), "
        "which would compute with its padded FP8 buffer, or whose stack is not along the first "
        "axes. Leave that layer out; those hit are "
        f"{', '.join(map(layer_name, kernels))}. What failed while `apply` was traced with these "
        f"kernels hidden: {type(error).__name__}: {error}"
    )


def _opaque(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """An array that can be sliced and passed on, but not computed with: PRNG keys."""
    other = max(shape, default=0)
    dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype
    return jax.ShapeDtypeStruct((*shape[:-2], other + 1, other + 2), dtype)


def _problem(layer: nn.Dense, box: KernelBox, x: Any, y: Any) -> Exception | None:
    """Why a layer that ran on a float kernel would not on a padded one, or not as it did."""
    name = layer_name(box.path)
    try:
        check_options(layer, name)
    except (TypeError, ValueError) as error:
        return error
    for later, index in enumerate(reversed(box.removed)):
        if index % (later + 3):  # the rank before this slice; a negative index counts from it
            return ValueError(
                f"The kernel of the nn.Dense at `{name}` must be [*stack, in_features, "
                f"out_features], but a transform stacks it along axis {index}. Stack along axis 0 "
                '(`variable_axes={"params": 0}`), or leave this layer out of `select`.'
            )
    kept = result_dtype(layer, x)
    if y.dtype != kept:
        return ValueError(
            f"The result of the nn.Dense at `{name}` is {y.dtype}, but on a padded kernel, which "
            f"has no float dtype of its own, it would be {kept}. Set `dtype` (or `param_dtype`) "
            f"of the layer to {y.dtype}, or leave it out of `select`."
        )
    return None
