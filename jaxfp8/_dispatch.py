"""Which implementation runs, decided when a program is lowered; and exporting such programs."""

from __future__ import annotations

from typing import Any

import jax
import jax.export
from jax import lax
from jax.extend import core as jex_core
from jax.interpreters import mlir

from jaxfp8 import _cutlass, _xla


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

    if choose(implementation)[0] == "xla":
        return xla(*args)
    if implementation == "cutlass":
        args = (_require_cutlass_p.bind(args[0]), *args[1:])
    if _cutlass.cuda_devices():
        _cutlass.plugin()  # registers the targets before anything is compiled
    return lax.platform_dependent(*args, cuda=cutlass, default=xla)


# The identity, whose lowering says why CUTLASS cannot run on the platform it is lowered for: so
# a program that names it can still be traced, and lowered for a GPU, on a machine without one.
_require_cutlass_p = jex_core.Primitive("jaxfp8_require_cutlass")


@_require_cutlass_p.def_abstract_eval
def _(x):
    return x


@_require_cutlass_p.def_impl
def _(x):
    return jax.jit(_require_cutlass_p.bind)(x)


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


def export_safety_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What to pass as `jax.export.export(f, disabled_checks=...)`: our custom-call targets.

    JAX refuses to export a custom call whose target nobody vouches for. The targets carry a
    version in their names, and a library keeps its old handlers, so an artefact keeps running.
    """
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in _cutlass.TARGETS]
