"""An existing NNX model with its `nnx.Linear` layers in FP8: chosen, checked, replaced."""

from __future__ import annotations

import fnmatch
import gc
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxfp8._accounting import path_name
from jaxfp8._layer_checks import REFUSED, check_dense, check_not_deleted
from jaxfp8._nnx_linear import PaddedFP8Linear, changed_hooks
from jaxfp8._nnx_variables import FP8Param
from jaxfp8.quantize import FP8_DTYPE, is_fp8


M = TypeVar("M", bound=nnx.Module)
Path = tuple[Any, ...]

_HOOKS = ("dot_general", "promote_dtype", "preferred_element_type")


def quantize_linears(
    model: M,
    select: Any,
    *,
    param_dtype: Any = FP8_DTYPE,
    per_channel: bool = True,
    static_x_scale: bool = False,
    implementation: str | None = None,
) -> M:
    """A copy of a model in which the selected `nnx.Linear` layers are PaddedFP8Linear.

    The model itself is left as it is, and shares no buffer with the copy, so it may go on training
    and be loaded into the copy again and again (`reload_model(copy, model)`). A layer or a weight
    that is used in several places is converted once and stays shared. To convert without holding
    float weights at all, start from an abstract model: `nnx.eval_shape(lambda: Model(...))`, then
    `nnx.update(copy, update_params(nnx.state(copy, WEIGHTS), loaded))`.

    Each layer keeps its `dtype`, `precision` and axis names. With `dtype=None` its result has the
    dtype of the input, where nnx.Linear promotes that with the weight's.

    Args:
        model: any nnx.Module; its arrays may be abstract.
        select: which of the nnx.Linear layers: a pattern (`fnmatch`) of their paths, such as
            `"encoder/*/up"`, or of a module around them, such as `"encoder"`; an NNX filter of path
            and module (`nnx.Linear`, `...`, `nnx.Not(...)`, `lambda path, layer: ...`); or a list
            or tuple of these, of which one must fit. A shared layer goes by its first path.
        param_dtype: `jnp.float8_e4m3fn`, or a float dtype for layers that train in FP8.
        per_channel: as for PaddedFP8Linear, like `static_x_scale` and `implementation`.

    Returns:
        The copy. `quantized_paths(copy)` tells which layers it has in FP8.

    Raises:
        TypeError: if `model` is no nnx.Module, or `select` no filter.
        ValueError: if no layer fits, or one that does cannot be converted: a subclass with a
            `__call__` or attributes of its own, with hooks such as `dot_general`, with a weight
            that is no float matrix, is not finite (looked at where it is concrete), or is shared
            with a layer that is not selected. All are listed in one error.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be an nnx.Module, but it is {type(model).__name__}. A Linen model takes "
            "PaddedFP8Dense layers, or `nnx.bridge.ToNNX` around it."
        )
    linears = dict(_modules(model, nnx.Linear))
    chosen = _predicate(select)
    selected = {path: layer for path, layer in linears.items() if chosen(path, layer)}
    if not selected:
        raise ValueError(
            f"`select` fits none of the nnx.Linear layers, but it must fit one: it is {select!r}, "
            f"and the layers are {', '.join(map(_name, linears)) or '(none)'}. A string is a "
            "pattern of paths; other NNX filters see the path as a tuple and the layer."
        )
    _raise_all([*_problems(selected), *_untied(model, selected)])
    options = {
        "param_dtype": param_dtype,
        "per_channel": per_channel,
        "static_x_scale": static_x_scale,
        "implementation": implementation,
    }
    converted: dict[int, Any] = {}
    layers = {path: _convert(layer, options, converted) for path, layer in selected.items()}
    _check_finite(layers)
    new = nnx.recursive_map(lambda path, node: layers.get(path, node), model, graph=True)
    # Only what was not converted is still the model's own.
    owned = {id(leaf) for leaf in jax.tree.leaves(nnx.state(model))}
    graphdef, state = nnx.split(new)
    state = jax.tree.map(lambda leaf: _copy(leaf) if id(leaf) in owned else leaf, state)
    copy = nnx.merge(graphdef, state)
    # Flax's recursive_map leaves cycles that would hold the float model when the caller drops it.
    del new
    gc.collect()
    return copy


def quantized_paths(model: nnx.Module) -> tuple[str, ...]:
    """The paths of a model's layers in FP8, such as `layers/0/up`: those that hold an FP8Param."""
    layers = _modules(model, PaddedFP8Linear)
    return tuple(_name(path) for path, layer in layers if isinstance(layer.kernel, FP8Param))


def _modules(model: nnx.Module, kind: type) -> Iterator[tuple[Path, Any]]:
    return ((p, m) for p, m in nnx.iter_modules(model, graph=True) if isinstance(m, kind))


def _name(path: Path) -> str:
    return path_name(tuple(map(str, path)))


