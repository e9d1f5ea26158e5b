"""Bad inputs of jaxfp8.nnx."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import orbax.checkpoint as ocp
from bad_input import Case
from flax import nnx
from nnx_cases import Net, inputs, served
from update_cases import weight

from jaxfp8 import reload_params, update_params
from jaxfp8.nnx import WEIGHTS, FP8Param, PaddedFP8Linear, quantize_linears, reload_model


Prepared = tuple[Any, Callable[[], object]]


def weights(model: nnx.Module) -> nnx.State:
    return nnx.state(model, WEIGHTS)


def missing_and_unexpected(folder: Path) -> Prepared:
    model, loaded = served(), nnx.to_pure_dict(weights(Net(seed=1)))
    loaded["layers"][0]["gate"] = loaded["layers"][0].pop("up")
    return weights(model), lambda: reload_model(model, loaded)


def transposed(folder: Path) -> Prepared:
    state = weights(served())
    loaded = nnx.to_pure_dict(weights(Net(seed=1)))
    loaded["layers"][1]["down"]["kernel"] = weight(20, 30)
    return state, lambda: reload_params(state, loaded)


def not_finite(folder: Path) -> Prepared:
    model, trainer = served(), Net(seed=1)
    trainer.layers[0].up.bias[...] = trainer.layers[0].up.bias[...].at[2].set(jnp.nan)
    return weights(model), lambda: reload_model(model, trainer)


def random_stream(folder: Path) -> Prepared:
    state = weights(served())
    return state, lambda: update_params(state, nnx.state(Net(seed=1)))


def differentiated(folder: Path) -> Prepared:
    model = served()
    grad = nnx.grad(lambda m, x: m(x).sum(), argnums=nnx.DiffState(0, FP8Param))
    return weights(model), lambda: grad(model, inputs(2, 20))


def nothing_selected(folder: Path) -> Prepared:
    model = Net()
    return weights(model), lambda: quantize_linears(model, "layers/*/gate")


def not_convertible(folder: Path) -> Prepared:
    model = nnx.Dict(lora=nnx.LoRALinear(20, 30, lora_rank=2, rngs=nnx.Rngs(0)))
    return weights(model), lambda: quantize_linears(model, nnx.Linear)


def another_logical_size(folder: Path) -> Prepared:
    checkpointer = ocp.StandardCheckpointer()
    stored = PaddedFP8Linear(20, 30, use_bias=False, rngs=nnx.Rngs(0))
    checkpointer.save(folder / "state", weights(stored))
    checkpointer.wait_until_finished()
    template = weights(PaddedFP8Linear(18, 30, use_bias=False, rngs=nnx.Rngs(0)))
    return template, lambda: checkpointer.restore(folder / "state", template)


def hook(folder: Path) -> Prepared:
    options = {"dot_general": lambda *args, **kwargs: None, "rngs": nnx.Rngs(0)}
    return {}, lambda: PaddedFP8Linear(20, 30, **options)


FIT = "does not fit `params`, and nothing has been changed"
CASES = [
    Case(
        "a layer of another name",
        missing_and_unexpected,
        ValueError,
        (FIT, "Missing", "layers/0/up/kernel", "layers/0/gate/bias", "ignore=('layers/0/gate/*',)"),
    ),
    Case(
        "a transposed weight",
        transposed,
        ValueError,
        (FIT, "layers/1/down/kernel", "(20, 30)", "(30, 20)", 'layout="out_in"'),
    ),
    Case(
        "a NaN in a bias",
        not_finite,
        ValueError,
        ("layers/0/up/bias", "NaN or infinite", "nothing has been changed", "diverged"),
    ),
    Case(
        "random streams in a state",
        random_stream,
        ValueError,
        (FIT, "Unexpected", "drop/rngs/count", "drop/rngs/key", "ignore=('drop/rngs/*',)"),
    ),
    Case(
        "a gradient by FP8 weights",
        differentiated,
        TypeError,
        ("`kernel`", "holds FP8 weights", "float `param_dtype`", "stop_gradient"),
    ),
    Case(
        "a filter that selects nothing",
        nothing_selected,
        ValueError,
        ("`select`", "'layers/*/gate'", "layers/0/down", "must fit one"),
    ),
    Case(
        "a subclass of nnx.Linear",
        not_convertible,
        ValueError,
        ("lora: it is a LoRALinear", "nothing has been changed", "Leave them out of `select`"),
    ),
    Case(
        "a checkpoint of another logical size",
        another_logical_size,
        ValueError,
        ("20x30", "18x30"),
    ),
    Case(
        "a hook of nnx.Linear",
        hook,
        TypeError,
        ("`dot_general` of nnx.Linear", "PaddedFP8Linear", "use nnx.Linear for this layer"),
    ),
]
