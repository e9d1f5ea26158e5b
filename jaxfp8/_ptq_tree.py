"""The kernels of a tree by layer, and the tree that a choice of them becomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.meta import AxisMetadata, Partitioned

from jaxfp8._accounting import is_parameter, unbox
from jaxfp8._ptq_layer import layer_name
from jaxfp8.padded import DenseWeight, FP8Weight, PaddedKernel, padded_size
from jaxfp8.quantize import FP8_DTYPE


Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """A tree taken apart at its parameters.

    Attributes:
        nodes: its parameters, in order, boxed as they were.
        treedef: the rest.
        dense: for each layer with a float kernel, where that is in `nodes`.
        padded: likewise where the kernel is a PaddedKernel already.
        beside: for each of these layers, the names of its other parameters.
    """

    nodes: tuple[Any, ...]
    treedef: Any
    dense: dict[Path, int]
    padded: dict[Path, int]
    beside: dict[Path, frozenset[str]]

    @staticmethod
    def of(tree: Any) -> Kernels:
        """Take a tree apart.

        Raises:
            TypeError: if it holds a DenseWeight or an FP8Weight.
        """
        keyed, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_parameter)
        is_variables = isinstance(tree, Mapping) and "params" in tree
        dense: dict[Path, int] = {}
        padded: dict[Path, int] = {}
        names: dict[Path, set[str]] = {}
        for index, (keys, node) in enumerate(keyed):
            path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
            if isinstance(node, DenseWeight | FP8Weight):
                raise TypeError(
                    f"`dense_params` must hold arrays, but `{layer_name(path)}` is a "
                    f"{type(node).__name__}, as a checkpoint holds it. Quantize the tree of "
                    "`model.init` (under `jax.eval_shape`, if you like), and load the checkpoint "
                    "into it with `update_params`."
                )
            if is_variables:
                if path[0] != "params":
                    continue
                path = path[1:]
            *layer, name = path or ("",)
            names.setdefault(tuple(layer), set()).add(name)
            if name == "kernel":
                where = padded if isinstance(unbox(node), PaddedKernel) else dense
                where[tuple(layer)] = index
        beside = {layer: frozenset(names[layer] - {"kernel"}) for layer in (*dense, *padded)}
        return Kernels(tuple(node for _, node in keyed), treedef, dense, padded, beside)

    def kernel(self, layer: Path) -> Any:
        """A layer's kernel, without boxes."""
        return unbox(self.nodes[self.padded[layer] if layer in self.padded else self.dense[layer]])

    def shape(self, layer: Path) -> tuple[int, ...]:
        """The logical shape of a layer's float kernel."""
        return tuple(np.shape(self.kernel(layer)))

    def rebuild(self, kernels: Mapping[Path, Any]) -> Any:
        """The tree with other kernels."""
        nodes = list(self.nodes)
        for layer, kernel in kernels.items():
            nodes[self.dense[layer]] = kernel
        return jax.tree.unflatten(self.treedef, nodes)

    def template(self, chosen: Collection[Path], *, per_channel: bool) -> Any:
        """What `update_params` fills: shapes everywhere, PaddedKernels at the chosen layers."""
        nodes = [jax.tree.map(_abstract, node) for node in self.nodes]
        for layer in chosen:
            index = self.dense[layer]
            nodes[index] = _padded(self.nodes[index], layer, per_channel)
        return jax.tree.unflatten(self.treedef, nodes)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    sharding = leaf.sharding if concrete and leaf.committed else None
    return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf), sharding=sharding)


def _padded(node: Any, layer: Path, per_channel: bool) -> PaddedKernel:
    """The abstract PaddedKernel of a float kernel, the axis names of its boxes on the leaves."""
    *stack, k, n = np.shape(unbox(node))
    lead = (*stack, padded_size(n))
    qvalue: Any = jax.ShapeDtypeStruct((*lead, padded_size(k)), FP8_DTYPE)
    scale: Any = jax.ShapeDtypeStruct(lead if per_channel else tuple(stack), jnp.float32)
    boxes = []
    while isinstance(node, AxisMetadata):
        if not isinstance(node, Partitioned):
            raise TypeError(
                f"`dense_params` has the kernel of `{layer_name(layer)}` in a "
                f"{type(node).__name__}, whose names of axes are not known; only nn.Partitioned's "
                "can be moved onto the padded `[out, in]` leaves. Unbox the tree with "
                "`nn.meta.unbox`."
            )
        boxes.append(node)
        node = node.value
    for box in reversed(boxes):
        names = (*box.names, *[None] * (len(stack) + 2 - len(box.names)))
        *first, name_in, name_out = names
        kept = (*first, name_out) if per_channel else tuple(first)
        qvalue = box.replace(value=qvalue, names=(*first, name_out, name_in))
        scale = box.replace(value=scale, names=kept)
    return PaddedKernel(qvalue, scale, k, n)