def _predicate(select: Any) -> Callable[[Path, Any], bool]:
    if isinstance(select, str):

        def fits(path: Path, layer: Any) -> bool:
            heads = (_name(path[: end + 1]) for end in range(len(path)))
            return select == "*" or any(fnmatch.fnmatchcase(head, select) for head in heads)

        return fits
    if isinstance(select, list | tuple):
        fitting = [_predicate(part) for part in select]
        return lambda path, layer: any(fits(path, layer) for fits in fitting)
    if isinstance(select, type | bool) or select in (..., None) or callable(select):
        return nnx.All(select)
    raise TypeError(
        "`select` must be a pattern of paths, an NNX filter, or a list or tuple of these, but it "
        f"is {select!r}."
    )


def _problems(selected: dict[Path, Any]) -> Iterator[str]:
    plain = set(vars(nnx.Linear(1, 1, rngs=nnx.Rngs(0))))
    for path, layer in selected.items():
        own = sorted(set(vars(layer)) - plain)
        if type(layer).__call__ is not nnx.Linear.__call__ or own:
            what = f"attributes ({', '.join(own)})" if own else "a `__call__`"
            yield (
                f"{_name(path)}: it is a {type(layer).__name__}, a subclass of nnx.Linear with "
                f"{what} of its own, which would be lost"
            )
            continue
        hooks = changed_hooks({name: getattr(layer, name) for name in _HOOKS})
        yield from (f"{_name(path)}: it has a `{hook}`: {REFUSED[hook]}" for hook in hooks)
        for name in ("kernel", "bias"):
            if (variable := getattr(layer, name)) is None:
                continue
            value = variable.get_raw_value()
            stack = jnp.shape(layer.kernel.get_raw_value())[:-2]
            sizes = (layer.in_features, layer.out_features)
            shape = (*stack, *sizes) if name == "kernel" else (*stack, layer.out_features)
            try:
                check_not_deleted(value, f"{_name(path)}/{name}")
                check_dense(value, f"{_name(path)}/{name}", shape)
            except (TypeError, ValueError, RuntimeError) as error:
                yield f"{_name(path)}: {error}"


def _untied(model: nnx.Module, selected: dict[Path, Any]) -> Iterator[str]:
    """Variables that a selected layer shares with something that stays as it is."""
    for paths in nnx.find_duplicates(model, only=nnx.Variable):
        inside = [path for path in paths if path[:-1] in selected]
        outside = [path for path in paths if path[:-1] not in selected]
        if inside and outside:
            yield (
                f"{_name(inside[0])}: it is also {' and '.join(map(_name, outside))}, which would "
                "stay as it is, so that they would be shared no more"
            )


def _check_finite(layers: dict[Path, PaddedFP8Linear]) -> None:
    finite = {}
    for path, layer in layers.items():
        kernel = layer.kernel.get_raw_value()
        tells = kernel.scale if isinstance(layer.kernel, FP8Param) else kernel
        if not isinstance(tells, jax.ShapeDtypeStruct | jax.core.Tracer):
            finite[path] = jnp.all(jnp.isfinite(tells))
    _raise_all(
        f"{_name(path)}: a weight is NaN or infinite. Look for a diverged training step"
        for path, ok in jax.device_get(finite).items()
        if not ok
    )


def _raise_all(problems: Any) -> None:
    if listed := list(problems):
        raise ValueError(
            f"Selected layers cannot be converted, and nothing has been changed ({len(listed)}). "
            "Leave them out of `select`, for example with "
            "`lambda path, layer: type(layer) is nnx.Linear and path[-1] != 'head'`:\n"
            + "\n".join(f"  {problem}." for problem in listed)
        )


def _convert(
    linear: nnx.Linear, options: dict[str, Any], converted: dict[int, Any]
) -> PaddedFP8Linear:
    """The layer in FP8; Variables that it shares with layers before are those of theirs."""
    float_dtype = jnp.float32 if is_fp8(options["param_dtype"]) else options["param_dtype"]
    weight = linear.kernel.get_raw_value()
    stack = weight.shape[:-2]
    eager = linear.kernel.get_metadata("eager_sharding")
    layer = PaddedFP8Linear(
        linear.in_features,
        linear.out_features,
        use_bias=False,
        dtype=linear.dtype,
        precision=linear.precision,
        kernel_init=lambda *_: weight,
        kernel_metadata={**linear.kernel.get_metadata(), "eager_sharding": False},
        rngs=nnx.Rngs(0),
        **options,
    )
    if isinstance(layer.kernel, FP8Param):
        layer.kernel.set_metadata(eager_sharding=eager)
    else:
        layer.kernel = linear.kernel.replace(_copy(weight, float_dtype))
    layer.kernel = converted.setdefault(id(linear.kernel), layer.kernel)
    if linear.bias is not None:
        bias = linear.bias.replace(_copy(linear.bias.get_raw_value(), float_dtype))
        layer.use_bias, layer.bias = True, converted.setdefault(id(linear.bias), bias)
    if stack and layer.x_scale is not None:
        layer.x_scale.set_value(jnp.ones(stack, jnp.float32))
    return layer


def _copy(leaf: Any, dtype: Any = None) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf if dtype is None else leaf.update(dtype=jnp.dtype(dtype))
    if isinstance(leaf, np.ndarray) and dtype is None:
        return leaf.copy()
    return leaf if not isinstance(leaf, jax.Array) else jnp.array(leaf, dtype, copy=True)
