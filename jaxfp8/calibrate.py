"""Static activation scales from what a model's layers see on some batches."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxfp8._accounting import (
    Path,
    entries,
    is_parameter,
    mapping_like,
    one_level,
    path_name,
)
from jaxfp8._placement import replicated
from jaxfp8._progress import progress_bar
from jaxfp8._watch import Watch
from jaxfp8.padded import PaddedKernel
from jaxfp8.ptq import QuantizedModel
from jaxfp8.quantize import MIN_SCALE


def calibrate(
    model: nn.Module | QuantizedModel,
    params: Any,
    batches: Iterable[Any],
    *,
    ignore: str | Sequence[str] = (),
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """The static scale of each FP8 layer: the largest |x| that it sees over `batches`, over 448.

    The model runs as it is, with dynamic scales (a layer with `static_x_scale` too), under `jit`,
    once for each batch; layers may be inside any module, scanned, mapped or rematerialized, and
    one that is called several times gets the largest of all. An x of zeros gives 1, as in
    `quantize`. What a later batch holds past the largest |x| saturates.

    The result is for the same model with `static_x_scale=True`:

        x_scales = calibrate(model, params, batches)
        params = with_x_scales(params, x_scales)  # for a tree that has none yet
        params = update_params(params, x_scales, partial=True)  # for one that has

    A model that was quantized after training is calibrated as it runs, `QuantizedModel(model)` with
    the tree of `quantize_dense_params`; its layers are static where that tree has an `x_scale`, so
    `with_x_scales` is all that it needs.

    Args:
        model: the model, not bound; or a QuantizedModel.
        params: what `model.apply` takes, or its "params" collection alone. The layers' own
            `param_dtype` may be FP8 or, for a trainer's tree, a float.
        batches: what the model is called with: a tuple is several positional arguments. Everything
            in them is an array; flags go into `options`.
        ignore: patterns (`fnmatch`) of layers, by their path, that no batch need reach.
        progress: show a bar on standard error (rich's, in the extra `progress`, else lines).
        options: further arguments of `model.apply`, such as `method`, `rngs` or `mutable`, and
            keyword arguments of the model.

    Returns:
        A tree like `params` of the `x_scale` alone, float32 `[*stack]` for each layer. A layer that
        is only ever handed an input already quantized has no scale of its own, and is left out.

    Raises:
        TypeError: if `model` is no Linen module and no QuantizedModel.
        ValueError: if there are no batches or no layers, if a padded layer is never reached, or if
            a layer sees a NaN or an infinity. The layers are named.
    """
    if not isinstance(model, nn.Module | QuantizedModel):
        raise TypeError(
            f"`model` must be a flax.linen Module, but it is a {type(model).__name__}. One "
            "that was quantized after training is given as `QuantizedModel(model)`."
        )
    is_bare = not (isinstance(params, Mapping) and "params" in params)
    variables = {"params": params} if is_bare else dict(params)
    tree = {path: entry.node for path, entry in entries(variables["params"]).items()}
    watch = Watch(tree, quantized=isinstance(model, QuantizedModel))
    variables["params"] = watch.with_slots(variables["params"])

    @jax.jit
    def run(variables: Any, batch: Any) -> list[jax.Array]:
        with nn.intercept_methods(watch.intercept):
            result = model.apply(variables, *batch, **options)
        # Returned, or XLA would leave out the layers whose inputs are watched.
        return [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)]

    x_scales = see(watch, functools.partial(run, variables), batches, ignore, progress=progress)
    return x_scales if is_bare else {"params": x_scales}


def see(
    watch: Watch,
    run: Callable[[tuple], Any],
    batches: Iterable[Any],
    ignore: str | Sequence[str],
    *,
    progress: bool,
) -> dict[str, Any]:
    """The scales by what `run` shows to `watch` of all batches.

    Raises:
        ValueError: as `calibrate`.
    """
    count = len(batches) if isinstance(batches, Sized) else None
    seen = 0
    with contextlib.ExitStack() as stack:
        bar = progress_bar("calibrate", count, "batches") if progress else None
        advance = stack.enter_context(bar) if bar else lambda amount: None
        for batch in batches:
            jax.block_until_ready(run(batch if isinstance(batch, tuple) else (batch,)))
            watch.check_finite(seen)
            seen += 1
            advance(1)
    if not seen:
        raise ValueError(
            "`batches` is empty, so no layer has seen anything. Give at least one batch; an "
            "iterator that was used up must be made anew."
        )
    return watch.scales((ignore,) if isinstance(ignore, str) else tuple(ignore))


def with_x_scales(params: Any, x_scales: Any) -> Any:
    """`params` with `x_scales` put beside its kernels: the tree for `static_x_scale=True`.

    Other leaves are handed on as they are, and an `x_scale` that is there is replaced. A scale is
    placed on the devices of its kernel.

    Args:
        params: a served tree, with the "params" collection or without, as `x_scales` has it.
        x_scales: what `calibrate` returned: `x_scale` by path, float32 `[*stack]`.

    Raises:
        ValueError: if a scale has no PaddedKernel beside it, or is not of its stack's shape, or is
            not finite and at least 2^-126. All are listed.
        TypeError: if a leaf is not named `x_scale`.
    """
    tree, problems = entries(params), []
    fresh: dict[Path, Any] = {}
    for path, entry in entries(x_scales).items():
        kernel = tree.get((*path[:-1], "kernel"))
        if path[-1:] != ("x_scale",):
            raise TypeError(
                f"`x_scales` must hold leaves named `x_scale` alone, as `calibrate` returns them, "
                f"but it has {path_name(path)}. Load weights with `update_params`."
            )
        if kernel is None or not isinstance(kernel.node, PaddedKernel):
            problems.append(f"{path_name(path)}: `params` has no PaddedKernel beside it.")
            continue
        fresh[path], wrong = placed_scale(entry.node, kernel.node)
        problems += [f"{path_name(path)}: {problem}" for problem in wrong]
    raise_unfit(problems, "params")
    return _merge(params, fresh, ())


def placed_scale(scale: Any, kernel: PaddedKernel) -> tuple[jax.Array | None, list[str]]:
    """A static scale on the devices of its kernel; or what is wrong with it."""
    # A copy: on a CPU `device_put` gives a view, which would change with the caller's array.
    scale = np.array(jax.device_get(scale), np.float32)
    if scale.shape != kernel.stack:
        return None, [f"its shape is {scale.shape}, but its kernel's stack is {kernel.stack}."]
    if not (np.isfinite(scale) & (scale >= MIN_SCALE)).all():
        return None, ["it is not positive, finite and at least 2^-126."]
    where = kernel.qvalue
    committed = isinstance(where, jax.Array) and where.committed
    return jax.device_put(scale, replicated(where.sharding) if committed else None), []


def raise_unfit(problems: list[str], name: str) -> None:
    """Refuse scales that do not fit.

    Raises:
        ValueError: if there are problems; all are listed.
    """
    if problems:
        raise ValueError(
            f"`x_scales` does not fit `{name}`. Give what `calibrate` returned for this model:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )


def _merge(node: Any, fresh: Mapping[Path, Any], path: Path) -> Any:
    if is_parameter(node) or jax.tree_util.treedef_is_leaf(jax.tree.structure(node)):
        return node
    if not isinstance(node, Mapping):
        found, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda kid: kid is not node)
        paths = ((*path, jax.tree_util.keystr(key, simple=True)) for key, _ in found)
        children, treedef = one_level(node)
        return treedef.unflatten(
            _merge(child, fresh, own) for child, own in zip(children, paths, strict=True)
        )
    result = {key: _merge(child, fresh, (*path, str(key))) for key, child in node.items()}
    if (*path, "x_scale") in fresh:
        result["x_scale"] = fresh[*path, "x_scale"]
    return mapping_like(node, result)
