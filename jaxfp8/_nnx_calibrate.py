"""Static activation scales of an NNX module, from batches."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxfp8._accounting import entries, path_name
from jaxfp8._nnx_linear import PaddedFP8Linear
from jaxfp8._nnx_variables import ActivationScale, FP8Param
from jaxfp8._watch import Watch
from jaxfp8.calibrate import placed_scale, raise_unfit, see


def calibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    method: str = "__call__",
    ignore: str | Sequence[str] = (),
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """The static scale of each PaddedFP8Linear: the largest |x| it sees over `batches`, over 448.

    As `jaxfp8.calibrate` does for Linen: the module runs as it is, with dynamic scales, under
    `jit`, once for each batch. It is not changed: what it counts or draws meanwhile is forgotten.
    `set_x_scales(model, x_scales)` makes its layers static; a module made with
    `static_x_scale=True` also takes them by `reload_model(model, x_scales, partial=True)`.

    Args:
        model: the module, its layers' `param_dtype` FP8 or, for a trainer's, a float. Layers of a
            stack (`nnx.scan`, `nnx.vmap`) have a scale each.
        batches: what is called with: a tuple is several positional arguments. Everything in them
            is an array; flags go into `options`.
        method: the name of the method that is called.
        ignore: patterns (`fnmatch`) of layers, by their path, that no batch need reach.
        progress: show a bar on standard error (rich's, in the extra `progress`, else lines).
        options: keyword arguments of the method.

    Returns:
        `x_scale` by path, as nested dicts, float32 `[*stack]`. A layer that is only ever handed an
        input already quantized has no scale of its own, and is left out.

    Raises:
        TypeError: if `model` is no nnx.Module.
        ValueError: if there are no batches or no layers, if a layer in FP8 is never reached, or
            sees a NaN or an infinity, or is not scanned with its kernel. The layers are named.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be an nnx.Module, but it is a {type(model).__name__}. A Linen module is "
            "calibrated by `jaxfp8.calibrate(model, params, batches)`."
        )
    copy = nnx.merge(*nnx.split(model))
    layers = _layers(copy)
    kernels = {(*path, "kernel"): layer.kernel.get_raw_value() for path, layer in layers.items()}
    watch = Watch(kernels, kind="PaddedFP8Linear")
    for path, layer in layers.items():
        kind: Any = type(layer)
        layer.__class__ = _watched(kind)
        layer.path, layer.watch = path, watch
        layer.calibration_slot = _Slot(watch.slots(path))
        layer.static_x_scale, layer.x_scale = False, None
    graphdef, state = nnx.split(copy)

    @jax.jit
    def run(state: Any, batch: Any) -> list[jax.Array]:
        result = getattr(nnx.merge(graphdef, state), method)(*batch, **options)
        # Returned, or XLA would leave out the layers whose inputs are watched.
        return [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)]

    x_scales = see(watch, functools.partial(run, state), batches, ignore, progress=progress)
    gc.collect()  # Flax's merge leaves cycles that would hold the model's weights.
    return x_scales


def set_x_scales(model: nnx.Module, x_scales: Any) -> None:
    """Make layers of a served module static, with the scales of `calibrate`.

    Each gets an ActivationScale, on the devices of its kernel, and `static_x_scale=True`; other
    layers stay as they are.

    Args:
        model: the module; it is changed, once everything is checked.
        x_scales: what `calibrate` returned: `x_scale` by path, float32 `[*stack]`.

    Raises:
        ValueError: if a scale has no PaddedFP8Linear with an FP8Param at its path, or is not of
            its stack's shape, or is not finite and at least 2^-126. All are listed.
    """
    layers, problems = _layers(model), []
    fresh: dict[tuple[str, ...], Any] = {}
    for path, entry in entries(x_scales).items():
        layer = layers.get(path[:-1])
        if path[-1:] != ("x_scale",) or layer is None or not isinstance(layer.kernel, FP8Param):
            problems.append(f"{path_name(path)}: `model` has no PaddedFP8Linear in FP8 there.")
            continue
        fresh[path[:-1]], wrong = placed_scale(entry.node, layer.kernel.get_raw_value())
        problems += [f"{path_name(path)}: {problem}" for problem in wrong]
    raise_unfit(problems, "model")
    for path, scale in fresh.items():
        layers[path].x_scale = nnx.data(ActivationScale(scale))  # None was static
        layers[path].static_x_scale = True


class _Slot(FP8Param):
    """A number for each matrix of a layer; where a transform takes Variables by type, a kernel."""

    def __init__(self, value: Any, **metadata: Any):
        super(FP8Param, self).__init__(value, **metadata)


@functools.cache
def _watched(kind: Any) -> Any:
    """A kind of layer whose inputs pass by a Watch."""

    class Watched(kind):
        def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            slot = self.calibration_slot.get_value()
            if jnp.ndim(slot):
                raise ValueError(
                    f"the {kind.__name__} at {path_name(self.path)} has a kernel of a stack, but "
                    "only the kernel is taken apart along it. Let the transform take FP8Param as "
                    "it takes the kernel, for example by `nnx.StateAxes({..., FP8Param: 0})`."
                )
            (inputs,), _ = self.watch.watched(self, slot, (inputs,), {})
            return super().__call__(inputs, *args, **kwargs)

    return Watched


def _layers(model: nnx.Module) -> dict[tuple[str, ...], Any]:
    """By path; a layer used in several places once."""
    modules = nnx.iter_modules(model, graph=True)
    return {tuple(map(str, p)): m for p, m in modules if isinstance(m, PaddedFP8Linear)}
