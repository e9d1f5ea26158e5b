"""The task and the policy of `rollout.py`: a small language model that writes its prompt backwards.

A prompt is a row of distinct tokens; the model then writes as many, one after another, and each is
rewarded by 1 if it is the right one. Guessing earns 1 / 30.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


if TYPE_CHECKING:
    from jaxtyping import Array, Float32, Int32

    Cache = tuple[Float32[Array, "batch time width"], Float32[Array, "batch time width"]]


VOCABULARY = 30
START = VOCABULARY  # the token between the prompt and the answer; never written


class Policy(nn.Module):
    """A decoder of one block; trainer, rollout policy and draft are all of this class.

    Attributes:
        dense: the class of its dense layers. They are named, because Flax would name them after
            their class, and the tree trained and the tree served must have the same paths.
        time: the number of positions, twice the prompt's.
        width, hidden, heads: its sizes; none is a multiple of 16, nor is the vocabulary.
        value_head: whether there is a layer for the baseline, which only a trainer needs.
    """

    dense: Callable[..., nn.Module]
    time: int
    width: int = 100
    hidden: int = 340
    heads: int = 4
    value_head: bool = False

    @nn.compact
    def __call__(
        self, tokens: Int32[Array, "batch new"], cache: Cache, position: Any = 0
    ) -> tuple[Float32[Array, "batch new vocabulary"], Float32[Array, "batch new"] | None, Cache]:
        """Read `tokens`, which follow the `position` ones already in `cache`."""
        embedding = nn.Embed(
            VOCABULARY + 1, self.width, embedding_init=nn.initializers.normal(1.0), name="tokens"
        )
        positions = self.param("positions", nn.initializers.normal(1.0), (self.time, self.width))
        new = tokens.shape[1]
        x = embedding(tokens) + jax.lax.dynamic_slice_in_dim(positions, position, new)
        attended, cache = self._attend(nn.LayerNorm(name="norm_attention")(x), cache, position)
        x += self.dense(self.width, name="out")(attended)
        h = nn.LayerNorm(name="norm_mlp")(x)
        x += self.dense(self.width, name="down")(nn.gelu(self.dense(self.hidden, name="up")(h)))
        h = nn.LayerNorm(name="norm_logits")(x)
        logits = self.dense(VOCABULARY, name="logits")(h)
        values = self.dense(1, name="value_head")(h)[..., 0] if self.value_head else None
        return logits, values, cache

    def _attend(self, x: Any, cache: Cache, position: Any) -> tuple[Any, Cache]:
        new, time, size = x.shape[1], self.time, self.width // self.heads

        def split(a: Any) -> Any:
            return a.reshape(*a.shape[:2], self.heads, size)

        query, key, value = jnp.split(self.dense(3 * self.width, name="qkv")(x), 3, axis=-1)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, a, position, axis=1)
            for old, a in zip(cache, (key, value), strict=True)
        )
        seen = jnp.arange(time) <= position + jnp.arange(new)[:, None]
        scores = jnp.einsum("bnhs,bths->bhnt", split(query), split(keys)) * size**-0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        read = jnp.einsum("bhnt,bths->bnhs", weights, split(values))
        return read.reshape(x.shape), (keys, values)

    def empty_cache(self, batch: int) -> Cache:
        zeros = jnp.zeros((batch, self.time, self.width), jnp.float32)
        return zeros, zeros


class Rollout(NamedTuple):
    """What a policy wrote, and the log-probabilities it says it wrote it with."""

    prompts: Int32[Array, "batch length"]
    answers: Int32[Array, "batch length"]
    log_probs: Float32[Array, "batch length"]


def init(policy: Policy, key: Array) -> Any:
    """The variables of a policy."""
    return policy.init(key, jnp.zeros((1, policy.time), jnp.int32), policy.empty_cache(1))


def draw_prompts(key: Array, batch: int, length: int) -> Int32[Array, "batch length"]:
    order = jnp.argsort(jax.random.uniform(key, (batch, VOCABULARY)), axis=1)
    return order[:, :length].astype(jnp.int32)


def rewards(rollout: Rollout) -> Float32[Array, "batch length"]:
    """1 for each token in its place. A token earns nothing later: its reward is its return."""
    return (rollout.answers == rollout.prompts[:, ::-1]).astype(jnp.float32)


def write(
    policy: Policy, params: Any, prompts: Int32[Array, "batch length"], key: Array
) -> Rollout:
    """Sample an answer to each prompt, token by token, with a cache of keys and values."""
    batch, length = prompts.shape
    _, _, cache = policy.apply(params, prompts, policy.empty_cache(batch))

    def step(carry: Any, inputs: Any) -> Any:
        token, cache = carry
        position, key = inputs
        logits, _, cache = policy.apply(params, token[:, None], cache, position)
        token = jax.random.categorical(key, logits[:, 0]).astype(jnp.int32)
        return (token, cache), (token, chosen(logits[:, 0], token))

    start = jnp.full(batch, START, jnp.int32)
    inputs = (length + jnp.arange(length), jax.random.split(key, length))
    _, (answers, log_probs) = jax.lax.scan(step, (start, cache), inputs)
    return Rollout(prompts, answers.T, log_probs.T)


def score(policy: Policy, params: Any, rollout: Rollout) -> tuple[Any, Any]:
    """Logits `[batch, length, vocabulary]` and values of a policy before each token of the answers.

    In one pass over prompt, start and answers, where `write` takes a pass a token.
    """
    batch, length = rollout.answers.shape
    start = jnp.full((batch, 1), START, jnp.int32)
    tokens = jnp.concatenate([rollout.prompts, start, rollout.answers[:, :-1]], axis=1)
    logits, values, _ = policy.apply(params, tokens, policy.empty_cache(batch))
    return logits[:, length:], None if values is None else values[:, length:]


def chosen(logits: Float32[Array, "*lead vocabulary"], tokens: Int32[Array, "*lead"]) -> Any:
    """The log-probability of each token under its logits."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
