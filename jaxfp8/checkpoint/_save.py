"""`save_safetensors`: a served tree as a checkpoint that others read."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfp8._accounting import Entry, entries, is_calibration
from jaxfp8._leaf import check_target, is_abstract
from jaxfp8.checkpoint._apart import check_axes, check_split, shards_of
from jaxfp8.checkpoint._describe import Layer, quantization_config
from jaxfp8.checkpoint._header import DTYPES
from jaxfp8.checkpoint._names import Names, Target, as_function
from jaxfp8.checkpoint._parts import KERNEL, X_SCALE
from jaxfp8.checkpoint._weights import INPUT_SCALES, WEIGHT, WEIGHT_SCALES, beside
from jaxfp8.checkpoint._write import Output, write_directory, write_file
from jaxfp8.padded import DenseWeight, FP8Weight, PaddedKernel


def save_safetensors(
    params: Any,
    path: str | os.PathLike[str],
    *,
    names: Names | None = None,
    split: Mapping[str, Mapping[str, int]] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a served tree as a quantized checkpoint in Hugging Face's layout.

    A kernel is written in its logical size and torch's orientation, `weight` e4m3 `[N, K]`, with
    `weight_scale` float32 and, if the layer has one, `input_scale`; a float kernel as `weight`
    `[N, K]` of its dtype; anything else as it is. `load_safetensors` with the reverse `names`, then
    `update_params`, gives the same bits.

    The `quantization_config` says `quant_method: fp8` where every kernel has one scale, and
    compressed-tensors' `float-quantized` where one has a scale for each output feature: vLLM reads
    only one scale a tensor under `fp8`.

    Args:
        params: as in `update_params`, concrete.
        path: a directory (made if need be), which gets model.safetensors (or several, and an
            index), and the `quantization_config` in its config.json, whose other keys are kept; or
            a file whose name ends in .safetensors, which has it in its metadata. Everything is
            written beside and then renamed: what was there before stays whole until then.
        names: what `load_safetensors` takes, the other way round: from paths to names of tensors.
            A path of an element of a stack, `"layers/up/kernel[3]"`, is asked for where the
            whole has no name; kernels of a stack always so. A list writes the tensor under each
            of its names. By default `mlp/up/kernel` goes to `mlp.up.weight`, and other paths keep
            their last part.
        split: modules taken apart, with the output features of each, as in `load_safetensors`
            and the inverse of its `fuse`: `{"qkv": {"q": 4096, "k": 1024, "v": 1024}}`. Each
            shard has its rows of the kernel, of a scale for each output feature and of the bias,
            and a copy of one scale and of `x_scale`. `names` is asked for the paths of the
            shards, `"attn/q/kernel"`.
        max_shard_bytes: begin another file beyond this, in a directory. One file is on the host
            at a time.

    Raises:
        ValueError: if a path has no name, two have the same, `split` names no module, does not
            add up or makes a path that is there, or the directory holds other safetensors files;
            nothing has been written then.
        TypeError: if a leaf cannot be saved.
        ModuleNotFoundError: without the safetensors package (`pip install jaxfp8[checkpoint]`).
    """
    outputs: dict[str, Output] = {}
    layers: list[Layer] = []
    lookup = as_function(_default_name if names is None else names)
    tree = entries(params)
    split = split or {}
    check_split(tree, split)
    problems: list[str] = []
    for key, entry in tree.items():
        if is_calibration(key, tree):
            continue
        try:
            _check_leaf(entry.node)
            x_scale = tree.get((*key[:-1], X_SCALE)) if key[-1:] == (KERNEL,) else None
            for shard, rows in shards_of(key, entry.node, split):
                for name, index in _places(Target(shard), entry.node, lookup):
                    target = Target(shard, index)
                    layers.extend(_add(outputs, name, target, entry.node, x_scale, rows))
        except (TypeError, ValueError) as error:
            problems.append(f"  {'/'.join(key)}: {error}")
    if problems:
        raise ValueError(
            "`params` cannot be saved, and nothing has been written:\n" + "\n".join(problems)
        )
    quantization = quantization_config(layers)
    place = Path(path)
    if place.name.endswith(".safetensors"):
        write_file(place, outputs, quantization)
    else:
        write_directory(place, outputs, quantization, max_shard_bytes)


def _default_name(path: str) -> str:
    *module, last = path.split("/")
    if "[" in last:
        raise ValueError(
            f"it is a stack, and {path!r} needs a name of its own. Pass `names`, for example "
            r"[(r'layers/(.*)/kernel\[(\d+)\]', r'layers.\2.\1.weight')]."
        )
    return ".".join((*module, WEIGHT if last == KERNEL else last))


