"""Which layers of a tree become FP8: by path, and only those that are `nn.Dense`."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from jaxfp8._ptq_layer import layer_name
from jaxfp8._ptq_trace import Layer, check_no_other_reader, find_layers
from jaxfp8._ptq_tree import Kernels, Path


Select: TypeAlias = str | Sequence[str] | Callable[[str], bool] | None


def choose(
    kernels: Kernels, select: Select, apply: Callable[[Any], Any] | None, *, per_channel: bool
) -> list[Path]:
    """The layers that `select` hits, whose float kernels are to be quantized.

    Raises:
        ValueError: if it hits nothing, or a layer that may be no nn.Dense or does not fit.
        TypeError: if `select` is of another type, or a layer's options do not go with FP8.
    """
    patterns = _patterns(select)
    hit = [
        path
        for path in (*kernels.padded, *kernels.dense)
        if (select("/".join(path)) if callable(select) else _matches(path, patterns))
    ]
    _check_hits(patterns, hit, [*kernels.padded, *kernels.dense], {})
    chosen = [path for path in hit if path in kernels.dense]
    errors: list[Exception | None] = []
    if apply is None:
        _check_unambiguous(chosen, kernels)
    elif chosen:
        floats = {path: kernels.nodes[kernels.dense[path]] for path in chosen}
        layers = find_layers(apply, kernels.rebuild, floats)
        others = {p: layers.get(p, Layer()) for p in chosen}
        others = {p: layer for p, layer in others.items() if not layer.is_dense}
        hit = [path for path in hit if path not in others]
        chosen = [path for path in chosen if path not in others]
        _check_hits(patterns, hit, hit, others)
        errors += [layers[path].error for path in chosen]
    errors += [_refusal(path, kernels, per_channel=per_channel) for path in hit]
    _raise_listed([error for error in errors if error is not None])
    if apply is not None and chosen:
        check_no_other_reader(apply, kernels.rebuild, {path: floats[path] for path in chosen})
    return chosen


def _patterns(select: Select) -> tuple[str, ...]:
    if select is None:
        return ("*",)
    if isinstance(select, str):
        return (select,)
    if callable(select):
        return ()
    if isinstance(select, Iterable):
        patterns = tuple(select)
        if patterns and all(isinstance(pattern, str) for pattern in patterns):
            return patterns
    raise TypeError(
        "`select` must be a pattern of layer paths such as 'encoder/*', several of them, a "
        f"function of the path, or None for every nn.Dense, but it is {select!r}."
    )


def _matches(path: Path, patterns: Iterable[str]) -> bool:
    heads = ["/".join(path[: end + 1]) for end in range(max(len(path), 1))]
    return any(fnmatch.fnmatchcase(head, pattern) for pattern in patterns for head in heads)


def _check_hits(
    patterns: tuple[str, ...], hit: list[Path], known: list[Path], others: dict[Path, Layer]
) -> None:
    """Every pattern must hit something that can be quantized, and a function too."""
    missed = [pattern for pattern in patterns if not any(_matches(p, (pattern,)) for p in hit)]
    if hit and not missed:
        return
    what = f"the pattern {', '.join(map(repr, missed))} does not" if missed else "it does not"
    found = ", ".join(map(layer_name, known)) or "none"
    message = f"`select` must hit the kernel of an nn.Dense in `dense_params`, but {what}. "
    if others:
        read = ", ".join(f"{layer_name(p)} ({_readers(layer)})" for p, layer in others.items())
        message += f"It hits only kernels of other layers: {read}. nn.Dense layers hit: {found}."
    else:
        message += f"Layers with a kernel: {found}."
    raise ValueError(
        f"{message} Paths are without `params` in front and without `kernel` at the end."
    )


def _readers(layer: Layer) -> str:
    return ", ".join(sorted(layer.readers)) or "`apply` does not read it"


def _refusal(path: Path, kernels: Kernels, *, per_channel: bool) -> Exception | None:
    """Why a layer that was hit cannot be taken, if it cannot."""
    name = layer_name(path)
    if path in kernels.padded:
        is_so = kernels.kernel(path).per_channel
        if is_so == per_channel:
            return None
        return ValueError(
            f"The kernel of `{name}` is a PaddedKernel already, with per_channel={is_so}, but "
            f"per_channel={per_channel} was asked for. Quantize the float tree again."
        )
    shape = kernels.shape(path)
    if len(shape) >= 2 and 0 in shape[-2:]:
        return ValueError(
            f"The kernel of `{name}` must have at least one feature on each side, but its shape is "
            f"{shape}. Leave this layer out of `select`."
        )
    return None


def _check_unambiguous(chosen: list[Path], kernels: Kernels) -> None:
    """Refuse, without a model, all kernels that may belong to something else than nn.Dense."""
    unclear = []
    for path in chosen:
        shape, others = kernels.shape(path), kernels.beside[path] - {"bias"}
        if len(shape) != 2 or others:
            beside = f" beside {', '.join(sorted(others))}" if others else ""
            unclear.append(f"{layer_name(path)} {shape}{beside}")
    if unclear:
        raise ValueError(
            "`select` must hit kernels [in_features, out_features] with nothing but a bias beside "
            f"them where `apply` is not given, but it hits {', '.join(unclear)}. Stacks of dense "
            "layers, DenseGeneral (attention) and Conv look the same in a tree. Pass `apply`, a "
            "call of the model on the tree such as `lambda params: model.apply(params, x)`, which "
            "finds the nn.Dense layers, or leave those out of `select`."
        )


def _raise_listed(errors: list[Exception]) -> None:
    if not errors:
        return
    kind = TypeError if all(isinstance(error, TypeError) for error in errors) else ValueError
    if len(errors) == 1:
        raise kind(str(errors[0]))
    lines = "\n".join(f"  {error}" for error in errors)
    raise kind(f"`select` hits {len(errors)} layers that cannot be quantized:\n{lines}")
