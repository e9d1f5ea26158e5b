"""The main job over five seeds: fresh weights after every reload, and nothing compiled or moved."""

import functools

import jax
import matplotlib.image
import numpy as np
import pytest
import reload_in_training as example

from jaxfp8.update import update_params


LIMIT = 0.045
SEEDS = pytest.mark.parametrize("seed", range(5))


@functools.cache
def rows(seed: int) -> list:
    return list(example.run(seed, epochs=20))


@SEEDS
def test_every_reload_brings_the_trainers_weights(seed):
    errors = [row.logit_error for row in rows(seed)]
    assert len(errors) == 20
    # Not zero either: then the served model would not be an FP8 one.
    assert all(0.01 < error <= LIMIT for error in errors), errors


@SEEDS
def test_fp8_accuracy_is_within_a_point_at_the_end(seed):
    last = rows(seed)[-1]
    assert last.float_accuracy >= 0.95
    assert abs(last.fp8_accuracy - last.float_accuracy) <= 0.01
    assert last.loss < rows(seed)[0].loss / 10


@SEEDS
def test_nothing_recompiles_and_nothing_moves(seed):
    assert [(row.recompiles, row.moved) for row in rows(seed)] == [(0, 0)] * 20
    assert all(row.path.endswith(jax.devices()[0].device_kind) for row in rows(seed))


def test_the_limit_tells_weights_one_epoch_old(monkeypatch):
    # The served model is one reload behind; everything else is the same run.
    held = []

    def late(params, loaded):
        held.append(jax.tree.map(np.array, loaded))
        return update_params(params, held[max(len(held) - 2, 0)])

    monkeypatch.setattr(example, "reload_params", late)
    errors = [row.logit_error for row in example.run(0, epochs=8)]
    assert errors[0] <= LIMIT and min(errors[1:]) > LIMIT


def test_recompiles_and_moved_buffers_are_seen(monkeypatch):
    # New leaves at every reload, of a dtype the served function was not compiled for at the third.
    kept = []

    def rebuild(params, loaded):
        kept.append(params)  # so that no address can be used again
        fresh = update_params(params, loaded)
        fresh["params"]["logits"]["bias"] = jax.numpy.array(fresh["params"]["logits"]["bias"])
        return jax.device_put(fresh, jax.devices()[0]) if len(kept) == 3 else fresh

    monkeypatch.setattr(example, "reload_params", rebuild)
    got = list(example.run(0, epochs=3))
    leaves = len(jax.tree.leaves(kept[0]))
    assert [row.moved for row in got] == [leaves] * 3
    assert got[1].recompiles == 0 and got[2].recompiles > 0
    assert len(example.problems(got)) == 2 and "FAILED" in example.verdict(got)


def test_the_command_prints_a_verdict_and_saves_the_plot(tmp_path, capsys):
    assert example.main(["--epochs", "2", "--plot", str(tmp_path / "curves.png")]) == 0
    printed = capsys.readouterr().out
    assert "OK: after 2 reloads" in printed and printed.count(jax.devices()[0].device_kind) >= 3
    image = matplotlib.image.imread(tmp_path / "curves.png")
    assert image.shape[0] > 300 and image.shape[1] > 600 and image.std() > 0.01


def test_a_failed_run_exits_with_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "LOGIT_ERROR_LIMIT", 0.001)
    assert example.main(["--epochs", "1", "--plot", str(tmp_path / "curves.png")]) == 1
    assert "FAILED: relative logit error" in capsys.readouterr().out
