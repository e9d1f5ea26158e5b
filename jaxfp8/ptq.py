"""Post-training quantization of a Linen model that was written without FP8.

`quantize_dense_params` makes the tree, and `QuantizedModel` (or `fp8_dense_interceptor`) lets the
model run on it. Which layers are FP8 is said by the tree alone: `nn.Dense` runs on the tensor
core where its kernel is a PaddedKernel, and is left as it is elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from jaxfp8._options import check_implementation
from jaxfp8._ptq_layer import fp8_call, is_dense_call, layer_name, stored_kernel
from jaxfp8._ptq_select import Select, choose
from jaxfp8._ptq_tree import Kernels
from jaxfp8.linen import PaddedFP8Dense
from jaxfp8.padded import PaddedKernel
from jaxfp8.update import update_params


# Flax's layers with a kernel that is not nn.Dense's.
_OTHER_LAYERS = (nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvLocal, nn.ConvTranspose)


def quantize_dense_params(
    dense_params: Any,
    select: Select = None,
    *,
    apply: Callable[[Any], Any] | None = None,
    per_channel: bool = True,
) -> Any:
    """The tree of a Linen model with the kernels of chosen `nn.Dense` layers padded and in FP8.

    Equivalent JAX, for each chosen layer: `PaddedKernel.from_dense(kernel)`. Everything else has
    the values that it had, in buffers of its own: nothing is shared with `dense_params`.
    `update_params` and `reload_params` write later trees of the trainer into the result.

    Run the result by `QuantizedModel` or under `fp8_dense_interceptor`: the bare `model.apply`
    takes a padded kernel for one of the wrong shape (Flax's ScopeParamShapeError).

    A tree does not say what a kernel belongs to. With `apply` the model itself is asked, on
    abstract values, and only what `nn.Dense` reads can be chosen. Without it a kernel must have
    rank 2 and nothing but a bias beside it; one of a stack (`nn.scan`, `nn.vmap`) is then refused,
    because those of DenseGeneral and Conv look the same. A wrong guess is an error when the model
    runs.

    Args:
        dense_params: the variables (only their "params" are looked at) or the params of a model:
            any nesting of dicts, FrozenDicts, tuples and lists, with float kernels
            `[*stack, K, N]`, boxed (`nn.Partitioned`) or not. JAX or numpy arrays.
        select: which layers, by path (`encoder/Dense_0`, without "params" in front): a pattern
            (`fnmatch`; it may name a subtree), several of them, each of which must hit a layer, or
            a function of the path. None: every nn.Dense.
        apply: a call of the model on such a tree, `lambda params: model.apply(params, x)`, that
            reaches all layers to be chosen. It is traced, not run.
        per_channel: one scale for each output feature; else one for each matrix.

    Returns:
        A tree of the structure of `dense_params`, with PaddedKernels in place of the chosen
        kernels. Kernels that are PaddedKernels already are kept.

    Raises:
        ValueError: if `select` hits nothing or what may be no nn.Dense, a kernel is stacked along
            another axis than the first, or a weight is NaN or infinite (where it is concrete).
        TypeError: if a chosen layer has a `dot_general`, `dot_general_cls` or `promote_dtype` of
            its own, other code than nn.Dense reads its kernel, or its kernel is no float array.
    """
    kernels = Kernels.of(dense_params)
    chosen = choose(kernels, select, _run_padded(apply), per_channel=per_channel)
    try:
        return update_params(kernels.template(chosen, per_channel=per_channel), dense_params)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"`dense_params` (`loaded` in what follows) cannot be quantized. {error}"
        ) from error


def fp8_dense_interceptor(*, implementation: str | None = None) -> nn.module.Interceptor:
    """An interceptor under which `nn.Dense` runs on the padded kernels of its tree.

    `with nn.intercept_methods(fp8_dense_interceptor()): y = model.apply(params, x)`. Where a
    layer's kernel is a PaddedKernel the result is `fp8_dense(x, kernel, bias)`, of the dtype that
    nn.Dense gives; all other layers and methods run as they are. What follows a layer stays an
    operation of its own: an activation is fused only by `PaddedFP8Dense(activation=...)`.

    What is taken over is `nn.Dense.__call__` itself, so interceptors entered after this one do not
    see these calls, and a subclass of nn.Dense is served where it calls `super().__call__`.

    Args:
        implementation: None, "cutlass" or "xla", as `fp8_dense` takes it.

    Raises:
        ValueError: if `implementation` is unknown. When the model runs: if a kernel does not fit
            its layer.
        TypeError: when the model runs: if a module that is no nn.Dense finds a PaddedKernel, or a
            layer has a `dot_general`, `dot_general_cls` or `promote_dtype` of its own.
    """
    check_implementation(implementation)

    def interceptor(next_fun, args, kwargs, context):
        module = context.module
        _check_weights_reach_layers(module)
        kernel = stored_kernel(module)
        if kernel is None or isinstance(module, PaddedFP8Dense):
            return next_fun(*args, **kwargs)
        if is_dense_call(context):
            return fp8_call(module, kernel, *args, implementation=implementation, **kwargs)
        if isinstance(module, _OTHER_LAYERS):
            raise TypeError(_not_dense(module))
        # It may share the scope of an nn.Dense (`nn.share_scope`), or be about to call it; or it
        # reads the kernel itself, which is not known before it fails.
        try:
            return next_fun(*args, **kwargs)
        except Exception as error:
            note = f"It may be that {_not_dense(module)}"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise

    return interceptor


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """A Linen model whose `apply` runs under `fp8_dense_interceptor`.

    `jax.jit(QuantizedModel(model).apply)(params, x)`. Parameters are made by the model itself
    (`model.init`) and `quantize_dense_params`; on a float tree it gives what the model gives.

    Attributes:
        model: the model, as it is.
        implementation: None, "cutlass" or "xla", as `fp8_dense` takes it.

    Raises:
        TypeError: if `model` is no `nn.Module`.
        ValueError: if `implementation` is unknown.
    """

    model: nn.Module
    implementation: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(
                "`model` must be a Linen module (an instance of flax.linen.Module), but it is "
                f"{self.model!r}."
            )
        check_implementation(self.implementation)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """`model.apply(variables, *args, **kwargs)`, with `method`, `rngs`, `mutable` as there."""
        with nn.intercept_methods(fp8_dense_interceptor(implementation=self.implementation)):
            return self.model.apply(variables, *args, **kwargs)


def _run_padded(apply: Callable[[Any], Any] | None) -> Callable[[Any], Any] | None:
    """`apply` on a tree of which a part is quantized already."""
    if apply is None:
        return None

    def run(params: Any) -> Any:
        with nn.intercept_methods(fp8_dense_interceptor()):
            return apply(params)

    return run


def _not_dense(module: nn.Module) -> str:
    return (
        f"the kernel at `{layer_name(module.path)}` is a PaddedKernel, but {type(module).__name__} "
        "is no nn.Dense, whose `__call__` alone is run on one. Leave this layer out of `select` in "
        "`quantize_dense_params`, or pass `apply` there, which finds the nn.Dense layers."
    )


def _check_weights_reach_layers(module: nn.Module) -> None:
    """Refuse Flax's wrappers that compute with the weights of the layer in them."""
    if not isinstance(module, nn.WeightNorm | nn.SpectralNorm):
        return
    inside = module.layer_instance
    if inside.scope is None:
        return
    params = inside.variables.get("params", {})
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, PaddedKernel))
    if any(isinstance(node, PaddedKernel) for node in nodes):
        raise TypeError(
            f"The layer in the {type(module).__name__} at `{layer_name(module.path)}` has a "
            "PaddedKernel, whose FP8 buffer cannot be normalised at every call. Leave it out of "
            "`select`, or normalise the weights once, before they are quantized."
        )
