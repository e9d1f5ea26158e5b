"""What `rollout.py` compiles: the training step, the served side, and what compares the two.

Losses and optimizers are the trainer's affair, rolling out and scoring the served policy's; both
are jitted once for a class of dense layers, and shared by all runs that use it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import rollout_policy as task
from rollout_policy import Policy, Rollout

from jaxfp8.update import update_params


LEARNING_RATE = 1e-3
# At the policy's own rate the draft lags: its tokens were accepted 8 times in 100 when the policy
# had just learnt the task, at this rate 97 times (one seed each).
DRAFT_LEARNING_RATE = 1e-2
CLIP = 0.2  # of the importance ratio: Schulman et al. 2017, Proximal Policy Optimization, eq. 7
ENTROPY_BONUS = 0.01
VALUE_WEIGHT = 0.5
# Of what the trainer has, the served policy lacks this.
NOT_SERVED = "params/value_head"

Dense = Callable[..., nn.Module]


class Trainer(NamedTuple):
    """What is trained: two float trees, and an optimizer's state for each."""

    policy: Any
    draft: Any
    policy_optimizer: Any
    draft_optimizer: Any


class Training(NamedTuple):
    """The compiled functions of the float side.

    Attributes:
        train: one step; the trainer given is donated. Returns the reward and the gap too.
        score: the logits of a rollout's answers.
    """

    train: Callable[[Trainer, Rollout], tuple[Trainer, Any]]
    score: Callable[[Any, Rollout], Any]


class Serving(NamedTuple):
    """The compiled functions of the served side.

    Attributes:
        load: the served trees of a policy and a draft, made from a trainer's.
        write: new prompts, and what the served policy answers.
        score, score_draft: the logits of a rollout's answers.
    """

    load: Callable[[Trainer], tuple[Any, Any]]
    write: Callable[[Any, jax.Array], Rollout]
    score: Callable[[Any, Rollout], Any]
    score_draft: Callable[[Any, Rollout], Any]


def models(dense: Dense, length: int, *, value_head: bool) -> tuple[Policy, Policy]:
    """The policy and its draft, which has an eighth of the weights."""
    policy = Policy(dense, 2 * length, value_head=value_head)
    return policy, Policy(dense, 2 * length, width=36, hidden=100, heads=2)


def optimizers() -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    clip = optax.clip_by_global_norm(1.0)
    return tuple(
        optax.chain(clip, optax.adam(rate)) for rate in (LEARNING_RATE, DRAFT_LEARNING_RATE)
    )


@functools.cache
def compile_init(length: int) -> Callable[[jax.Array], Trainer]:
    """A jitted function from a key to a trainer.

    One for all runs: `PaddedFP8Dense` with a float `param_dtype` has `nn.Dense`'s parameters.
    """

    def init(key: jax.Array) -> Trainer:
        keys = jax.random.split(key)
        pair = models(nn.Dense, length, value_head=True)
        trees = [task.init(model, key) for model, key in zip(pair, keys, strict=True)]
        states = [opt.init(tree) for opt, tree in zip(optimizers(), trees, strict=True)]
        return Trainer(*trees, *states)

    return jax.jit(init)


@functools.cache
def compile_training(dense: Dense, length: int) -> Training:
    """The float side of runs whose trainer has these dense layers."""
    policy, draft = models(dense, length, value_head=True)
    policy_optimizer, draft_optimizer = optimizers()

    def train(trainer: Trainer, rollout: Rollout) -> tuple[Trainer, Any]:
        gradients, (logits, seen) = jax.grad(policy_loss, argnums=1, has_aux=True)(
            policy, trainer.policy, rollout
        )
        distilled = jax.grad(draft_loss, argnums=1)(
            draft, trainer.draft, rollout, jax.nn.softmax(logits)
        )
        update, state = policy_optimizer.update(gradients, trainer.policy_optimizer)
        draft_update, draft_state = draft_optimizer.update(distilled, trainer.draft_optimizer)
        return Trainer(
            optax.apply_updates(trainer.policy, update),
            optax.apply_updates(trainer.draft, draft_update),
            state,
            draft_state,
        ), seen

    return Training(jax.jit(train, donate_argnums=0), scorer(policy))


@functools.cache
def compile_serving(dense: Dense, batch: int, length: int) -> Serving:
    """The served side of runs that roll out with these dense layers."""
    policy, draft = models(dense, length, value_head=False)

    def load(trainer: Trainer) -> tuple[Any, Any]:
        key = jax.random.key(0)  # nothing is drawn: only shapes are asked for
        shapes = [jax.eval_shape(functools.partial(task.init, m), key) for m in (policy, draft)]
        return (
            update_params(shapes[0], trainer.policy, ignore=NOT_SERVED),
            update_params(shapes[1], trainer.draft),
        )

    def write(params: Any, key: jax.Array) -> Rollout:
        prompt_key, answer_key = jax.random.split(key)
        prompts = task.draw_prompts(prompt_key, batch, length)
        return task.write(policy, params, prompts, answer_key)

    return Serving(jax.jit(load), jax.jit(write), scorer(policy), scorer(draft))


def scorer(model: Policy) -> Callable[[Any, Rollout], Any]:
    return jax.jit(lambda params, rollout: task.score(model, params, rollout)[0])


def policy_loss(model: Policy, params: Any, rollout: Rollout) -> tuple[Any, Any]:
    """PPO's clipped loss with the value head as baseline; logits, reward and gap beside it.

    The ratio is of the trainer's probability to that of the policy which wrote: it makes up for
    the rounding to FP8 and for weights a few steps old alike.
    """
    logits, values = task.score(model, params, rollout)
    log_probs = task.chosen(logits, rollout.answers)
    reward = task.rewards(rollout)
    advantage = jax.lax.stop_gradient(reward - values)
    advantage /= advantage.std() + 1e-6
    ratio = jnp.exp(log_probs - rollout.log_probs)
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage)
    entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1)
    loss = VALUE_WEIGHT * jnp.square(reward - values) - gain - ENTROPY_BONUS * entropy
    return loss.mean(), (logits, (reward.mean(), *differences(log_probs, rollout.log_probs)))


def draft_loss(model: Policy, params: Any, rollout: Rollout, teacher: Any) -> Any:
    """Cross-entropy of the draft against the trainer's probabilities, where the rollout went."""
    logits, _ = task.score(model, params, rollout)
    return optax.softmax_cross_entropy(logits, teacher).mean()


@jax.jit
def gap(trained: Any, served: Any, answers: Any) -> tuple[Any, Any]:
    """Mean and maximum of |log p(trainer) - log p(served)| over the answers, from logits."""
    return differences(task.chosen(trained, answers), task.chosen(served, answers))


def differences(trained: Any, served: Any) -> tuple[Any, Any]:
    difference = jnp.abs(trained - served)
    return difference.mean(), difference.max()


@jax.jit
def acceptance(policy: Any, draft: Any) -> Any:
    """How often a token drawn from the draft is accepted, from the logits of both.

    Leviathan et al. 2023, Fast Inference from Transformers via Speculative Decoding, corollary
    3.6: one drawn from q is accepted with probability sum(min(p, q)).
    """
    return jnp.minimum(jax.nn.softmax(policy), jax.nn.softmax(draft)).sum(-1).mean()
