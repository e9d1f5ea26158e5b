"""The MLP block that is measured: dense, gelu, dense, residual; in FP8 and as its peers have it."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import fp8_ops

from benchmarks.shapes import copies_past_cache
from jaxfp8.calibrate import calibrate
from jaxfp8.linen import PaddedFP8Dense
from jaxfp8.padded import PaddedKernel, padded_size


class Block(nn.Module):
    """x + down(gelu(up(x))), `features` -> `hidden` -> `features`, bfloat16 in and out.

    Attributes:
        kind: "fp8" is PaddedFP8Dense with gelu and residual in its epilogues, "static" the same
            whose first layer gives e4m3 by a static scale, "bf16" nn.Dense, "flax" nn.Dense with
            Flax's own FP8 product.
    """

    features: int
    hidden: int
    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "fp8":
            h = PaddedFP8Dense(self.hidden, activation="gelu", name="up")(x)
            return PaddedFP8Dense(self.features, name="down")(h, residual=x)
        if self.kind == "static":
            scale = self.param("hidden_scale", nn.initializers.ones, (), jnp.float32)
            h = PaddedFP8Dense(self.hidden, activation="gelu", name="up")(x, out_scale=scale)
            return PaddedFP8Dense(self.features, dtype=x.dtype, name="down")(h, residual=x)
        options: dict[str, Any] = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        if self.kind == "flax":
            options["dot_general_cls"] = fp8_ops.Fp8DirectDotGeneralOp
        h = nn.gelu(nn.Dense(self.hidden, name="up", **options)(x), approximate=True)
        return x + nn.Dense(self.features, name="down", **options)(h)


class Stack(nn.Module):
    """`layers` blocks, one after another."""

    features: int
    hidden: int
    kind: str
    layers: int

    @nn.compact
    def __call__(self, x):
        for index in range(self.layers):
            x = Block(self.features, self.hidden, self.kind, name=f"block_{index}")(x)
        return x


class ScannedStack(nn.Module):
    """The same under `nn.scan`: the weights of all blocks lie stacked in one buffer each."""

    features: int
    hidden: int
    kind: str
    layers: int

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = scan(Block(self.features, self.hidden, self.kind, name="blocks"), x, None)
        return x


def layers_past_cache(features: int, hidden: int) -> int:
    """How many blocks of distinct weights a stack has, so that none is found in the cache."""
    return max(4, copies_past_cache(2 * padded_size(features) * padded_size(hidden)))


def dense_params(features: int, hidden: int, layers: int) -> dict[str, Any]:
    """Weights of nn.Dense, in bfloat16, with biases that are not zero."""
    keys = jax.random.split(jax.random.key(0), layers)
    return {f"block_{i}": _dense_block(key, features, hidden) for i, key in enumerate(keys)}


def fp8_params(params: dict[str, Any]) -> dict[str, Any]:
    """The same weights for PaddedFP8Dense."""
    return {name: fp8_layers(block) for name, block in params.items()}


def static_params(params: dict[str, Any], features: int, hidden: int) -> dict[str, Any]:
    """FP8 `params`, and the scale of what each second layer sees of 256 normal rows."""
    x = jax.random.normal(jax.random.key(2), (256, features), jnp.bfloat16)
    stack = Stack(features, hidden, "fp8", len(params))
    scales = calibrate(stack, params, [x], progress=False)
    return {
        name: {**block, "hidden_scale": scales[name]["down"]["x_scale"]}
        for name, block in params.items()
    }


def flax_variables(stack: nn.Module, params: dict[str, Any], x: jax.Array) -> dict[str, Any]:
    """`params` beside what Flax's FP8 product keeps: absolute maxima seen, and scales of them."""
    shapes = jax.eval_shape(stack.init, jax.random.key(0), x)
    own = {name: tree for name, tree in shapes.items() if name != "params"}

    def fill(path: Any, leaf: Any) -> jax.Array:
        # About the largest of normal inputs, and of weights of standard deviation K^-0.5.
        amax = 0.2 if "kernel" in path[-1].key else 5.0
        return jnp.full(leaf.shape, amax / 448 if "scale" in path[-1].key else amax, leaf.dtype)

    return {"params": params, **jax.tree_util.tree_map_with_path(fill, own)}


def qwix_stack(params: dict[str, Any], stack: nn.Module, x: jax.Array) -> tuple[Any, Any]:
    """A bf16 `stack` under Qwix's post-training quantization to e4m3, and its parameters.

    Weights by channel, activations by token at every call: the kinds of scales that ours has.
    """
    import qwix

    e4m3 = jnp.float8_e4m3fn
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=e4m3, act_qtype=e4m3)
    quantized = qwix.quantize_model(stack, qwix.PtqProvider([rule]))
    template = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    return quantized, qwix.quantize_params(params, template)


def stacked(params: dict[str, Any]) -> dict[str, Any]:
    """The tree of a Stack as a ScannedStack has it."""
    blocks = [params[f"block_{i}"] for i in range(len(params))]
    return {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def dense_layer(key: jax.Array, k: int, n: int) -> dict[str, jax.Array]:
    """The parameters of one nn.Dense in bfloat16: kernel `[k, n]` and bias `[n]`."""
    kernel_key, bias_key = jax.random.split(key)
    # Drawn in float32: bfloat16 normals take 256 values, whose e4m3 rounding errors add up
    # over K instead of cancelling (a block 4096-14336 was 7 % off its peer, not 4 %).
    kernel = jax.random.normal(kernel_key, (k, n)) * k**-0.5
    bias = jax.random.normal(bias_key, (n,)) / 8
    return {"kernel": kernel.astype(jnp.bfloat16), "bias": bias.astype(jnp.bfloat16)}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _dense_block(key: jax.Array, features: int, hidden: int) -> dict[str, Any]:
    up, down = jax.random.split(key)
    return {"up": dense_layer(up, features, hidden), "down": dense_layer(down, hidden, features)}


@jax.jit
def fp8_layers(layers: dict[str, Any]) -> dict[str, Any]:
    """The parameters of several nn.Dense as PaddedFP8Dense has them."""
    return {
        name: {
            "kernel": PaddedKernel.from_dense(dense["kernel"]),
            "bias": dense["bias"].astype(jnp.float32),
        }
        for name, dense in layers.items()
    }
