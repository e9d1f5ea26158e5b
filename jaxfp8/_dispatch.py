"""Which implementation runs, which accumulation, and the named-implementation errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core
from jax.interpreters import mlir

from jaxfp8 import _cutlass, _xla


IMPLEMENTATIONS = (None, "cutlass", "xla")


def choose(implementation: str | None) -> tuple[str, str]:
    """What runs on a GPU here, and why.

    Returns:
        `(name, reason)`, name "cutlass" or "xla". With no CUDA device visible the answer for
        `None` is "cutlass": the program may be lowered for a machine that has one.
    """
    if implementation is not None:
        return implementation, f"`implementation={implementation!r}` was asked for"
    if not _cutlass.cuda_devices():
        return "cutlass", "no CUDA device is visible, so each platform takes its own when lowered"
    problem = _cutlass.problem()
    if problem is None:
        return "cutlass", "every visible GPU is a Hopper GPU and the plugin is loaded"
    return "xla", problem


def call(operation: str, implementation: str | None, *args: Any, **static: Any) -> jax.Array:
    """Run `_cutlass.<operation>` or `_xla.<operation>`, decided when the program is lowered."""

    def xla(*args: Any) -> jax.Array:
        return getattr(_xla, operation)(*args, **static)

    def cutlass(*args: Any) -> jax.Array:
        return getattr(_cutlass, operation)(*args, **static)

    def named(*args: Any) -> jax.Array:
        return xla(_require_cutlass(args[0]), *args[1:])

    if choose(implementation)[0] == "xla":
        return xla(*args)
    if implementation is None:
        return _per_platform(cutlass, xla, *args)

    def checked(*args: Any) -> jax.Array:
        return cutlass(_require_cutlass(args[0]), *args[1:])

    return _per_platform(checked, named, *args)


def _per_platform(cuda: Callable, default: Callable, *args: Any) -> jax.Array:
    if _cutlass.cuda_devices():
        _cutlass.plugin()  # registers the targets before anything is compiled
    return lax.platform_dependent(*args, cuda=cuda, default=default)


# The identity, whose lowering says why CUTLASS cannot run on the platform it is lowered for: so
# a program that names it can still be traced, and lowered for a GPU, on a machine without one.
_require_cutlass_p = jex_core.Primitive("jaxfp8_require_cutlass")


@_require_cutlass_p.def_abstract_eval
def _(x):
    return x


@_require_cutlass_p.def_impl
def _(x):
    return jax.jit(_require_cutlass)(x)


def _require_cutlass(x: jax.Array) -> jax.Array:
    return _require_cutlass_p.bind(x)


def _lower_elsewhere(ctx, x):
    platforms = ctx.module_context.platforms
    raise RuntimeError(
        '`implementation="cutlass"` was asked for, but this program is for '
        f"{' and '.join(platforms)}: {_cutlass.problem() or 'CUTLASS runs on CUDA alone.'} "
        "`implementation=None` takes CUTLASS where it can run and XLA elsewhere."
    )


def _lower_cuda(ctx, x):
    # Without a visible GPU this is a lowering for another machine: nothing to check.
    if _cutlass.cuda_devices() and (problem := _cutlass.problem()):
        raise RuntimeError(f'`implementation="cutlass"` cannot run here: {problem}')
    return [x]


mlir.register_lowering(_require_cutlass_p, _lower_elsewhere)
mlir.register_lowering(_require_cutlass_p, _lower_cuda, platform="cuda")


def check_implementation(implementation: object) -> None:
    """Refuse an unknown implementation.

    Raises:
        ValueError: if it is not None, "cutlass" or "xla".
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f'`implementation` must be None, "cutlass" or "xla", but it is {implementation!r}.'
        )


def is_promoted(precision: Any) -> bool:
    """Whether partial sums are promoted to float32 registers (else: accumulated by the MMA).

    `None` follows `jax_default_matmul_precision`; DEFAULT is fast, HIGH and HIGHEST promoted, as
    in XLA's own FP8 dots; `DotAlgorithmPreset.ANY_F8_ANY_F8_F32` is promoted and its
    `_FAST_ACCUM` variant fast; a pair is promoted if either of its two is.

    Raises:
        ValueError: for any other algorithm preset or value.
    """
    if precision is None:
        precision = jax.config.jax_default_matmul_precision
    if isinstance(precision, tuple | list) and len(precision) == 2:
        return any(is_promoted(p) for p in precision)
    presets = {
        lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32: True,
        lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32_FAST_ACCUM: False,
    }
    for preset, promoted in presets.items():
        if precision in (preset, preset.name):
            return promoted
    try:
        return lax.Precision(precision) != lax.Precision.DEFAULT
    except ValueError:
        raise ValueError(
            "`precision` must be None, a `jax.lax.Precision` or its name, or "
            "`DotAlgorithmPreset.ANY_F8_ANY_F8_F32` with or without `_FAST_ACCUM`, but it is "
            f"{precision!r}."
        ) from None


def check_activation(activation: object) -> None:
    """Refuse an unknown activation.

    Raises:
        ValueError: naming the known ones.
    """
    if activation not in _xla.ACTIVATIONS:
        known = ", ".join(repr(a) for a in _xla.ACTIVATIONS)
        raise ValueError(
            f"`activation` must be one of {known}, but it is {activation!r}. Apply any other "
            "function to the result."
        )


def check_out_dtype(out_dtype: Any) -> Any:
    """The output dtype as a numpy dtype, if the epilogue can write it.

    Raises:
        ValueError: if it is not bfloat16, float16 or float32.
    """
    dtype = jnp.dtype(out_dtype)
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(
            f"`out_dtype` must be bfloat16, float16 or float32, but it is {dtype}. Cast the "
            "result to anything else."
        )
    return dtype
