"""The training loop: what is reloaded, what that closes, and that FP8 rollouts learn."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import rollout as example
import rollout_loop as loop
import rollout_policy as task
import rollout_report as report
import rollout_training as training
from rollout_loop import FLOAT, FP8, FP8_BOTH, Settings
from rollout_training import compile_init, compile_serving, compile_training

from jaxfp8.padded import PaddedKernel
from jaxfp8.update import reload_params, update_params


SHORT = Settings(steps=120, batch=64, length=3)
CHANCE = 1 / 30
BOTH = pytest.mark.parametrize("arm", (FLOAT, FP8), ids=("float32", "fp8"))


@functools.cache
def rows(arm) -> list:
    return list(loop.run(arm, 0, SHORT))


def few(arm, steps: int = 15) -> list:
    return list(loop.run(arm, 0, Settings(steps, batch=64, length=3)))


@BOTH
def test_rewards_rise_far_above_chance(arm):
    rewards = [row.reward for row in rows(arm)]
    assert [row.step for row in rows(arm)] == list(range(1, 121))
    # 192 tokens a step: the mean of 10 steps that guess is within 0.013 of chance (3 sigma).
    assert abs(np.mean(rewards[:10]) - CHANCE) < 0.02
    assert np.mean(rewards[-10:]) > 15 * CHANCE


def test_fp8_learns_as_fast_as_float32():
    # Over the whole curve, so also while it is steep: one reload period later costs 0.03 there.
    means = [np.mean([row.reward for row in rows(arm)]) for arm in (FLOAT, FP8)]
    assert abs(means[0] - means[1]) < 0.03


@BOTH
def test_a_reload_every_five_steps_and_nothing_compiled_or_moved(arm):
    assert [row.step for row in rows(arm) if row.reload] == list(range(5, 121, 5))
    done = report.reloads(rows(arm))
    assert [(reload.recompiles, reload.moved) for reload in done] == [(0, 0)] * 24
    assert all(reload.policy_ms > 0 and reload.draft_ms > 0 for reload in done)


def test_a_reload_leaves_only_the_rounding():
    for reload in report.reloads(rows(FP8)):
        # Not 0 either: then the policy would not be in FP8. 0.03 to 0.05 over the run.
        assert 0.01 < reload.after.mean < 0.07 and reload.after.max < 0.6
        assert reload.after.mean < reload.before.mean / 2
    last = report.reloads(rows(FP8))[-1]
    assert last.never.mean > 10 * last.after.mean
    assert all(r.after.mean < 1e-5 < r.before.mean for r in report.reloads(rows(FLOAT)))


def test_the_policy_is_off_by_more_the_older_it_is():
    # The gap of the rollouts themselves, which the importance ratio makes up for.
    ages = np.array([row.gap.mean for row in rows(FP8)]).reshape(-1, 5).mean(0)
    assert (np.diff(ages) > 0).all() and ages[0] < 0.06 and ages[4] > 2 * ages[0]
    # In float32 a new policy is the trainer, though it writes with a cache, token by token.
    assert max(row.gap.max for row in rows(FLOAT)[::5]) < 1e-4


def test_a_trainer_that_rounds_as_well_has_no_gap():
    trainer = compile_init(SHORT.length)(jax.random.key(3))
    serving = compile_serving(FP8.served, SHORT.batch, SHORT.length)
    policy, _ = serving.load(trainer)
    rollout = serving.write(policy, jax.random.key(4))
    wanted = np.asarray(serving.score(policy, rollout))
    both = compile_training(FP8_BOTH.trained, SHORT.length).score(trainer.policy, rollout)
    only = compile_training(FP8.trained, SHORT.length).score(trainer.policy, rollout)
    np.testing.assert_allclose(both, wanted, rtol=0, atol=1e-5)
    assert np.abs(np.asarray(only) - wanted).max() > 0.01


def test_what_is_reloaded_is_the_trainers_without_its_value_head(monkeypatch):
    heads, widths = [], []
    from_dense = jax.jit(PaddedKernel.from_dense)

    def checked(params, loaded, **options):
        if "value_head" in loaded["params"]:
            with pytest.raises(ValueError, match="Unexpected.*value_head/kernel"):
                reload_params(params, loaded)
            heads.append(np.array(loaded["params"]["value_head"]["kernel"]))
        fresh = reload_params(params, loaded, **options)
        assert "value_head" not in fresh["params"]
        for name in ("up", "logits"):
            made = from_dense(loaded["params"][name]["kernel"])
            got = fresh["params"][name]["kernel"]
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(made), strict=True):
                assert np.array(a).tobytes() == np.array(b).tobytes(), name
            assert (got.in_features, got.out_features) == (made.in_features, made.out_features)
        widths.append(fresh["params"]["up"]["kernel"].out_features)
        return fresh

    monkeypatch.setattr(loop, "reload_params", checked)
    few(FP8)
    assert widths == [340, 100] * 3  # the policy and its draft, every five steps
    assert np.abs(heads[2] - heads[0]).max() > 1e-3  # the head is trained, as the baseline


def test_reloads_that_do_nothing_are_seen(monkeypatch):
    monkeypatch.setattr(loop, "reload_params", lambda params, loaded, **options: params)
    got = few(FP8)
    for reload in report.reloads(got):
        assert reload.before == reload.after == reload.never
    assert any("reloads left a log-prob gap" in text for text in report.problems(results(got)))


def test_fp8_that_earns_less_is_seen():
    def shifted(by: float) -> list:
        return [dataclasses.replace(row, reward=row.reward + by) for row in rows(FLOAT)]

    def found(by: float) -> list:
        return [t for t in report.problems(results(rows(FLOAT), shifted(by))) if "below fl" in t]

    assert found(-0.009) == [] and found(0.1) == []
    assert len(found(-0.011)) == 1 and found(-0.011)[0].startswith("FP8, seed 0: reward 0.")
    assert len(found(float("nan"))) == 1


def test_recompiles_and_moved_buffers_are_seen(monkeypatch):
    kept = []

    def rebuild(params, loaded, **options):
        kept.append(params)  # so that no address can be used again
        fresh = update_params(params, loaded, **options)
        # At the third reload also committed, for which nothing was compiled.
        return jax.device_put(fresh, jax.devices()[0]) if len(kept) > 4 else fresh

    monkeypatch.setattr(loop, "reload_params", rebuild)
    got = few(FLOAT)
    leaves = len(jax.tree.leaves(kept[:2]))
    first, second, third = report.reloads(got)
    assert (first.moved, second.moved, third.moved) == (leaves,) * 3
    assert first.recompiles == second.recompiles == 0 < third.recompiles
    found = report.problems(results(got))
    assert any(f"{third.recompiles} recompiles" in text for text in found)
    assert any(f"{leaves} buffers moved" in text for text in found)


def results(float_rows: list, fp8_rows: list | None = None) -> report.Results:
    return {FLOAT.name: [float_rows], FP8.name: [fp8_rows or float_rows]}


def test_the_draft_follows_the_policy(monkeypatch):
    accepted = [reload.acceptance for reload in report.reloads(rows(FP8))]
    assert min(accepted) > 0.5 and accepted[-1] > 0.8

    def policy_only(params, loaded, **options):
        return reload_params(params, loaded, **options) if options else params

    monkeypatch.setattr(loop, "reload_params", policy_only)
    got = list(loop.run(FP8, 0, SHORT))
    assert report.reloads(got)[-1].acceptance < 0.3
    assert [row.reward for row in got] == [row.reward for row in rows(FP8)]
    assert any("of the draft's tokens" in text for text in report.problems(results(got)))


def test_one_seed_gives_one_run():
    def figures(got: list) -> list:
        return [(r.step, r.reward, r.gap, r.reload and r.reload.after) for r in got]

    assert figures(few(FP8)) == figures(few(FP8))
    assert [r.reward for r in few(FLOAT)] == [r.reward for r in rows(FLOAT)[:15]]


def test_the_task_rewards_the_prompt_written_backwards():
    prompts = jnp.array([[4, 7, 9], [1, 2, 3]])
    rollout = task.Rollout(prompts, jnp.array([[9, 7, 4], [1, 2, 3]]), jnp.zeros((2, 3)))
    assert task.rewards(rollout).tolist() == [[1, 1, 1], [0, 1, 0]]
    drawn = np.sort(task.draw_prompts(jax.random.key(0), 500, 6), axis=1)
    assert (np.diff(drawn, axis=1) > 0).all() and drawn.min() == 0 and drawn.max() == 29


def test_the_loss_is_ppos_clipped_one(monkeypatch):
    rng = np.random.default_rng(0)
    logits, values = rng.normal(size=(4, 3, 30)), rng.normal(size=(4, 3))
    answers, old = rng.integers(0, 3, (4, 3)), rng.normal(size=(4, 3)) * 0.5 - 3.5
    rollout = task.Rollout(np.arange(3) + np.zeros((4, 1), int), answers, old)
    monkeypatch.setattr(task, "score", lambda *_: tuple(map(jnp.float32, (logits, values))))
    loss, (_, (reward, mean, highest)) = jax.jit(training.policy_loss, static_argnums=(0, 1))(
        None, None, jax.tree.map(jnp.asarray, rollout)
    )

    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    log_probs = np.log(np.take_along_axis(probabilities, answers[..., None], -1))[..., 0]
    earned = (answers == [2, 1, 0]).astype(float)
    advantage = (earned - values) / (earned - values).std()
    ratio = np.exp(log_probs - old)
    assert (ratio > 1.2).any() and (ratio < 0.8).any()
    gain = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
    entropy = -(probabilities * np.log(probabilities)).sum(-1)
    wanted = np.mean(0.5 * (earned - values) ** 2 - gain - 0.01 * entropy)
    np.testing.assert_allclose(loss, wanted, rtol=2e-5)  # float32 against float64
    gaps = np.abs(log_probs - old)
    np.testing.assert_allclose(
        [reward, mean, highest], [earned.mean(), gaps.mean(), gaps.max()], 1e-6
    )


def test_the_command_prints_tables_and_saves_curves_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "ARMS", (FLOAT, FP8))
    monkeypatch.setattr(example, "QUICK", SHORT)
    monkeypatch.setattr(example, "run", lambda arm, seed, settings: iter(rows(arm)))
    monkeypatch.setattr(report, "LEARNT", 0.3)
    monkeypatch.setattr(report, "REWARD_BOUND", 0.1)
    assert example.main(["--quick", "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert "OK: rollouts in FP8 earn" in printed and "240/240" in printed
    image = matplotlib.image.imread(tmp_path / "new" / "rollout.png")
    assert image.shape[0] > 800 and image.shape[1] > 600 and image.std() > 0.01
    saved = json.loads((tmp_path / "new" / "rollout.json").read_text())
    assert saved["problems"] == [] and saved["settings"]["batch"] == 64
    assert [row["reward"] for row in saved["runs"]["FP8"][0]] == [row.reward for row in rows(FP8)]
    assert saved["summary"]["FP8"]["reloads, both"] == 48


def test_too_few_steps_exit_with_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "ARMS", (FLOAT, FP8))
    monkeypatch.setattr(example, "QUICK", SHORT)
    assert example.main(["--quick", "--steps", "5", "--out", str(tmp_path)]) == 1
    assert "FAILED: float32, seed 0: reward 0.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "7"], "`steps` must be a positive multiple of 5"),
        (["--steps", "0"], "`steps` must be a positive multiple of 5"),
        (["--seeds", "0"], "--seeds must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        example.main(arguments)
    assert message in capsys.readouterr().err