def _check_leaf(node: Any) -> None:
    if isinstance(node, DenseWeight | FP8Weight):
        raise TypeError(
            f"it is a {type(node).__name__}, a loaded weight. Save the tree that `update_params` "
            "returns."
        )
    check_target(node)
    for leaf in jax.tree.leaves(node):
        if is_abstract(leaf):
            raise TypeError("it is abstract and holds no values. Pass the arrays of `init`.")
        if leaf.dtype not in DTYPES.values():
            raise TypeError(
                f"its dtype is {leaf.dtype}, which safetensors cannot hold. Cast it, or leave it "
                "out: of an NNX model save `nnx.state(model, jaxfp8.nnx.WEIGHTS)`."
            )


def _places(
    target: Target, node: Any, lookup: Callable[[str], Sequence[str] | None]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names of a parameter, or of the elements of its stack, with their index."""
    stack = node.stack if isinstance(node, PaddedKernel) else node.shape
    depths = [len(stack)] if isinstance(node, PaddedKernel) else range(min(len(stack), 2) + 1)
    missing: list[str] = []
    for depth in depths:
        # An array that nobody stacked may be long: one element tells.
        first = Target(target.path, (0,) * depth)
        if lookup(str(first)) is None:
            missing.append(str(first))
            continue
        places = [Target(target.path, index) for index in np.ndindex(*stack[:depth])]
        names = {place: lookup(str(place)) for place in places}
        missing = [str(place) for place in places if names[place] is None]
        if not missing:
            yield from ((name, place.index) for place in places for name in names[place] or ())
            return
        break
    raise ValueError(
        f"`names` has no name for {', '.join(missing[:10])}. Add a pair for it, or (pattern, None) "
        "to leave it out."
    )


def _add(
    outputs: dict[str, Output],
    name: str,
    target: Target,
    node: Any,
    x_scale: Entry | None,
    rows: slice | None,
) -> Iterator[Layer]:
    index = target.index
    module, _, last = name.rpartition(".")
    if not isinstance(node, PaddedKernel):
        shape = node.shape[len(index) :]
        transpose = target.path[-1] == KERNEL
        if transpose and len(shape) != 2:
            raise ValueError(
                f"it has shape {shape}, but a kernel must be [in_features, out_features] to be "
                "saved as torch's weight. Leave it out with (pattern, None) in `names`, or pass "
                "`names` that give each matrix of a stack a name."
            )
        shape = shape[::-1] if transpose else shape
        if rows is not None:
            check_axes(shape, target.path[-1])
            shape = (rows.stop - rows.start, *shape[1:])
        _put(outputs, name, shape, node, index, rows=rows, transpose=transpose)
        if transpose:
            yield Layer(module, None)
        return
    if last != WEIGHT:
        raise ValueError(
            f"`names` gives its kernel the name {name!r}, but a quantized weight must be called "
            f"'weight', as in {beside(name, WEIGHT)!r}: readers look for its scale beside that."
        )
    rows = rows or slice(0, node.out_features)
    n, k = rows.stop - rows.start, node.in_features
    _put(outputs, name, (n, k), node.qvalue, index, rows=rows, columns=k)
    scale_name = beside(name, WEIGHT_SCALES[0])
    if node.per_channel:
        _put(outputs, scale_name, (n, 1), node.scale, index, rows=rows)
    else:
        _put(outputs, scale_name, (), node.scale, index)
    if x_scale is not None:
        _put(outputs, beside(name, INPUT_SCALES[0]), (), x_scale.node, index)
    yield Layer(module, "channel" if node.per_channel else "tensor", x_scale is not None)


def _put(
    outputs: dict[str, Output],
    name: str,
    shape: tuple[int, ...],
    leaf: Any,
    index: tuple[int, ...],
    **how: Any,
) -> None:
    if name in outputs:
        raise ValueError(f"two parameters have the name {name!r}. Give each its own in `names`.")
    read = functools.partial(_read, leaf, index, shape, **how)
    outputs[name] = Output(shape, np.dtype(leaf.dtype), read)


def _read(
    leaf: Any,
    index: tuple[int, ...],
    shape: tuple[int, ...],
    *,
    rows: slice | None = None,
    columns: int | None = None,
    transpose: bool = False,
) -> np.ndarray:
    """One tensor on the host.

    By a copy on the device: an array keeps what was made of it on the host, which would be a
    second model there.
    """
    if isinstance(leaf, jax.Array):
        leaf = jax.device_get(leaf[index] if index else jnp.copy(leaf))
    else:
        leaf = leaf[index]
    whole = leaf.T if transpose else leaf
    part = whole[rows] if rows is not None else whole
    part = part[:, :columns] if columns is not None else part
    # A view of one shard would keep the others on the host.
    copied = np.array(part, order="C") if part.size < whole.size else np.ascontiguousarray(part)
    return copied.reshape(shape)
