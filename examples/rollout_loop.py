"""The loop of `rollout.py`: roll out, train, and every few steps reload what rolls out."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from rollout_training import (
    NOT_SERVED,
    Dense,
    acceptance,
    compile_init,
    compile_serving,
    compile_training,
    gap,
)
from watch import addresses, compilations, moved

from jaxfp8.linen import PaddedFP8Dense
from jaxfp8.update import reload_params


PROBED = 32  # rows of the last rollout on which a reload is measured


@dataclasses.dataclass(frozen=True)
class Settings:
    """The size of a run.

    Raises:
        ValueError: if the last step would not be followed by a reload.
    """

    steps: int = 200
    reload_every: int = 5
    batch: int = 128
    length: int = 6  # of a prompt, and of its answer

    def __post_init__(self) -> None:
        if self.steps < 1 or self.steps % self.reload_every:
            raise ValueError(
                f"`steps` must be a positive multiple of {self.reload_every}, after which the "
                f"policy is reloaded, but it is {self.steps}."
            )


class Arm(NamedTuple):
    """Which dense layers train and which roll out. All else is equal, seeds too."""

    name: str
    trained: Dense
    served: Dense


FLOAT = Arm("float32", nn.Dense, nn.Dense)
FP8 = Arm("FP8", nn.Dense, PaddedFP8Dense)
# The trainer's layers round as the served ones do, with straight-through gradients.
FP8_BOTH = Arm(
    "FP8 both",
    functools.partial(PaddedFP8Dense, param_dtype=jnp.float32),
    PaddedFP8Dense,
)
ARMS = (FLOAT, FP8, FP8_BOTH)


@dataclasses.dataclass(frozen=True)
class Gap:
    """|log p(trainer) - log p(policy)| over the tokens of a rollout."""

    mean: float
    max: float

    @staticmethod
    def of(values: Any) -> Gap:
        return Gap(*map(float, values))


@dataclasses.dataclass(frozen=True)
class Reload:
    """What one reload of policy and draft did, measured on the rollout before it.

    Attributes:
        before, after: the gap of the served policy before and after it.
        never: the gap of a policy that was loaded at the start and never again.
        acceptance: how often the policy accepts what the draft proposes, both as reloaded.
        policy_ms, draft_ms: how long each took.
        moved: buffers of the two served trees that lie elsewhere than at first.
        recompiles: programs that anything compiled since the first reload.
    """

    before: Gap
    after: Gap
    never: Gap
    acceptance: float
    policy_ms: float
    draft_ms: float
    moved: int
    recompiles: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of training.

    Attributes:
        reward: mean over the tokens that the served policy wrote.
        gap: that of the policy which wrote them, `reload_every - 1` updates old at most.
        reload: the reload after it, if there was one.
    """

    step: int
    reward: float
    gap: Gap
    reload: Reload | None


def run(arm: Arm, seed: int, settings: Settings) -> Iterator[Step]:
    """Train a policy and its draft; yield a row a step.

    Deterministic by `seed` but for the times, on a CPU; XLA's scatter on a GPU adds in any order.
    """
    training = compile_training(arm.trained, settings.length)
    serving = compile_serving(arm.served, settings.batch, settings.length)
    init_key, rollout_key = jax.random.split(jax.random.key(seed))
    trainer = compile_init(settings.length)(init_key)
    policy, draft = serving.load(trainer)
    never, _ = serving.load(trainer)
    first = addresses((policy, draft))
    compiled = None

    for step in range(1, settings.steps + 1):
        rollout = serving.write(policy, jax.random.fold_in(rollout_key, step))
        trainer, (reward, *difference) = training.train(trainer, rollout)
        reload = None
        if step % settings.reload_every == 0:
            probe = jax.tree.map(lambda a: a[:PROBED], rollout)
            before = serving.score(policy, probe)
            jax.block_until_ready((trainer, before))

            start = time.perf_counter()
            policy = reload_params(policy, trainer.policy, ignore=NOT_SERVED)
            jax.block_until_ready(policy)
            between = time.perf_counter()
            draft = jax.block_until_ready(reload_params(draft, trainer.draft))
            end = time.perf_counter()

            trained = training.score(trainer.policy, probe)
            after, old = (serving.score(tree, probe) for tree in (policy, never))
            reload = Reload(
                *(Gap.of(gap(trained, logits, probe.answers)) for logits in (before, after, old)),
                float(acceptance(after, serving.score_draft(draft, probe))),
                (between - start) * 1e3,
                (end - between) * 1e3,
                moved((policy, draft), first),
                0 if compiled is None else compilations() - compiled,
            )
            compiled = compilations() if compiled is None else compiled
        yield Step(step, float(reward), Gap.of(difference), reload)
