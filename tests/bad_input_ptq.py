"""Bad inputs of post-training quantization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from bad_input import Case
from ptq_models import KEY, WIDTH, Mlp, inputs, scanned
from update_cases import weight

from jaxfp8 import PaddedKernel, QuantizedModel, quantize_dense_params


X = inputs(4, WIDTH)


def quantizing(tree: Any, select: Any = None, model: Any = None, **kwargs: Any) -> Callable:
    """A case of `quantize_dense_params`, whose float tree must stay as it is."""

    def prepare(_folder):
        apply = None if model is None else lambda params: model.apply(params, X)
        made = tree() if callable(tree) else tree
        return made, lambda: quantize_dense_params(made, select, apply=apply, **kwargs)

    return prepare


def serving(model: nn.Module, kernel: np.ndarray) -> Callable:
    """A case of a model applied to a padded kernel."""

    def prepare(_folder):
        tree = {"params": {"kernel": PaddedKernel.from_dense(kernel)}}
        return tree, lambda: QuantizedModel(model).apply(tree, X)

    return prepare


def attention() -> Any:
    return {"query": {"kernel": weight(36, 4, 9)}, "up": {"kernel": weight(36, 10)}}


def diverged() -> Any:
    kernel = weight(36, 10)
    kernel[3, 4] = np.nan
    return {"head": {"kernel": kernel, "bias": weight(10)}}


def padded_per_tensor() -> Any:
    return {"head": {"kernel": PaddedKernel.from_dense(weight(36, 10), per_channel=False)}}


CASES = [
    Case(
        "a pattern that hits nothing",
        quantizing(lambda: Mlp().init(KEY, X), ["up", "head*"], Mlp()),
        ValueError,
        ("'head*'", "the kernel of an nn.Dense", "down, up", "without `params` in front"),
    ),
    Case(
        "attention kernels without a model",
        quantizing(attention),
        ValueError,
        ("query (36, 4, 9)", "[in_features, out_features]", "Pass `apply`", "leave those out"),
    ),
    Case(
        "a stack along the last axis",
        quantizing(lambda: scanned(axis=1).init(KEY, X), "*/up", scanned(axis=1)),
        ValueError,
        ("`mlp/up`", "[*stack, in_features, out_features]", "axis 1", "Stack along axis 0"),
    ),
    Case(
        "a layer with its own dot_general",
        quantizing(
            {"params": {"kernel": weight(36, 10), "bias": weight(10)}},
            model=nn.Dense(10, dot_general=jax.lax.dot_general),
        ),
        TypeError,
        ("`dot_general`", "(the model itself)", "Leave this layer out of `select`"),
    ),
    Case(
        "weights that are NaN",
        quantizing(diverged, "head"),
        ValueError,
        ("`dense_params`", "head/kernel", "NaN or infinite", "diverged"),
    ),
    Case(
        "integer weights",
        quantizing({"head": {"kernel": weight(36, 10).astype(np.int8)}}),
        TypeError,
        ("`dense_params`", "head/kernel", "int8"),
    ),
    Case(
        "a tree that is quantized per tensor already",
        quantizing(padded_per_tensor),
        ValueError,
        ("`head`", "per_channel=False", "per_channel=True", "Quantize the float tree again"),
    ),
    Case(
        "a padded kernel in an attention layer",
        serving(nn.DenseGeneral(10, use_bias=False), weight(36, 10)),
        TypeError,
        ("(the model itself)", "DenseGeneral", "no nn.Dense", "out of `select`"),
    ),
    Case(
        "a padded kernel of another width",
        serving(nn.Dense(12, use_bias=False), weight(36, 10)),
        ValueError,
        ("`kernel`", "out_features=10", "out_features=12"),
    ),
]
