"""`load_safetensors`: from the files of a checkpoint to the tree that an update takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxfp8.checkpoint import _fuse
from jaxfp8.checkpoint._config import read_quantization
from jaxfp8.checkpoint._files import open_files
from jaxfp8.checkpoint._names import Names, drop_ignored, map_names
from jaxfp8.checkpoint._parts import collect, parts_of
from jaxfp8.checkpoint._stack import nested, stack
from jaxfp8.checkpoint._weights import pair_scales


def load_safetensors(
    path: str | os.PathLike[str],
    *,
    names: Names | None = None,
    fuse: Mapping[str, Sequence[str]] | None = None,
    split: Mapping[str, Mapping[str, int]] | None = None,
    ignore: str | Sequence[str] = (),
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """The tree of a safetensors checkpoint, for `update_params` and `reload_params`.

    Weights are floats, or e4m3 by tensor or by output feature as Hugging Face's `fp8`,
    compressed-tensors, FBGEMM, NVIDIA ModelOpt and AMD Quark store them; what a config says of
    other formats is refused by name. A layer without a stored scale of its input quantizes each row
    of x by its own maximum. That is so of FBGEMM's too, whose `activation_scale_ub` is not applied:
    `jnp.clip(x, -bound, bound)` before the layer does what it does.

    Nothing is read but headers: leaves are views of memory-mapped files, and what has to be put
    together (fused and stacked weights) is when it is written.

    Args:
        path: a .safetensors file, a directory of them (by its index, if it has one), or an index.
        names: where tensors go: pairs of a regular expression for the whole name and the path it
            becomes (with \\1 for its groups; None leaves the tensor out, a list gives it to
            several parameters), of which the first that matches counts; or a function that does
            the same, and returns None for a name that it does not know. Paths are
            `"mlp/up/kernel"`, or `"layers/mlp/up/kernel[3]"` for element 3 of a stack (`nn.scan`).
            Scales go with their weights and need no pair. By default `mlp.up.weight` goes to
            `mlp/up/kernel`, with one axis (LayerNorm) to `mlp/up/scale`, and any other name keeps
            its last part.
        fuse: modules of the tree that are made of others, `{"qkv": ("q", "k", "v")}`, by the name
            of the module; kernels and biases are joined along the output features. A shard with
            a kernel and no bias gets zeros where another shard has one (Whisper's k_proj).
        split: modules taken apart, with the output features of each:
            `{"qkv": {"q": 4096, "k": 1024, "v": 1024}}`.
        ignore: patterns (`fnmatch`) of tensors to leave out, scales among them. A checkpoint of
            static activation scales goes into a model of dynamic ones with "*.input_scale" (or as
            the file calls it: Transformers' is "*.activation_scale", Mistral's "*.qscale_act").
        config: config.json or ModelOpt's hf_quant_config.json, as a path or its content. By
            default the metadata of the file, then config.json beside it, then hf_quant_config.json.

    Returns:
        Nested dicts. A path that ends in `kernel` gets `DenseWeight([N, K], "out_in")`, any path
        an `FP8Weight` if the tensor is quantized, with the layer's `x_scale` beside it if the
        scale of the input is stored; others arrays as they are. Values are numpy arrays, or
        arrays that become numpy by `np.asarray`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, its config says something else, or tensors do not fit
            each other or `names`. The message names the file and the tensor.
    """
    fuse, split = fuse or {}, split or {}
    _fuse.check_modules(fuse, split)
    files = open_files(path)
    quantization = read_quantization(config, files)
    kept = {name: files.tensors[name] for name in drop_ignored(files.tensors, ignore)}
    left_out = files.tensors.keys() - kept.keys()
    weights = {w.tensor.name: w for w in pair_scales(kept, quantization, left_out)}
    axes = {name: weight.tensor.array.ndim for name, weight in weights.items()}
    targets = map_names(axes, names, source=files.source)
    parts = collect(p for name, weight in weights.items() for p in parts_of(weight, targets[name]))
    parts = collect(_fuse.split(parts, split))
    parts = collect(_fuse.fuse(parts, fuse))
    return nested(stack(parts))
