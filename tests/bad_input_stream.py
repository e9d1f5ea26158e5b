"""Bad inputs of streams, shards and calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bad_input import Case
from update_cases import weight

from jaxfp8 import (
    KernelShards,
    PaddedFP8Dense,
    PaddedKernel,
    calibrate,
    reload_params,
    reload_stream,
    update_rows,
    with_x_scales,
)


SIZES = {"q": 21, "k": 7, "v": 7}


def tree(*, per_channel: bool = True) -> dict[str, Any]:
    kernel = PaddedKernel.from_dense(weight(18, 35), per_channel=per_channel)
    return {"attn": {"qkv": {"kernel": kernel, "bias": jnp.array(weight(35))}}}


def putting(*put: Any, shard: str | None = None, **options: Any) -> Callable[[Any], Any]:
    """A put, the first of its stream, that leaves the block by its error."""

    def prepare(folder: object) -> tuple[Any, Callable[[], object]]:
        params = tree()

        def call() -> None:
            with reload_stream(params, **options) as stream:
                stream.put(*put, shard=shard)

        return params, call

    return prepare


def between(act: Callable[[Any], object]) -> Callable[[Any], Any]:
    """A call on a stream whose bias has been written; what must stay is that half-new tree."""

    def prepare(folder: object) -> tuple[Any, Callable[[], object]]:
        stream = reload_stream(tree(), shards={"*/qkv": SIZES}).__enter__()
        stream.put("attn/qkv/bias", weight(35, seed=1))
        return stream.params, lambda: act(stream)

    return prepare


def on(params: Any, call: Callable[[Any], object]) -> Callable[[Any], Any]:
    return lambda folder: (params, lambda: call(params))


def nan_weight() -> np.ndarray:
    w = weight(18, 35)
    w[17, 34] = np.nan
    return w


def calibrating(x: np.ndarray) -> Callable[[Any], Any]:
    model = PaddedFP8Dense(5, name="head")
    params = model.init(jax.random.key(0), weight(2, 18))
    return on(params, lambda p: calibrate(model, p, [weight(2, 18), x], progress=False))


KERNEL = "attn/qkv/kernel"
CASES = [
    Case(
        "a path that the tree lacks",
        putting("attn/qkw/kernel", weight(18, 35)),
        ValueError,
        ("attn/qkw/kernel", "no such leaf", f"Did you mean '{KERNEL}'", "`ignore`"),
    ),
    Case(
        "a transposed weight",
        putting(KERNEL, weight(35, 18)),
        ValueError,
        (KERNEL, "(35, 18)", "(18, 35)", 'layout="out_in"', "nothing of this leaf"),
    ),
    Case(
        "a weight that is not finite",
        putting(KERNEL, nan_weight()),
        ValueError,
        (KERNEL, "NaN or infinite", "nothing of this leaf has been changed"),
    ),
    Case(
        "a subtree given to put",
        putting("attn/qkv", {"kernel": weight(18, 35), "bias": weight(35)}),
        TypeError,
        ("attn/qkv", "a dict of 2 leaves", "put_tree('attn/qkv', ...)"),
    ),
    Case(
        "a shard that nobody declared",
        putting(KERNEL, weight(18, 7), shard="k"),
        ValueError,
        (f"{KERNEL}[k]", "no shards are declared", "reload_stream(params, shards="),
    ),
    Case(
        "a shard of another shard's size",
        putting(KERNEL, weight(18, 21), shard="k", shards={"*/qkv": SIZES}),
        ValueError,
        (f"{KERNEL}[k]", "(18, 21)", "(18, 7)", "nothing of this leaf"),
    ),
    Case(
        "an unknown shard",
        putting(KERNEL, weight(18, 7), shard="o", shards={"*/qkv": SIZES}),
        ValueError,
        (f"{KERNEL}[o]", "no shard 'o'", "q, k, v"),
    ),
    Case(
        "shards that do not add up",
        putting(KERNEL, weight(18, 35), shards={"*/qkv": {"q": 21, "k": 7}}),
        ValueError,
        ("shards['*/qkv']", "attn/qkv/", "together 28", "35 output features", "every shard"),
    ),
    Case(
        "shards of a kernel with one scale per tensor",
        on(tree(per_channel=False), lambda p: reload_stream(p, shards={"*/qkv": SIZES})),
        ValueError,
        (KERNEL, "one scale per tensor", "per_channel=True"),
    ),
    Case(
        "a leaf put twice",
        between(lambda stream: stream.put("attn/qkv/bias", weight(35))),
        ValueError,
        ("attn/qkv/bias", "already written", "another `reload_stream`"),
    ),
    Case(
        "a stream finished too early",
        between(lambda stream: stream.finish()),
        ValueError,
        (KERNEL, "not complete", "old values", "finish(partial=True)"),
    ),
    Case(
        "a put before the block is entered",
        on(tree(), lambda p: reload_stream(p).put(KERNEL, weight(18, 35))),
        RuntimeError,
        ("`put`", "with reload_stream(params) as stream:"),
    ),
    Case(
        "an element of a kernel that is no stack",
        putting(f"{KERNEL}[3]", weight(18, 35)),
        ValueError,
        (f"{KERNEL}[3]", "the index [3]", "one kernel and no stack", "nothing of this leaf"),
    ),
    Case(
        "an element past the end of a stack",
        putting("attn/qkv/bias[35]", np.float32(0)),
        ValueError,
        ("attn/qkv/bias[35]", "past the end", "a stack of (35,)", "Count from 0"),
    ),
    Case(
        "two leaves over one buffer",
        on(
            dict.fromkeys(("embed", "head"), jnp.ones((4, 8))),
            lambda p: reload_stream(p),
        ),
        ValueError,
        ("embed and head", "share a buffer", "nothing has been changed", "jnp.copy"),
    ),
    Case(
        "a fused weight that lacks a shard",
        on(
            tree()["attn"]["qkv"]["kernel"],
            lambda p: reload_params(p, KernelShards({"q": weight(18, 21)}, SIZES)),
        ),
        ValueError,
        ("['q']", "['q', 'k', 'v']", "update_rows", "nothing has been changed"),
    ),
    Case(
        "rows past the end of a kernel",
        on(tree()["attn"]["qkv"]["kernel"], lambda p: update_rows(p, 30, weight(18, 7))),
        ValueError,
        ("`weight` has 7 rows", "`start` is 30", "rows 0 to 35"),
    ),
    Case(
        "a batch with an infinity",
        calibrating(np.full((2, 18), np.inf, np.float32)),
        ValueError,
        ("batch 1 of `batches`", "NaN or an infinity", "(the tree itself)", "look at that batch"),
    ),
    Case(
        "a scale for a layer that is not there",
        on(tree(), lambda p: with_x_scales(p, {"attn": {"qkw": {"x_scale": 0.5}}})),
        ValueError,
        ("attn/qkw/x_scale", "no PaddedKernel beside it", "`calibrate`"),
    ),
]
